"""`dead-letters list|show|retry|export`: records that could not be read."""

import base64
import json
import time
from datetime import UTC, datetime
from pathlib import Path

import pytest
from harness import Ledger, Operator, Replicas, Topic, event_of, mailed, wait_for
from records import Row
from sink import Sink

LETTERS = 2_000
HOSTILE = {
    "JSON": b'{"email": "minji@example.com"}',
    "no JSON": b"to minji@example.com, please",
    "cut off": b'{"email": "minji@exam',
    "escaped": b'{"email": "minji\\u0040example.com"}',
    "UTF-16": '{"email": "minji@example.com"}'.encode("utf-16"),
    "a name in quotes": b'{"email": "\\"minji\\"@example.com"}',
    "two words": b'{"email": "minji minji@example.com"}',
    "more than one": b'{"email": "minji@example.com\\r\\nBcc: minji2@example.com"}',
    "no text": b"\xff\xfeminji@example.com\x00",
    "in other quotes": b"{'email': 'minji@example.com'}",
}


def mails_of(ledger: Ledger) -> list[Row]:
    """Return every mail in the order of the orders' names."""
    return ledger.rows("SELECT * FROM deliveries ORDER BY order_id, campaign")


@pytest.mark.fault("F-Q3")
def test_what_still_cannot_be_read_stays(
    replicas: Replicas, topic: Topic, sink: Sink, ledger_rows: Ledger, operator: Operator
) -> None:
    """However often it is tried: the very same row, exit 1, no mail and no loop."""
    topic.send([{"value": b"\xff no JSON", "key": b"k"}, {"value": event_of("order-2", email=1)}])
    replicas.start()
    letters = wait_for(ledger_rows.dead_letters, lambda found: len(found) == 2)
    ids = [letter["id"] for letter in letters]
    for arguments in (["--all"], ids, ["--all"]):
        told = operator.ask("dead-letters", "retry", *arguments, "--yes", code=1)
        assert {each["outcome"] for each in told} == {
            "not JSON: UnicodeDecodeError",
            "not an OrderCreatedEvent: email",
        }
    assert ledger_rows.dead_letters() == letters
    assert (ledger_rows.states(), mailed(sink)) == ({}, {})


@pytest.mark.fault("F-Q4")
@pytest.mark.parametrize("state", ["SENT", "DEAD", "ERASED", "RETRY"])
def test_one_whose_order_is_known_is_a_duplicate(
    ledger_rows: Ledger, operator: Operator, state: str
) -> None:
    """The ledger's row stays as it is, whatever its state; the dead letter is gone."""
    ledger_rows.put("order-1", state)
    before = mails_of(ledger_rows)
    letter_id = ledger_rows.put_letter(event_of("order-1"))
    told = operator.ask("dead-letters", "retry", letter_id, "--yes")
    assert told == [{"id": letter_id, "outcome": "duplicate"}]
    assert (mails_of(ledger_rows), ledger_rows.dead_letters()) == (before, [])


def test_one_that_can_be_read_now_becomes_a_mail(
    replicas: Replicas, topic: Topic, sink: Sink, ledger_rows: Ledger, operator: Operator
) -> None:
    """With the record's coordinates, as of a release that reads what this one could not."""
    ((partition, offset),) = topic.send([{"value": event_of("order-1"), "partition": 2}])
    where = {"topic_id": topic.id(), "partition": partition, "offset": offset}
    ledger_rows.read_up_to(topic, topic.ends())
    headers = json.dumps([["ce_time", "2026-11-01T10:00:00+09:00"]])
    letter_id = ledger_rows.put_letter(
        event_of("order-1"), key=b"order-1", headers=headers, **where
    )
    dry = operator.ask("dead-letters", "retry", letter_id, "--dry-run")
    assert dry == [{"id": letter_id, "outcome": "would become a mail"}]
    assert operator.run("dead-letters", "retry", letter_id).returncode == 2
    assert (ledger_rows.states(), len(ledger_rows.dead_letters())) == ({}, 1)
    replicas.start()

    told = operator.ask("dead-letters", "retry", letter_id, "--yes")

    assert told == [{"id": letter_id, "outcome": "RETRY"}]
    wait_for(ledger_rows.states, lambda states: states == {"SENT": 1})
    row = ledger_rows.mail("order-1")
    assert {name: row[name] for name in where} == where
    assert row["event_at"] == datetime(2026, 11, 1, 1, tzinfo=UTC)
    assert (mailed(sink), ledger_rows.dead_letters()) == ({"order-1": 1}, [])
    gone = operator.ask("dead-letters", "retry", letter_id, "--yes", code=1)
    assert gone == [{"id": letter_id, "outcome": "there is none"}]


