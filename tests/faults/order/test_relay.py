"""Faults of relay, read-back and sweep, at each of their steps (faults.toml, F-O*)."""

import json
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from confluent_kafka import Consumer, KafkaException, TopicPartition

from deploy.embedded.ports import HOST
from tests.support import backlog
from tests.support.order_side import FORWARD, PARTITIONS, TOPIC, OrderSide, Seen, order_ids
from tests.support.proxy import Reset
from tests.support.service import Service

REPOSITORY = Path(__file__).parents[3]
ORDER_PYTHON = REPOSITORY / ".venv/order/bin/python"
OUTBOX_PLANS = REPOSITORY / "tests/support/outbox_plans.py"
ORDERS = 50
TOO_LARGE = 2_000_000
POLL_SECONDS = 1.0
RETRY_SECONDS = 1.0
LOCK_TIMEOUT_SECONDS = 2.0
SWEEP_SECONDS = 5.0
TAKEOVER_SECONDS = 5.0
SNAPSHOT_SECONDS = 10.0
COMPLETED_ROWS = 100_000
MOST_MILLISECONDS = 50.0
EXPLAIN_SECONDS = 60.0
# Held until it is killed.
FOR_EVER = "sleep:600000"

# Reports and records have come and are not written yet; a mark would be noted.
HELD = ("relay.after_ack=sleep:5000@1", "rb.after_poll=sleep:5000@1", "relay.after_mark=sleep:0")
HELD_AT = {"relay.after_ack", "rb.after_poll"}

Moves = Callable[[], Counter[tuple[str, str]]]


@pytest.fixture
def moves(side: OrderSide) -> Iterator[Moves]:
    """Give the ways that states went."""
    with side.moves() as counted:
        yield counted


@pytest.mark.fault("F-O1")
def test_a_relay_killed_after_its_claim_published_nothing(side: OrderSide) -> None:
    """Killed before it produced, it leaves the rows to the next one: each event is there once."""
    placed = side.add_orders(ORDERS)
    run_until_killed(side, "relay.after_claim=kill")
    finish(side)
    assert order_ids(side.records()) == dict.fromkeys(placed, 1)


@pytest.mark.fault("F-O2")
def test_a_relay_killed_while_it_produces(side: OrderSide, moves: Moves) -> None:
    """What it had handed over by then may be there twice, the rest is there once."""
    placed = side.add_orders(ORDERS)
    run_until_killed(side, f"relay.after_produce=kill@{ORDERS // 2}")
    finish(side)
    assert set(moves()) <= FORWARD
    assert len(twice(side.records(), of=placed)) <= ORDERS // 2


@pytest.mark.fault("F-O2")
def test_a_relay_killed_before_it_heard_of_its_batch(side: OrderSide, moves: Moves) -> None:
    """All is in the topic and no row says so: the next one publishes one batch twice, no more."""
    placed = side.add_orders(ORDERS)
    held = (f"relay.after_produce={FOR_EVER}@{ORDERS}", f"rb.after_poll={FOR_EVER}")
    with side.running("relay", *held, is_waited_for=False) as relay:
        side.wait_for(lambda: "relay.after_produce" in names(relay))
        side.wait_for(lambda: order_ids(side.records()) == dict.fromkeys(placed, 1))
        assert side.states() == {"INIT": ORDERS}
        relay.kill()
    finish(side)
    assert set(moves()) <= FORWARD
    assert len(twice(side.records(), of=placed)) <= ORDERS


