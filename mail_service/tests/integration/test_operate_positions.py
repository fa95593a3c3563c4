"""`positions list|accept-gap|rewind`: how far the topic was taken in, and what a person decides."""

import json
from datetime import UTC, datetime, timedelta

import pytest
from confluent_kafka import Producer
from harness import (
    KAFKA_SECONDS,
    Environment,
    Ledger,
    Operator,
    Replica,
    Replicas,
    Topic,
    mailed,
    once,
    wait_for,
    wait_until_sent,
)
from records import Row, dated, order, orders
from sink import Sink

DAY = timedelta(days=1)
# More than librdkafka unpacks.
MOST_UNPACKED_BYTES = 95_000_000
LARGEST_BATCH_BYTES = 4_000_000


def in_one(partition: int, records: list[Row]) -> list[Row]:
    """Return records for one partition."""
    return [{**record, "partition": partition} for record in records]


def gap_of(ledger: Ledger) -> Row:
    """Wait for the one gap that a replica finds, and return it."""
    (gap,) = wait_for(lambda: ledger.rows("SELECT * FROM gaps"), bool)
    return gap


def put_gap(ledger: Ledger, **changes: object) -> int:
    """Put a gap there and return its id."""
    gap = {"first": 2, "end": 5, "reason": "expired before it was read", **changes}
    ledger.change(
        "INSERT INTO gaps (topic_id, partition, first_offset, end_offset, reason)"
        " VALUES ('t', 0, :first, :end, :reason)",
        **gap,
    )
    return int(ledger.rows("SELECT max(id) AS id FROM gaps")[0]["id"])


# list


def test_lag_and_gaps_are_listed(topic: Topic, ledger_rows: Ledger, operator: Operator) -> None:
    """Exit 1 when a gap waits for a person; a partition never read lags by all it has."""
    ledger_rows.take_in(topic, in_one(0, orders(5)))
    topic.send(in_one(0, orders(3)) + in_one(1, orders(2)))
    ledger_rows.change("DELETE FROM positions WHERE partition = 1")
    topic.rewind(4)

    told = operator.ask("positions", "list")

    shown = {row["partition"]: row for row in told["positions"]}
    assert {number: row["lag"] for number, row in shown.items()} == {0: 3, 1: 2, 2: 0}
    assert [row["next_offset"] for row in shown.values()] == [5, None, 0]
    assert (shown[0]["committed"], shown[0]["log_start"], shown[0]["log_end"]) == (4, 0, 8)
    assert (told["gaps"], told["paused"]) == ([], None)
    gap_id = put_gap(ledger_rows)
    assert [gap["id"] for gap in operator.ask("positions", "list", code=1)["gaps"]] == [gap_id]
    people = operator.run("positions", "list")
    assert (people.returncode, "expired before it was read" in people.stdout) == (1, True)


def test_a_topic_that_is_not_there_is_said_to_be_so(
    topic: Topic, ledger_rows: Ledger, operator: Operator
) -> None:
    """Exit 3 and one line."""
    topic.delete()
    ended = operator.run("positions", "list")
    assert (ended.returncode, ended.stdout) == (3, "")
    assert "Unknown topic" in ended.stderr


# accept-gap


@pytest.mark.fault("F-K9")
def test_behind_a_gap_of_what_expired_the_partition_goes_on(
    replicas: Replicas, topic: Topic, sink: Sink, ledger_rows: Ledger, operator: Operator
) -> None:
    """Within seconds, without a restart; mails that waited for a person have their full time."""
    at = datetime.now(UTC) - 2 * DAY
    records = in_one(0, [dated(each, at) for each in orders(10)])
    topic.send(records)
    ledger_rows.read_up_to(topic, {0: 2, 1: 0, 2: 0})
    topic.delete_before(0, 6)
    replica = replicas.start()
    gap = gap_of(ledger_rows)
    assert (gap["first_offset"], gap["end_offset"]) == (2, 6)
    dry = operator.ask("positions", "accept-gap", gap["id"], "--dry-run")
    assert dry == [{"id": gap["id"], "outcome": "left alone"}]
    assert operator.run("positions", "accept-gap", gap["id"]).returncode == 2
    assert operator.run("positions", "accept-gap", gap["id"], "--go-on-at", 8).returncode == 2
    assert (ledger_rows.positions()[0], mailed(sink)) == (2, {})

    told = operator.ask("positions", "accept-gap", gap["id"], "--yes")

    assert told == [{"id": gap["id"], "outcome": "goes on at 6"}]
    wait_until_sent(ledger_rows, 4, replica)
    assert mailed(sink) == once(records[6:])
    wait_for(lambda: replica.status("readyz"), lambda status: status == 200)
    again = operator.ask("positions", "accept-gap", gap["id"], "--yes", code=1)
    assert again == [{"id": gap["id"], "outcome": "does not wait"}]
    assert ledger_rows.positions()[0] == 10
    operator.ask("positions", "list")