def test_what_was_cut_off_is_not_taken_for_the_whole(
    ledger_rows: Ledger, operator: Operator
) -> None:
    """Nor is one that is no event of this service, or was emptied by an erasure."""
    cut = ledger_rows.put_letter(event_of("order-1"), value_sha256="of something longer")
    headers = json.dumps([["ce_type", "order.paid.v1"]])
    other = ledger_rows.put_letter(event_of("order-2"), headers=headers)
    contrary = ledger_rows.put_letter(event_of("order-3"), key=b"order-4")
    empty = ledger_rows.put_letter(None, reason="erased", value_sha256="")
    told = operator.ask("dead-letters", "retry", "--all", "--yes", code=1)
    assert {each["id"]: each["outcome"] for each in told} == {
        cut: "only its beginning was kept: the topic may have the whole",
        other: "not for this service",
        contrary: "the key contradicts orderId",
        empty: "erased",
    }
    assert (len(ledger_rows.dead_letters()), ledger_rows.states()) == (4, {})


@pytest.mark.fault("F-Q5")
def test_a_retry_that_is_killed_half_way_is_run_again(
    ledger_rows: Ledger, operator: Operator
) -> None:
    """What had become a mail is one, the rest becomes one: each once."""
    for number in range(LETTERS // 500):
        ledger_rows.change(
            'INSERT INTO dead_letters (topic_id, partition, "offset", value, value_sha256, headers,'
            " reason) SELECT 't', 0, number, value, encode(sha256(value), 'hex'), '[]', 'once'"
            " FROM generate_series(CAST(:first AS integer), :first + 499) AS number,"
            " LATERAL (SELECT convert_to(replace(:event, 'order-0', 'order-' || number), 'UTF8'))"
            " AS made (value)",
            first=number * 500,
            event=event_of("order-0").decode(),
        )
    with operator.begin("dead-letters", "retry", "--all", "--yes") as process:
        wait_for(lambda: sum(ledger_rows.states().values()), lambda count: count > LETTERS // 10)
        process.kill()
    # What it had begun to commit is committed.
    locks = "SELECT 1 FROM pg_locks WHERE locktype = 'advisory'"
    wait_for(lambda: ledger_rows.rows(locks), lambda held: not held)
    done = len(mails_of(ledger_rows))
    assert LETTERS // 10 < done < LETTERS
    assert len(ledger_rows.dead_letters()) == LETTERS - done

    told = operator.ask("dead-letters", "retry", "--all", "--yes")

    assert [each["outcome"] for each in told] == ["RETRY"] * (LETTERS - done)
    assert ledger_rows.dead_letters() == []
    assert {row["order_id"] for row in mails_of(ledger_rows)} == {
        f"order-{number}" for number in range(LETTERS)
    }
    assert ledger_rows.states() == {"RETRY": LETTERS}


def test_letters_are_chosen_by_reason_and_number(ledger_rows: Ledger, operator: Operator) -> None:
    """The oldest first; only those of a reason are tried again."""
    first = ledger_rows.put_letter(b"x")
    second = ledger_rows.put_letter(event_of("order-2"), reason="a major version")
    third = ledger_rows.put_letter(event_of("order-3"), reason="a major version")
    listed = operator.ask("dead-letters", "list", "--limit", 2)
    assert [row["id"] for row in listed] == [first, second]
    versions = operator.ask("dead-letters", "list", "--reason", "major")
    assert [row["id"] for row in versions] == [second, third]
    told = operator.ask("dead-letters", "retry", "--all", "--reason", "major", "--yes")
    assert [row["id"] for row in told] == [second, third]
    assert operator.ask("dead-letters", "show", second, code=1) == []
    for arguments in ([], ["--all", first], ["x"]):
        assert operator.run("dead-letters", "retry", *arguments, "--yes").returncode == 2


@pytest.mark.parametrize("value", HOSTILE.values(), ids=HOSTILE.keys())
def test_a_letter_names_nobody_unless_asked(
    ledger_rows: Ledger, operator: Operator, value: bytes
) -> None:
    """Whatever is in it, in list, show and export; nor can it write on the terminal."""
    headers = json.dumps([["to", "minji@example.com"], ["\x1b[2J", "\x1b[2J"]])
    letter_id = ledger_rows.put_letter(value, key=b"minji@example.com", headers=headers)
    commands = (["list"], ["list", "--json"], ["show", letter_id], ["export"])
    seen = "".join(operator.run("dead-letters", *command).stdout for command in commands)
    assert "\x1b" not in seen
    if value != HOSTILE["cut off"]:
        assert "minji" not in seen.replace("\\x00", "").replace("\\\\x00", "")
    assert "example.com" not in seen.replace("\\x00", "")


def test_an_export_is_whole_and_private(
    ledger_rows: Ledger, operator: Operator, tmp_path: Path
) -> None:
    """For whom asks, the very bytes; the file is for nobody else to read."""
    value, key = b'\xff\x00{"email": "minji@example.com"}', b"\xfe"
    headers = [["ce_type", "x"], ["ce_type", "y"]]
    ledger_rows.put_letter(value, key=key, headers=json.dumps(headers))
    ledger_rows.put_letter(b"another", reason="other")
    out = tmp_path / "letters.jsonl"
    out.write_text("before")
    out.chmod(0o644)

    ended = operator.run(
        "dead-letters", "export", "--show-addresses", "--reason", "JSON", "--out", out
    )

    assert (ended.returncode, ended.stdout) == (0, "")
    (line,) = out.read_text(encoding="utf-8").splitlines()
    row = json.loads(line)
    assert base64.b64decode(row["value"]) == value
    assert base64.b64decode(row["key"]) == key
    assert row["headers"] == headers
    assert out.stat().st_mode & 0o777 == 0o600
    assert [path.name for path in tmp_path.iterdir()] == [out.name]
    masked = operator.run("dead-letters", "export")
    assert len(masked.stdout.splitlines()) == 2
    assert "minji" not in masked.stdout
    away = operator.run("dead-letters", "export", "--out", tmp_path / "no" / "such")
    assert (away.returncode, len(away.stderr.splitlines())) == (3, 1)


def test_two_who_retry_at_once_make_one_mail_of_each(
    ledger_rows: Ledger, operator: Operator
) -> None:
    """A letter that is gone when its turn comes was the other's."""
    for number in range(50):
        ledger_rows.put_letter(event_of(f"order-{number}"), offset=number)
    command = ("dead-letters", "retry", "--all", "--yes", "--json")
    began = time.monotonic()
    both = operator.at_once(command, command)
    outcomes = [each["outcome"] for ended in both for each in json.loads(ended.stdout)]
    assert outcomes.count("RETRY") == 50
    assert set(outcomes) <= {"RETRY", "there is none"}
    assert (ledger_rows.states(), ledger_rows.dead_letters()) == ({"RETRY": 50}, [])
    assert time.monotonic() - began < 30