@pytest.mark.fault("F-O3")
def test_a_relay_killed_between_report_and_mark(side: OrderSide, moves: Moves) -> None:
    """The next one completes from INIT what it sees first; what it selects first is there twice."""
    placed = side.add_orders(ORDERS)
    run_until_killed(side, "relay.after_ack=kill", f"rb.after_poll={FOR_EVER}")
    assert side.states() == {"INIT": ORDERS}
    seen_first = placed[: ORDERS // 2]
    side.sql(
        "UPDATE outbox SET due_at = now() + interval '1 hour' WHERE aggregateid = ANY(%s)",
        seen_first,
    )
    finish(side)
    assert set(moves()) <= {("INIT", "INIT"), *FORWARD}
    assert moves()["INIT", "COMPLETED"] >= len(seen_first)
    assert twice(side.records(), of=placed) <= set(placed) - set(seen_first)


@pytest.mark.fault("F-O4")
def test_a_relay_killed_after_its_mark(side: OrderSide, moves: Moves) -> None:
    """Its rows say where they are: the next one publishes nothing, and reads them back."""
    placed = publish_without_reading(side)
    with side.running("relay") as relay:
        side.wait_until_completed()
        assert relay.metric("order_events_published_total", outcome="confirmed") == 0
        relay.kill()
    assert moves() == {("INIT", "PUBLISHED"): ORDERS, ("PUBLISHED", "COMPLETED"): ORDERS}
    assert order_ids(side.records()) == dict.fromkeys(placed, 1)


@pytest.mark.fault("F-O5")
def test_an_event_seen_before_its_mark(side: OrderSide, moves: Moves) -> None:
    """INIT becomes COMPLETED, with both times; the mark that comes seconds late is nothing."""
    placed = side.add_orders(ORDERS)
    with side.running("relay", "relay.after_ack=sleep:6000", "relay.after_mark=sleep:0") as relay:
        side.wait_until_completed()
        before = rows(side)
        assert names(relay) == ["relay.after_ack"]
        side.wait_for(lambda: names(relay) == ["relay.after_ack", "relay.after_mark"])
        relay.kill()
    assert rows(side) == before
    assert moves() == {("INIT", "COMPLETED"): ORDERS}
    # Both were written by one statement.
    assert all(
        abs(row["published_at"] - row["completed_at"]) < timedelta(seconds=1) for row in before
    )
    assert order_ids(side.records()) == dict.fromkeys(placed, 1)


@pytest.mark.fault("F-O6")
@pytest.mark.parametrize("failpoint", ["rb.after_complete", "rb.after_commit"])
def test_a_read_back_killed_around_its_commit(
    side: OrderSide, moves: Moves, failpoint: str
) -> None:
    """COMPLETED and position stand or fall together, before Kafka hears; the next one goes on."""
    placed = publish_without_reading(side)
    before = positions(side)
    run_until_killed(side, f"{failpoint}=kill")
    moved = sum(positions(side).values()) - sum(before.values())
    assert side.states()["COMPLETED"] == moved
    assert (moved > 0) == (failpoint == "rb.after_commit")
    finish(side)
    assert moves() == {("INIT", "PUBLISHED"): ORDERS, ("PUBLISHED", "COMPLETED"): ORDERS}
    assert order_ids(side.records()) == dict.fromkeys(placed, 1)
    assert_nothing_committed_ahead(side)


@pytest.mark.fault("F-O7")
def test_a_read_back_killed_with_records_in_hand(side: OrderSide, moves: Moves) -> None:
    """What it had read and not written is read again; neither position is beyond it."""
    placed = publish_without_reading(side)
    before = positions(side)
    run_until_killed(side, "rb.after_poll=kill")
    assert positions(side) == before
    assert side.states() == {"PUBLISHED": ORDERS}
    finish(side)
    assert moves() == {("INIT", "PUBLISHED"): ORDERS, ("PUBLISHED", "COMPLETED"): ORDERS}
    assert order_ids(side.records()) == dict.fromkeys(placed, 1)
    assert_nothing_committed_ahead(side)


@pytest.mark.fault("F-O8")
def test_a_read_back_that_stands_still_is_lag(side: OrderSide, moves: Moves) -> None:
    """Two sweeps find rows that were published and not read: they wait, and the metrics show it."""
    placed = side.add_orders(ORDERS)
    held = f"rb.after_poll=sleep:{SWEEP_SECONDS * 1000 + 500:.0f}"
    with side.running("relay", held, "sweep.before_reset=sleep:0") as relay:
        side.wait_for(lambda: relay.metric("order_outbox_events", state="PUBLISHED") == ORDERS)
        side.wait_for(lambda: relay.metric("order_outbox_oldest_age_seconds") > 0)
        while names(relay).count("sweep.before_reset") < 2:
            # Published while the read-back stands still: a sweep looks before they are read.
            placed += side.add_orders(1)
            time.sleep(POLL_SECONDS)
        assert names(relay).count("rb.after_poll") >= 2
        assert relay.metric("order_events_lost_total", state="INIT") == 0
        # One that was produced and not yet marked would be there twice.
        side.wait_for(lambda: side.states()["INIT"] == 0)
        relay.kill()
    finish(side)
    assert set(moves()) == {("INIT", "PUBLISHED"), ("PUBLISHED", "COMPLETED")}
    assert order_ids(side.records()) == dict.fromkeys(placed, 1)


@pytest.mark.fault("F-O9")
def test_a_poller_by_id_loses_what_the_relay_does_not(side: OrderSide) -> None:
    """A lower id commits after a higher one was taken: the relay finds it, `id > last` never."""
    polled: list[str] = []
    last = "00000000-0000-0000-0000-000000000000"

    def poll() -> None:
        nonlocal last
        for event_id, order_id in side.sql(
            "SELECT id::text, aggregateid FROM outbox WHERE id > %s ORDER BY id", last
        ):
            polled.append(order_id)
            last = event_id

    with side.running("relay") as relay, side.session() as slow:
        (late,) = backlog.insert(slow, 1)
        (quick,) = side.add_orders(1)
        side.wait_until_completed()
        poll()
        slow.commit()
        side.wait_for(lambda: side.states() == {"COMPLETED": 2})
        poll()
        (later,) = side.add_orders(1)
        side.wait_for(lambda: side.states() == {"COMPLETED": 3})
        poll()
        relay.kill()
    assert polled == [quick, later]
    assert side.sql("SELECT aggregateid FROM outbox ORDER BY id") == [(late,), (quick,), (later,)]
    assert order_ids(side.records()) == dict.fromkeys((late, quick, later), 1)


@pytest.mark.fault("F-O12")
def test_a_snapshot_held_for_long_delays_nothing(side: OrderSide) -> None:
    """Events flow while somebody is idle in a transaction, and the relay says for how long."""
    placed: list[str] = []
    with side.session() as idle, idle.cursor() as cursor:
        idle.set_session(isolation_level="REPEATABLE READ")
        cursor.execute("SELECT count(*) FROM outbox")
        began_at = time.monotonic()
        with side.running("relay") as relay:
            # Another one needs a second to start, and measures first of all.
            while time.monotonic() - began_at < SNAPSHOT_SECONDS - 1:
                placed += side.add_orders(ORDERS)
                side.wait_until_completed(seconds=10.0)
            relay.kill()
        pid = idle.get_backend_pid()
        (state,) = side.sql(
            "SELECT state, backend_xmin IS NOT NULL FROM pg_stat_activity WHERE pid = %s", pid
        )
        assert state == ("idle in transaction", True)
        with side.running("relay") as relay:
            side.wait_for(
                lambda: (
                    relay.metric("order_database_oldest_snapshot_age_seconds") >= SNAPSHOT_SECONDS
                )
            )
            relay.kill()
        cursor.execute("SELECT count(*) FROM outbox")
        assert cursor.fetchone() == (0,)
    assert order_ids(side.records()) == dict.fromkeys(placed, 1)


@pytest.mark.fault("F-O12")
def test_a_row_that_somebody_holds_waits_and_delays_no_other(side: OrderSide) -> None:
    """A transaction holds one row of a batch: the others are COMPLETED, and it follows, once."""
    placed = side.add_orders(ORDERS)
    with side.session() as holder, holder.cursor() as cursor:
        cursor.execute("SELECT FROM outbox WHERE aggregateid = %s FOR UPDATE", [placed[0]])
        with side.running("relay") as relay:
            side.wait_for(lambda: side.states() == {"COMPLETED": ORDERS - 1, "INIT": 1})
            time.sleep(LOCK_TIMEOUT_SECONDS + RETRY_SECONDS)
            assert order_ids(side.records()) == dict.fromkeys(placed[1:], 1)
            assert relay.logged("relay.disconnected") == []
            holder.rollback()
            side.wait_until_completed()
    assert order_ids(side.records()) == dict.fromkeys(placed, 1)


@pytest.mark.fault("F-O13")
def test_a_large_outbox_is_selected_by_its_small_indexes(side: OrderSide) -> None:
    """Beside 100,000 COMPLETED rows every statement of relay and sweep reads only the others."""
    side.sql(
        "INSERT INTO outbox (id, aggregatetype, aggregateid, type, payload, headers, occurred_at,"
        ' state, topic_id, partition, "offset", published_at, completed_at)'
        " SELECT gen_random_uuid(), 'order', n, 'order.created.v1',"
        " decode(repeat('00', 700), 'hex'), '{}', now(), 'COMPLETED', 'earlier', 0, n, now(), now()"
        " FROM generate_series(1, %s) AS n",
        COMPLETED_ROWS,
    )
    side.add_orders(2 * ORDERS)
    side.sql(
        "UPDATE outbox SET state = 'PUBLISHED', topic_id = 'earlier', partition = 0, \"offset\" = 1"
        " WHERE id IN (SELECT id FROM outbox WHERE state = 'INIT' ORDER BY id LIMIT %s)",
        ORDERS,
    )
    assert side.states() == {"COMPLETED": COMPLETED_ROWS, "INIT": ORDERS, "PUBLISHED": ORDERS}
    side.sql("ANALYZE outbox")
    try:
        done = subprocess.run(
            [ORDER_PYTHON, OUTBOX_PLANS],
            env=side.environment,
            capture_output=True,
            text=True,
            timeout=EXPLAIN_SECONDS,
            check=True,
        )
    finally:
        side.sql("TRUNCATE outbox")
    plans = json.loads(done.stdout)
    note("slowest statement, ms", max(each["milliseconds"] for each in plans.values()))
    assert all(each["milliseconds"] < MOST_MILLISECONDS for each in plans.values()), plans
    assert all("outbox" not in each["scanned"] for each in plans.values()), plans
    assert plans["select_init"]["indexes"] == ["outbox_init"]
    assert plans["select_published"]["indexes"] == ["outbox_published"]
    assert plans["backlog"]["indexes"] == ["outbox_failed", "outbox_init", "outbox_published"]


@pytest.mark.fault("F-O14")
def test_rows_that_change_under_a_sweep_are_left_alone(side: OrderSide, moves: Moves) -> None:
    """Found lost, then published anew before the sweep says so: only the others are sent back."""
    placed = side.add_orders(ORDERS)
    changed, unchanged = placed[: ORDERS // 2], placed[ORDERS // 2 :]
    side.sql(
        "UPDATE outbox SET state = 'PUBLISHED', topic_id = position.topic_id,"
        ' partition = position.partition, "offset" = position.next_offset + 1000'
        " FROM readback_positions AS position WHERE position.partition = 0"
    )
    with side.running("relay", "sweep.before_reset=sleep:6000@1") as relay:
        side.wait_for(lambda: names(relay))
        side.sql("UPDATE outbox SET state = 'INIT' WHERE aggregateid = ANY(%s)", changed)
        side.wait_for(lambda: moves()["INIT", "PUBLISHED"] == ORDERS + len(changed))
        assert len(relay.logged("event.lost")) == 0
        side.wait_for(lambda: len(relay.logged("event.lost")) == len(unchanged))
        side.sql("UPDATE outbox SET due_at = now() WHERE state = 'INIT'")
        side.wait_until_completed()
        assert len(relay.logged("event.lost")) == len(unchanged)
        relay.kill()
    assert moves()["PUBLISHED", "INIT"] == ORDERS
    assert order_ids(side.records()) == dict.fromkeys(placed, 1)


@pytest.mark.fault("F-O15")
def test_an_event_too_large_fails_alone_and_loudly(side: OrderSide, moves: Moves) -> None:
    """It is FAILED with its reason, in metrics and log; its 49 neighbours are in the topic."""
    placed = side.add_orders(ORDERS // 2)
    (too_large,) = side.add_orders(1, padding_bytes=TOO_LARGE)
    placed += side.add_orders(ORDERS // 2 - 1)
    with side.running("relay") as relay:
        side.wait_for(lambda: side.states() == {"COMPLETED": ORDERS - 1, "FAILED": 1})
        side.wait_for(lambda: relay.metric("order_outbox_events", state="FAILED") == 1)
        assert relay.metric("order_events_published_total", outcome="refused") == 1
        (refused,) = relay.logged("event.refused")
        relay.kill()
    ((event_id, order_id, reason),) = side.sql(
        "SELECT id::text, aggregateid, reason FROM outbox WHERE state = 'FAILED'"
    )
    assert (refused["event_id"], order_id, refused["reason"]) == (event_id, too_large, reason)
    assert "too large" in reason
    assert set(moves()) <= {("INIT", "FAILED"), *FORWARD}
    assert order_ids(side.records()) == dict.fromkeys(placed, 1)


@pytest.mark.fault("F-O16")
def test_a_database_away_when_the_reports_come(side: OrderSide, moves: Moves) -> None:
    """Relay and read-back both lose what they hold; when it is back, no row stays behind."""
    placed = side.add_orders(ORDERS)
    with side.running("relay", *HELD) as relay:
        side.wait_for(lambda: set(names(relay)) == HELD_AT)
        killed_pid = side.stack.part("order-db").pid
        with without_database(side):
            assert set(names(relay)) == HELD_AT
            side.wait_for(lambda: relay.logged("relay.disconnected"))
            side.wait_for(lambda: relay.logged("readback.interrupted"))
            assert not relay.is_ready()
            assert relay.is_live()
        assert side.stack.part("order-db").pid != killed_pid
        side.wait_until_completed()
        assert relay.part.is_running
    assert set(moves()) <= FORWARD
    assert len(twice(side.records(), of=placed)) <= ORDERS


@pytest.mark.fault("F-O16")
def test_a_database_link_cut_when_the_reports_come(side: OrderSide, moves: Moves) -> None:
    """The same with its sessions reset: it goes on within seconds, in the same process."""
    placed = side.add_orders(ORDERS)
    resets = side.database.resets
    with side.running("relay", *HELD) as relay:
        side.wait_for(lambda: set(names(relay)) == HELD_AT)
        side.database.set(Reset())
        assert set(names(relay)) == HELD_AT
        assert side.database.resets > resets
        side.wait_until_completed()
        # The read-back may complete what the relay, on its lost session, has not yet missed.
        side.wait_for(lambda: relay.logged("relay.disconnected"))
    assert set(moves()) <= FORWARD
    assert len(twice(side.records(), of=placed)) <= ORDERS


@pytest.mark.fault("F-O17")
def test_orders_that_nobody_notifies_of_are_polled(side: OrderSide) -> None:
    """Neither a session that is never notified nor one that was ended delays them for long."""
    placed: list[str] = []
    waited: list[float] = []
    with side.running("relay", PGAPPNAME="listening") as relay:
        for _ in range(2):
            placed += side.add_orders(1)
            side.wait_until_completed()
        waited = seconds_until_published(side)
        assert side.active_relay() == "listening"
        lose_session(side, "listening")
        placed += side.add_orders(1)
        side.wait_until_completed()
        assert relay.logged("relay.disconnected")
        assert max(seconds_until_published(side)) < TAKEOVER_SECONDS
    note("polled after", max(waited))
    # Somebody woken takes milliseconds.
    assert max(waited) > 0.1
    assert min(waited) < POLL_SECONDS + 1
    assert order_ids(side.records()) == dict.fromkeys(placed, 1)


def note(what: str, figure: float) -> None:
    """Print a figure; `pytest -s` shows it."""
    print(f"{what}: {figure:.2f}")  # noqa: T201


def names(service: Service) -> list[str]:
    """Return which failpoints acted, in their order."""
    return [hit.name for hit in service.hits]


def run_until_killed(side: OrderSide, *failpoints: str) -> None:
    """Run a relay that the first of its failpoints kills; see that it did, and what it left."""
    with side.running("relay", *failpoints, is_waited_for=False) as relay:
        assert relay.wait_for_end() == -signal.SIGKILL
        # Not the last one: the read-back's thread goes on until the signal arrives.
        killed_at = failpoints[0].partition("=")[0]
        assert (killed_at, "kill") in {(hit.name, hit.action) for hit in relay.hits}
    assert_nothing_committed_ahead(side)


def finish(side: OrderSide) -> None:
    """Run a relay until it has completed every event; kill it, for a graceful end takes longer."""
    with side.running("relay", is_waited_for=False) as relay:
        side.wait_until_completed()
        relay.kill()


def publish_without_reading(side: OrderSide) -> list[str]:
    """Let a relay publish orders and mark them, and die before it has read any of them back."""
    placed = side.add_orders(ORDERS)
    run_until_killed(side, "relay.after_mark=kill", f"rb.after_poll={FOR_EVER}")
    assert side.states() == {"PUBLISHED": ORDERS}
    return placed


def twice(records: list[Seen], *, of: list[str]) -> set[str]:
    """Return who is in the topic twice; nobody is missing, nobody is there more often."""
    counts = order_ids(records)
    assert set(counts) == set(of)
    assert max(counts.values()) <= 2
    assert len({(record.order_id, record.event_id) for record in records}) == len(of)
    found = {order_id for order_id, count in counts.items() if count == 2}
    note("twice in the topic", len(found))
    return found


def rows(side: OrderSide) -> list[dict[str, Any]]:
    """Return the outbox as it is, without the bytes."""
    columns = ("aggregateid", "state", "partition", "offset", "published_at", "completed_at")
    chosen = ", ".join(f'"{column}"' for column in columns)
    found = side.sql(f"SELECT {chosen} FROM outbox ORDER BY id")
    return [dict(zip(columns, row, strict=True)) for row in found]


def positions(side: OrderSide) -> dict[int, int]:
    """Return the read-back's position in each partition."""
    return dict(side.sql("SELECT partition, next_offset FROM readback_positions"))


def assert_nothing_committed_ahead(side: OrderSide) -> None:
    """Kafka's offsets of the group are at or behind the positions, which alone count."""
    committed: dict[int, int] = {}
    properties = {"bootstrap.servers": f"{HOST}:{side.kafka.port}", "group.id": "order-outbox"}
    with closing(Consumer(properties)) as consumer:

        def ask() -> bool:
            # A broker that has just come up does not know yet who keeps the offsets.
            with suppress(KafkaException):
                asked = [TopicPartition(TOPIC, partition) for partition in PARTITIONS]
                committed.update(
                    (each.partition, each.offset) for each in consumer.committed(asked, 10.0)
                )
            return bool(committed)

        side.wait_for(ask)
    reached = positions(side)
    assert {
        partition for partition in PARTITIONS if committed[partition] > reached[partition]
    } == set()


def seconds_until_published(side: OrderSide) -> list[float]:
    """Return how long each event waited for its delivery report."""
    waited = side.sql("SELECT extract(epoch FROM published_at - occurred_at) FROM outbox")
    return [float(seconds) for (seconds,) in waited]


def lose_session(side: OrderSide, name: str) -> None:
    """End the session with which this relay holds the lock."""
    ended = side.sql(
        "SELECT pg_terminate_backend(pid) FROM pg_locks JOIN pg_stat_activity USING (pid)"
        " WHERE locktype = 'advisory' AND objsubid = 2 AND granted AND application_name = %s",
        name,
    )
    assert ended == [(True,)]


@contextmanager
def without_database(side: OrderSide) -> Iterator[None]:
    """Crash the order database, and start it again when the block ends."""
    side.stack.kill("order-db", restart=False)
    try:
        yield
    finally:
        side.stack.start("order-db")