def test_behind_a_log_that_ends_before_the_position_what_is_new_is_read(
    replicas: Replicas, topic: Topic, sink: Sink, ledger_rows: Ledger, operator: Operator
) -> None:
    """As after an unclean election: nothing of what follows is skipped."""
    topic.send(in_one(0, orders(3)))
    ledger_rows.read_up_to(topic, {0: 9, 1: 0, 2: 0})
    topic.rewind(0)
    replica = replicas.start()
    gap = gap_of(ledger_rows)
    assert (gap["reason"], gap["first_offset"]) == ("the log ends before the position", 3)
    assert operator.ask("positions", "list", code=1)["positions"][0]["lag"] == 0
    # What comes meanwhile is new too, though the log's end has moved on.
    late = in_one(0, [order(f"late-{number}") for number in range(3)])
    topic.send(late[:2])

    told = operator.ask("positions", "accept-gap", gap["id"], "--yes")

    assert told == [{"id": gap["id"], "outcome": "goes on at 3"}]
    topic.send(late[2:])
    wait_until_sent(ledger_rows, 3, replica)
    assert mailed(sink) == once(late)


@pytest.mark.fault("F-P15")
def test_behind_a_batch_that_cannot_be_unpacked_the_partition_goes_on(
    replicas: Replicas,
    topic: Topic,
    sink: Sink,
    ledger_rows: Ledger,
    operator: Operator,
    environment: Environment,
) -> None:
    """A person says where it ends; what lies behind it is mailed."""
    topic.configure({"max.message.bytes": str(LARGEST_BATCH_BYTES)})
    topic.send(in_one(0, [order("before")]))
    bomb = {**order("bomb"), "value": order("bomb")["value"] + " " * MOST_UNPACKED_BYTES}
    send_together(environment, in_one(0, [order("with"), bomb]))
    topic.send(in_one(0, [order("behind")]))
    replica = replicas.start()
    gap = gap_of(ledger_rows)
    assert (gap["reason"], gap["first_offset"]) == ("it cannot be unpacked", 1)
    for wrong in (0, 1):
        refused = operator.run("positions", "accept-gap", gap["id"], "--go-on-at", wrong, "--yes")
        assert (refused.returncode, "--go-on-at: behind a gap" in refused.stderr) == (2, True)

    told = operator.ask("positions", "accept-gap", gap["id"], "--go-on-at", 3, "--yes")

    assert told == [{"id": gap["id"], "outcome": "goes on at 3"}]
    wait_until_sent(ledger_rows, 2, replica)
    assert mailed(sink) == {"order-before": 1, "order-behind": 1}


def send_together(environment: Environment, records: list[Row]) -> None:
    """Write records as one batch, compressed."""
    producer = Producer(
        {
            "bootstrap.servers": environment["KAFKA_BOOTSTRAP_SERVERS"],
            "compression.type": "zstd",
            "linger.ms": 1000,
            "message.max.bytes": 1_000_000_000,
            "batch.size": 1_000_000_000,
        }
    )
    for record in records:
        producer.produce("order-created", **record)
    assert producer.flush(KAFKA_SECONDS) == 0


def test_what_was_not_read_of_an_earlier_topic_is_accepted(
    replicas: Replicas, topic: Topic, sink: Sink, ledger_rows: Ledger, operator: Operator
) -> None:
    """Nothing goes on anywhere: the new one is read from its start already."""
    ledger_rows.take_in(topic, in_one(0, orders(3)))
    topic.recreate()
    topic.send(in_one(0, [order("new")]))
    replica = replicas.start()
    wait_until_sent(ledger_rows, 4, replica)
    gaps = ledger_rows.rows("SELECT id, reason FROM gaps ORDER BY id")
    assert {gap["reason"] for gap in gaps} == {"topic recreated"}
    before = ledger_rows.rows("SELECT * FROM positions ORDER BY topic_id, partition")

    told = operator.ask("positions", "accept-gap", *(gap["id"] for gap in gaps), "--yes")

    assert {each["outcome"] for each in told} == {"accepted"}
    assert ledger_rows.rows("SELECT * FROM positions ORDER BY topic_id, partition") == before
    assert operator.ask("positions", "list")["gaps"] == []
    assert mailed(sink) == {"order-new": 1}


