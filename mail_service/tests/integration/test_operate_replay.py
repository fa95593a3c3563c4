"""`replay`: a time range of the topic gone over again, beside the live group."""

from datetime import UTC, datetime, timedelta

import pytest
from harness import PARTITIONS, Ledger, Operator, Replicas, Topic, mailed, wait_for
from records import Row, dated, order
from sink import Sink

STATES = ("SENDING", "RETRY", "UNKNOWN", "HELD", "DEAD", "SENT", "ERASED")
AT = datetime(2026, 11, 10, 9, tzinfo=UTC)
HOUR = timedelta(hours=1)
SIXTY_THREE_DAYS_MS = 63 * 24 * 3600 * 1000
RANGE = ("--from", "2026-11-10T00:00Z", "--to", "2026-11-11T00:00Z")


@pytest.fixture(autouse=True)
def kept(topic: Topic) -> None:
    """Let the topic keep last month's records, as it does outside tests."""
    topic.configure({"retention.ms": str(SIXTY_THREE_DAYS_MS)})


def spread(record: Row, number: int) -> Row:
    """Return a record for a partition of its own choice."""
    return {**record, "partition": number % PARTITIONS}


@pytest.mark.fault("F-R1", "F-R2")
def test_only_what_the_ledger_has_lost_is_made_due(
    replicas: Replicas, topic: Topic, sink: Sink, ledger_rows: Ledger, operator: Operator
) -> None:
    """Known in whatever state: left; not read yet: the group's. It and the positions stay."""
    for number, state in enumerate(STATES):
        record = spread(dated(order(state), AT), number)
        ledger_rows.take_in(topic, [record], state=state, event_at=AT)
    lost = [spread(dated(order(f"lost-{number}"), AT), number) for number in range(4)]
    ledger_rows.take_in(topic, lost)
    ledger_rows.change("DELETE FROM deliveries WHERE order_id LIKE 'order-lost-%'")
    topic.rewind(1)
    fresh = [spread(dated(order(f"fresh-{number}"), AT), number) for number in range(3)]
    topic.send(fresh)
    before, commits = ledger_rows.everything(), topic.commits()

    told = operator.ask("replay", *RANGE, "--yes")

    assert told["events"] == {**dict.fromkeys(STATES, 1), "unknown": 4, "not read yet": 3}
    assert sorted(told["made_due"]) == [f"order-lost-{number}" for number in range(4)]
    after = ledger_rows.everything()
    assert (topic.commits(), topic.members()) == (commits, {})
    assert {**after, "deliveries": []} == {**before, "deliveries": []}
    made = [row for row in after["deliveries"] if row not in before["deliveries"]]
    assert len(after["deliveries"]) == len(before["deliveries"]) + 4
    assert {row["state"] for row in made} == {"RETRY"}
    assert {row["event_at"] for row in made} == {AT}
    assert all(row["give_up_at"] > datetime.now(UTC) + 23 * HOUR for row in made)

    again = operator.ask("replay", *RANGE, "--yes")

    assert again["made_due"] == []
    assert again["events"]["RETRY"] == 5
    ledger_rows.change("DELETE FROM deliveries WHERE order_id = 'order-SENDING'")
    ledger_rows.change(
        "UPDATE deliveries SET state = 'HELD' WHERE state IN ('RETRY', 'UNKNOWN')"
        " AND order_id NOT LIKE 'order-lost-%'"
    )
    topic.forget_group()
    ledger_rows.change("UPDATE positions SET released_at = now()")
    replicas.start()
    wait_for(lambda: mailed(sink), lambda mails: len(mails) == 7)
    assert mailed(sink) == {
        **{f"order-lost-{number}": 1 for number in range(4)},
        **{f"order-fresh-{number}": 1 for number in range(3)},
    }
    names = {mail.message_id for mail in sink.accepted()}
    assert "<order-confirmation.order-lost-0@shop.example>" in names


def test_a_range_goes_by_the_events_time(
    topic: Topic, ledger_rows: Ledger, operator: Operator
) -> None:
    """`ce_time` says when, though the record came later; without it the record's own time does."""
    came = int((AT + 30 * HOUR).timestamp() * 1000)
    moments = {
        "before": AT - timedelta(microseconds=1),
        "first": AT,
        "last": AT + HOUR - timedelta(microseconds=1),
        "end": AT + HOUR,
    }
    records = [
        {**dated(order(name), moment), "timestamp": came} for name, moment in moments.items()
    ]
    records += [
        {**order("plain"), "timestamp": int(AT.timestamp() * 1000)},
        {**order("later"), "timestamp": came},
    ]
    topic.place(records)
    ledger_rows.read_up_to(topic, topic.ends())
    told = operator.ask(
        "replay", "--from", AT.isoformat(), "--to", (AT + HOUR).isoformat(), "--dry-run"
    )
    assert told["events"] == {"unknown": 3}
    done = operator.ask(
        "replay", "--from", AT.isoformat(), "--to", (AT + HOUR).isoformat(), "--yes"
    )
    assert sorted(done["made_due"]) == ["order-first", "order-last", "order-plain"]


