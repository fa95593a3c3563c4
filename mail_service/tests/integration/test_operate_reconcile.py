"""`reconcile`: every record of a time range has its mail, and no order two."""

from datetime import UTC, datetime, timedelta

import pytest
from harness import PARTITIONS, Ledger, Operator, Topic
from records import Row, dated, order

AT = datetime(2026, 11, 20, 9, tzinfo=UTC)
HOUR = timedelta(hours=1)
RANGE = ("--from", "2026-11-20T00:00Z", "--to", "2026-11-21T00:00Z")
CLEAN = {"dead_letters": 0, "waiting": [], "missing": [], "unread": [], "doubles": []}


@pytest.fixture
def known(topic: Topic, ledger_rows: Ledger) -> dict[str, tuple[int, int]]:
    """Have eight orders of one morning SENT, and one of the day before."""
    records = [dated(order(number), AT + number * HOUR) for number in range(8)]
    places: dict[str, tuple[int, int]] = {}
    for number, record in enumerate(records):
        moment = AT + number * HOUR
        one: list[Row] = [{**record, "partition": number % PARTITIONS}]
        places |= ledger_rows.take_in(topic, one, event_at=moment)
    ledger_rows.take_in(topic, [dated(order("before"), AT - 12 * HOUR)], event_at=AT - 12 * HOUR)
    return places


@pytest.mark.usefixtures("known")
def test_a_range_that_is_whole_ends_with_0(operator: Operator, ledger_rows: Ledger) -> None:
    """Counts by state; the ids only when asked for; nothing is changed."""
    before = ledger_rows.everything()
    whole = {**CLEAN, "records": 8, "orders": 8, "states": {"SENT": 8}}
    assert operator.ask("reconcile", *RANGE) == whole
    told = operator.ask("reconcile", *RANGE, "--ids")
    ids = {"SENT": [f"order-{number}" for number in range(8)]}
    assert {**told, "order_ids": {"SENT": sorted(told["order_ids"]["SENT"])}} == {
        **whole,
        "order_ids": ids,
    }
    people = operator.run("reconcile", *RANGE)
    assert people.returncode == 0
    assert "SENT  8" in people.stdout
    assert operator.run("reconcile", *RANGE, "--ids").returncode == 2
    assert ledger_rows.everything() == before


@pytest.mark.usefixtures("known")
def test_what_the_ledger_lost_is_named(operator: Operator, ledger_rows: Ledger) -> None:
    """Exit 1; `replay` makes it due, and then it is whole again."""
    ledger_rows.change("DELETE FROM deliveries WHERE order_id IN ('order-2', 'order-before')")
    told = operator.ask("reconcile", *RANGE, code=1)
    assert (told["missing"], told["orders"], told["states"]) == (["order-2"], 8, {"SENT": 7})
    assert "missing  order-2" in operator.run("reconcile", *RANGE).stdout
    assert operator.ask("replay", *RANGE, "--yes")["made_due"] == ["order-2"]
    assert operator.ask("reconcile", *RANGE)["states"] == {"SENT": 7, "RETRY": 1}


def test_what_is_lost_in_the_middle_of_the_group_is_told_from_what_waits(
    known: dict[str, tuple[int, int]], operator: Operator, ledger_rows: Ledger
) -> None:
    """The group has not come to it: nothing is wrong, exit 0."""
    partition, offset = known["order-3"]
    ledger_rows.change(
        "UPDATE positions SET next_offset = :offset WHERE partition = :partition",
        partition=partition,
        offset=offset,
    )
    for order_id, place in known.items():
        if place[0] == partition and place[1] >= offset:
            ledger_rows.change("DELETE FROM deliveries WHERE order_id = :id", id=order_id)
    told = operator.ask("reconcile", *RANGE)
    assert told["waiting"] == [
        order_id
        for order_id, place in known.items()
        if place >= (partition, offset) and place[0] == partition
    ]
    assert told["missing"] == []


@pytest.mark.usefixtures("known")
def test_an_unreadable_record_without_a_dead_letter_is_named(
    topic: Topic, operator: Operator, ledger_rows: Ledger
) -> None:
    """By partition and offset; one with a dead letter, or not read yet, is not."""
    record = {**dated(order("x"), AT), "value": b"{", "partition": 1}
    ((partition, offset),) = topic.send([record])
    where = {"topic_id": topic.id(), "partition": partition, "offset": offset}
    assert operator.ask("reconcile", *RANGE)["unread"] == []
    ledger_rows.change("UPDATE positions SET next_offset = next_offset + 1 WHERE partition = 1")
    told = operator.ask("reconcile", *RANGE, code=1)
    assert (told["unread"], told["dead_letters"]) == ([f"{partition}/{offset}"], 0)
    ledger_rows.put_letter(b"{", **where)
    told = operator.ask("reconcile", *RANGE)
    assert (told["unread"], told["dead_letters"], told["records"]) == ([], 1, 9)


@pytest.mark.usefixtures("known")
def test_what_may_have_gone_out_twice_is_named(operator: Operator, ledger_rows: Ledger) -> None:
    """An answer that was lost before the one that came; what was settled as sent is that one."""
    ledger_rows.change("UPDATE deliveries SET unknown_count = 1 WHERE order_id = 'order-1'")
    ledger_rows.change(
        "UPDATE deliveries SET unknown_count = 1, state = 'UNKNOWN', event = 'x',"
        " sent_at = NULL WHERE order_id = 'order-2'"
    )
    ledger_rows.change(
        "UPDATE deliveries SET unknown_count = 2, state = 'UNKNOWN', event = 'x',"
        " sent_at = NULL WHERE order_id = 'order-3'"
    )
    why = ("--sent", "--why", "in the log", "--yes")
    operator.ask("mails", "settle", "order-2", "order-3", *why)
    told = operator.ask("reconcile", *RANGE, code=1)
    assert sorted(told["doubles"]) == ["order-1", "order-3"]
    assert "double  order-1" in operator.run("reconcile", *RANGE).stdout


@pytest.mark.usefixtures("known")
def test_a_redelivered_record_is_one_order(topic: Topic, operator: Operator) -> None:
    """More records than orders; what is not for this service is a record alone."""
    again = dated(order(1), AT)
    other = {**again, "headers": {"ce_type": "order.paid.v1", "ce_time": AT.isoformat()}}
    topic.send([again, other])
    told = operator.ask("reconcile", *RANGE)
    assert (told["records"], told["orders"]) == (10, 8)


@pytest.mark.fault("F-T3")
@pytest.mark.parametrize(
    "arguments",
    [
        ["--from", "2026-11-20T00:00"],
        ["--from", "2026-11-21T00:00Z", "--to", "2026-11-20T00:00Z"],
        ["--from", "2099-11-20T00:00Z"],
        [],
    ],
)
def test_a_range_that_cannot_be_meant_is_refused(
    ledger_rows: Ledger, operator: Operator, arguments: list[str]
) -> None:
    """Exit 2 and a message."""
    ended = operator.run("reconcile", *arguments)
    assert (ended.returncode, "Error: " in ended.stderr) == (2, True)
