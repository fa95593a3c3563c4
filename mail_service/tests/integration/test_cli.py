"""The command line around the ledger."""

import json

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