def test_two_who_accept_a_gap_at_once_move_the_position_once(
    topic: Topic, ledger_rows: Ledger, operator: Operator
) -> None:
    """And a gap nobody knows is named, with exit 1."""
    gap_id = put_gap(ledger_rows)
    ledger_rows.change(
        "INSERT INTO positions (topic_id, partition, cluster_id, next_offset)"
        " VALUES ('t', 0, 'c', 2)"
    )
    command = ("positions", "accept-gap", gap_id, gap_id + 1, "--yes", "--json")
    both = [json.loads(each.stdout) for each in operator.at_once(command, command)]
    outcomes = sorted(row["outcome"] for told in both for row in told if row["id"] == gap_id)
    assert outcomes == ["does not wait", "goes on at 5"]
    (position,) = ledger_rows.rows("SELECT epoch, next_offset FROM positions")
    assert position == {"epoch": 1, "next_offset": 5}
    assert operator.ask("positions", "accept-gap", gap_id + 1, "--yes", code=1) == [
        {"id": gap_id + 1, "outcome": "does not wait"}
    ]


# rewind


def test_after_a_rewind_what_is_known_is_not_mailed_and_what_is_not_is_held(
    replicas: Replicas, topic: Topic, sink: Sink, ledger_rows: Ledger, operator: Operator
) -> None:
    """On a whole ledger under a replica that runs: nothing goes out but what is new."""
    at = datetime.now(UTC) - timedelta(hours=3)
    old = in_one(0, [dated(order(f"old-{n}"), at) for n in range(5)])
    recent = in_one(0, [dated(each, at + timedelta(hours=1)) for each in orders(10)])
    ledger_rows.take_in(topic, old + recent)
    ledger_rows.change("DELETE FROM deliveries WHERE order_id IN ('order-3', 'order-old-1')")
    ledger_rows.change(
        "UPDATE deliveries SET state = 'DEAD', event = 'x' WHERE order_id = 'order-4'"
    )
    replica = replicas.start()
    replica.wait_until_placed()
    moment = (at + timedelta(minutes=30)).isoformat()
    before = ledger_rows.everything()
    dry = operator.run("positions", "rewind", "--to", moment, "--dry-run")
    assert (dry.returncode, "partition 0: from 5 on, HELD below 15" in dry.stderr) == (0, True)
    assert operator.run("positions", "rewind", "--to", moment).returncode == 2
    after = ledger_rows.everything()
    assert {**after, "replicas": []} == {**before, "replicas": []}

    told = operator.ask("positions", "rewind", "--to", moment, "--partition", 0, "--yes")

    assert (told["positions"][0]["to"], told["held"]) == (5, 0)
    assert ledger_rows.positions()[0] == 5
    topic.send(in_one(0, [order("new")]))
    wait_for(lambda: ledger_rows.mail("order-new").get("state"), lambda state: state == "SENT")
    assert ledger_rows.states() == {"SENT": 13, "HELD": 1, "DEAD": 1}
    assert ledger_rows.mail("order-3")["reason"] == "taken in after a rewind"
    assert ledger_rows.mail("order-old-1") == {}
    assert mailed(sink) == {"order-new": 1}
    operator.ask("mails", "retry", "order-3", "--yes")
    wait_for(lambda: mailed(sink), lambda mails: mails == {"order-new": 1, "order-3": 1})