@pytest.mark.fault("F-R3", "F-R4", "F-T3")
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--from", "2026-11-10T00:00", "--to", "2026-11-11T00:00Z"], "names no offset from UTC"),
        (["--from", "2026-11-10", "--to", "2026-11-11T00:00Z"], "names no offset from UTC"),
        (["--from", "2026-11-10T00:00Z", "--to", "2026-11-11T00:00"], "names no offset from UTC"),
        (["--from", "2026-11-11T00:00Z", "--to", "2026-11-10T00:00Z"], "must be before --to"),
        (["--from", "2026-11-10T00:00Z", "--to", "2026-11-10T00:00Z"], "must be before --to"),
        # The later clock time is the earlier moment.
        (["--from", "2026-11-10T09:00Z", "--to", "2026-11-10T17:00+09:00"], "must be before --to"),
        (["--from", "2099-11-10T00:00Z"], "lies in the future"),
        (["--from", "2099-11-10T00:00Z", "--to", "2099-11-11T00:00Z"], "lies in the future"),
        (["--from", "2026-11-12T00:00Z", "--to", "2026-11-13T00:00Z"], "no record of"),
        (["--from", "2026-11-09T00:00Z", "--to", "2026-11-09T01:00Z"], "no event between"),
        (["--from", "2025-01-01T00:00Z"], "closed mails for 400 days"),
        (["--from", "0001-01-01T00:00Z"], "closed mails for 400 days"),
        (["--from", "0001-01-01T00:00+23:00"], "closed mails for 400 days"),
        (["--from", "yesterday"], "Invalid isoformat string"),
        (["--to", "2026-11-11T00:00Z"], "Missing option '--from'"),
    ],
)
def test_a_range_that_cannot_be_meant_is_refused(
    topic: Topic, ledger_rows: Ledger, operator: Operator, arguments: list[str], said: str
) -> None:
    """Exit 2, one message, no traceback, nothing made due."""
    topic.place([dated(order(1), AT)])
    ledger_rows.read_up_to(topic, topic.ends())
    ended = operator.run("replay", *arguments, "--yes")
    assert ended.returncode == 2, ended.stderr
    assert said in ended.stderr
    assert "Traceback" not in ended.stderr
    assert ledger_rows.states() == {}


@pytest.mark.fault("F-T3")
def test_the_hour_that_comes_twice_is_two_hours(
    topic: Topic, ledger_rows: Ledger, operator: Operator
) -> None:
    """When summer time ends the offset tells which is meant, wherever the command is run."""
    summer = datetime(2026, 10, 25, 0, 30, tzinfo=UTC)
    records = [dated(order("summer"), summer), dated(order("winter"), summer + HOUR)]
    topic.place(records)
    ledger_rows.read_up_to(topic, topic.ends())
    zones = ("UTC", "America/New_York", "Europe/Berlin")
    ranges = (
        ("2026-10-25T02:00+02:00", "2026-10-25T02:00+01:00"),
        ("2026-10-25T00:00Z", "2026-10-25T01:00Z"),
        ("2026-10-25T09:00+09:00", "2026-10-24T21:00-04:00"),
    )
    for zone, (since, until) in zip(zones, ranges, strict=True):
        ended = operator.run("replay", "--from", since, "--to", until, "--dry-run", TZ=zone)
        assert "1 events in the range: 1 unknown" in ended.stderr, (zone, since)
    made = operator.ask(
        "replay",
        "--from",
        "2026-10-25T02:00+01:00",
        "--to",
        "2026-10-25T03:00+01:00",
        "--yes",
        TZ="Europe/Berlin",
    )["made_due"]
    assert made == ["order-winter"]
    assert ledger_rows.mail("order-winter")["event_at"] == summer + HOUR


def test_what_would_be_sent_is_told_first(
    topic: Topic, ledger_rows: Ledger, operator: Operator
) -> None:
    """To how many; what cannot be read is counted, what is not for us is not; nothing changes."""
    twice = dated(order(1), AT)
    other = {**dated(order(2), AT), "headers": {"ce_type": "order.paid.v1"}}
    unreadable = {**dated(order(3), AT), "value": "{"}
    shared = dated(order(4, email="customer-1@example.com"), AT)
    topic.send([twice, twice, other, unreadable, shared])
    ledger_rows.read_up_to(topic, topic.ends())
    before = ledger_rows.everything()

    dry = operator.run("replay", *RANGE, "--dry-run")

    assert dry.returncode == 0
    assert "1 unreadable" in dry.stderr
    assert "2 mails to 1 recipients would be sent" in dry.stderr
    assert "customer-1" not in dry.stderr + dry.stdout
    assert operator.run("replay", *RANGE).returncode == 2
    assert ledger_rows.everything() == before
    assert sorted(operator.ask("replay", *RANGE, "--yes")["made_due"]) == ["order-1", "order-4"]


def test_a_topic_nobody_has_read_is_left_to_the_group(
    topic: Topic, ledger_rows: Ledger, operator: Operator
) -> None:
    """Also after a ledger was lost: a replay is not a way around what refuses to start."""
    topic.place([dated(order(number), AT) for number in range(3)])
    told = operator.ask("replay", *RANGE, "--yes")
    assert (told["events"], told["made_due"]) == ({"not read yet": 3}, [])
    assert ledger_rows.rows("SELECT * FROM positions") == []
