"""The command line around the ledger."""

import json
from pathlib import Path

import pytest
from harness import Environment, Ledger, run

UNKNOWN_ORDER = "order-nobody-knows"


@pytest.mark.parametrize(
    "arguments", [("consume",), ("migrate",), ("mails", "show", UNKNOWN_ORDER)]
)
def test_settings_that_cannot_be_used_end_a_command_at_once(
    base_environment: Environment, arguments: tuple[str, ...]
) -> None:
    """Exit 2 and one message, in which all faults stand, and no traceback."""
    wrong = {**base_environment, "MAIL_FROM": "nobody", "SMTP_TLS": "maybe"}
    del wrong["SHOP_NAME"]

    ended = run(wrong, *arguments)

    assert ended.returncode == 2
    named = {line.partition(":")[0] for line in ended.stderr.splitlines()}
    assert named == {"MAIL_FROM", "SMTP_TLS", "SHOP_NAME"}


@pytest.mark.parametrize(
    ("name", "value"), [("KAFKA_NO_SUCH_THING", "1"), ("KAFKA_FETCH_MIN_BYTES", "many")]
)
def test_a_kafka_property_that_cannot_be_set_ends_a_replica(
    base_environment: Environment, name: str, value: str
) -> None:
    """Exit 2 with what the client says of it."""
    ended = run({**base_environment, name: value}, "consume")

    assert ended.returncode == 2
    assert name.removeprefix("KAFKA_").lower().replace("_", ".") in ended.stderr
    assert "Traceback" not in ended.stderr


@pytest.mark.parametrize(("arguments", "output"), [(["--json"], "[]"), ([], "")])
def test_an_order_nobody_knows_is_not_shown(
    base_environment: Environment, ledger_rows: Ledger, arguments: list[str], output: str
) -> None:
    """Exit 1, so that scripts can ask."""
    shown = run(base_environment, "mails", "show", UNKNOWN_ORDER, *arguments)

    assert (shown.returncode, shown.stdout.strip()) == (1, output)


def test_a_mail_is_shown_without_address_and_content(
    base_environment: Environment, ledger_rows: Ledger
) -> None:
    """An operator sees what became of a mail, not who gets it."""
    ledger_rows.change(
        "INSERT INTO deliveries (kind, order_id, campaign, state, message_id, event, event_at,"
        ' topic_id, partition, "offset", give_up_at, reason)'
        " VALUES ('order-confirmation', 'order-1', '', 'DEAD', '<m@x>', 'minji@example.com', now(),"
        " 't', 2, 7, now(), 'RCPT: 550 5.1.1 no such user')"
    )

    shown = run(base_environment, "mails", "show", "order-1", "--json")

    assert shown.returncode == 0
    (row,) = json.loads(shown.stdout)
    assert row["state"] == "DEAD"
    assert (row["partition"], row["offset"]) == (2, 7)
    assert row["reason"] == "RCPT: 550 5.1.1 no such user"
    assert "minji" not in shown.stdout + run(base_environment, "mails", "show", "order-1").stdout


@pytest.mark.parametrize(
    ("suffix", "expected"), [("html", "<!DOCTYPE"), ("txt", "주문"), ("eml", "From: ")]
)
def test_a_preview_is_written_where_it_is_asked_for(
    base_environment: Environment, tmp_path: Path, suffix: str, expected: str
) -> None:
    """The very mail that a customer would get, without a relay or a ledger."""
    out = tmp_path / f"mail.{suffix}"
    away = {**base_environment, "DATABASE_URL": "postgresql://x@127.0.0.1:1/x"}

    ended = run(away, "preview", "--locale", "ko", "--out", str(out))

    assert (ended.returncode, ended.stdout) == (0, "")
    assert out.read_bytes().decode().startswith(expected)


def test_a_preview_of_an_event_that_makes_no_mail_says_why(
    base_environment: Environment, tmp_path: Path
) -> None:
    """Exit 3, and the reason a dead letter would have."""
    event = tmp_path / "event.json"
    event.write_text('{"orderId": "1"}', encoding="utf-8")

    ended = run(base_environment, "preview", "--event", str(event))

    assert ended.returncode == 3
    assert "not an OrderCreatedEvent: amount, email, userId" in ended.stderr


def test_a_preview_shows_the_text(base_environment: Environment) -> None:
    """To a terminal, subject first."""
    shown = run(base_environment, "preview", "--locale", "en").stdout

    assert shown.startswith("[Tea House] We have your order")
    assert "Thank you for your order" in shown


def test_templates_that_are_broken_end_a_replica(
    base_environment: Environment, tmp_path: Path
) -> None:
    """Exit 2 at the start, not a DEAD mail later."""
    (tmp_path / "confirmation.txt").write_text("{{ coupon }}", encoding="utf-8")

    ended = run({**base_environment, "MAIL_TEMPLATES": str(tmp_path)}, "consume")

    assert ended.returncode == 2
    assert "'coupon' is undefined" in ended.stderr