@pytest.mark.fault("F-L5")
def test_a_ledger_that_is_behind_the_group_holds_what_may_have_been_sent(
    replicas: Replicas, topic: Topic, sink: Sink, ledger_rows: Ledger, operator: Operator
) -> None:
    """A replica refuses it; after the rewind one starts, and mails only what is new."""
    ledger_rows.take_in(topic, in_one(0, orders(6)))
    ledger_rows.change("DELETE FROM deliveries WHERE order_id IN ('order-4', 'order-5')")
    ledger_rows.change("UPDATE positions SET next_offset = 4 WHERE partition = 0")
    now = datetime.now(UTC)
    for state in ("RETRY", "UNKNOWN", "SENDING", "DEAD", "HELD"):
        due = {"due_at": now} if state in ("RETRY", "UNKNOWN") else {}
        ledger_rows.put(f"order-{state}", state, reason="before", **due)
    topic.rewind(6)
    refused: Replica = replicas.start()
    assert refused.process.wait(30) == 3
    assert "positions rewind" in refused.output()
    dry = operator.run("positions", "rewind", "--dry-run")
    assert "what is due now would be HELD" in dry.stderr

    told = operator.ask("positions", "rewind", "--yes")

    assert told["held"] == 3
    replica = replicas.start()
    topic.send(in_one(0, [order("new")]))
    wait_until_sent(ledger_rows, 5, replica)
    assert ledger_rows.states() == {"SENT": 5, "HELD": 6, "DEAD": 1}
    assert mailed(sink) == {"order-new": 1}
    held = ledger_rows.rows("SELECT order_id, reason, due_at FROM deliveries WHERE state = 'HELD'")
    assert {row["order_id"]: row["reason"] for row in held} == {
        **dict.fromkeys(("order-RETRY", "order-UNKNOWN", "order-SENDING"), "held by a rewind"),
        **dict.fromkeys(("order-4", "order-5"), "taken in after a rewind"),
        "order-HELD": "before",
    }
    operator.ask("mails", "settle", "order-4", "--sent", "--why", "in the relay's log", "--yes")
    operator.ask("mails", "settle", "order-5", "--send", "--why", "not in it", "--yes")
    wait_for(lambda: mailed(sink), lambda mails: mails == {"order-new": 1, "order-5": 1})


@pytest.mark.fault("F-L5")
def test_a_ledger_that_was_lost_is_begun_anew_with_what_may_have_been_sent_held(
    replicas: Replicas, topic: Topic, sink: Sink, ledger_rows: Ledger, operator: Operator
) -> None:
    """All that is in the topic, whatever the commits say. A dry run writes nothing."""
    topic.send(in_one(0, orders(6)))
    topic.rewind(0)
    topic.rewind(4)
    dry = operator.run("positions", "rewind", "--dry-run")
    assert (dry.returncode, "partition 0: from 0 on, HELD below 6" in dry.stderr) == (0, True)
    assert ledger_rows.rows("SELECT * FROM positions") == []

    operator.ask("positions", "rewind", "--yes")
    topic.send(in_one(0, [order("new"), order("newer")]))

    wait_until_sent(ledger_rows, 2, replicas.start())
    assert ledger_rows.states() == {"SENT": 2, "HELD": 6}
    assert mailed(sink) == {"order-new": 1, "order-newer": 1}


def test_a_rewind_never_goes_forward(topic: Topic, ledger_rows: Ledger, operator: Operator) -> None:
    """To a time that has not come it stays where it is; another cluster's ledger is refused."""
    topic.send(in_one(0, [dated(each, datetime.now(UTC)) for each in orders(6)]))
    ledger_rows.read_up_to(topic, {0: 2, 1: 0, 2: 0})
    operator.ask("positions", "rewind", "--to", "2099-01-01T00:00Z", "--yes")
    assert ledger_rows.positions() == {0: 2, 1: 0, 2: 0}
    assert operator.run("positions", "rewind", "--to", "2026-01-01T00:00", "--yes").returncode == 2
    ledger_rows.change("UPDATE positions SET cluster_id = 'another'")
    before = ledger_rows.everything()
    ended = operator.run("positions", "rewind", "--yes")
    assert (ended.returncode, "of the cluster another" in ended.stderr) == (3, True)
    assert ledger_rows.everything() == before


def test_a_hold_is_asked_for_where_no_commit_tells(
    topic: Topic, ledger_rows: Ledger, operator: Operator
) -> None:
    """As when the ledger was restored and the group's commits are gone too."""
    ledger_rows.take_in(topic, in_one(0, orders(1)))
    ledger_rows.put("order-due", "RETRY", due_at=datetime.now(UTC))
    operator.ask("positions", "rewind", "--yes")
    assert ledger_rows.mail("order-due")["state"] == "RETRY"
    told = operator.ask("positions", "rewind", "--hold-due", "--yes")
    assert (told["held"], ledger_rows.mail("order-due")["state"]) == (1, "HELD")
