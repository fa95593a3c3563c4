"""Orders against the events in the topic."""

import json
import math
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

import pytest
from confluent_kafka import Producer
from confluent_kafka.admin import (
    AdminClient,
    AlterConfigOpType,
    ConfigEntry,
    ConfigResource,
    ResourceType,
)
from sqlalchemy import Connection, Engine, insert
from uuid_utils.compat import uuid7

from order_service import events
from order_service.kafka import TOPIC, TOPIC_SETTINGS, Publisher, Topic
from order_service.models import Order, OutboxRow
from order_service.operate.output import EXIT_FOUND, EXIT_USAGE
from order_service.operate.reconcile import ASKED_IDS, SHOWN_IDS, Scan, compare
from order_service.relay import publish_batch
from order_service.settings import Settings

MANY = 2_500
RETENTION = timedelta(milliseconds=int(TOPIC_SETTINGS["retention.ms"]))
HOUR = timedelta(hours=1)

Query = Callable[..., Any]
Run = Callable[..., "subprocess.CompletedProcess[str]"]
Place = Callable[..., "Placed"]
Publish = Callable[[], None]
Write = Callable[..., None]


@dataclass(frozen=True)
class Placed:
    """An order whose rows were inserted, and its event."""

    id: str
    event: events.Event


@dataclass(frozen=True)
class Outcome:
    """What `reconcile` ended with and found."""

    code: int
    found: dict[str, Any]

    def __getattr__(self, name: str) -> Any:
        return self.found[name]


@pytest.fixture
def begun() -> datetime:
    """Give a time after all that earlier tests left in the topic."""
    time.sleep(0.005)
    return datetime.now(UTC)


@pytest.fixture
def reconcile(topic: Topic, command: Run, begun: datetime) -> Callable[..., Outcome]:
    """Give a function that reconciles what came since the test began, or another range."""

    def compare(since: datetime = begun, until: datetime | None = None) -> Outcome:
        options = ["--to", until.isoformat()] if until else []
        done = command("reconcile", "--from", since.isoformat(), *options, "--json")
        return Outcome(done.returncode, json.loads(done.stdout))

    return compare


@pytest.fixture
def place(engine: Engine, begun: datetime) -> Place:
    """Give a function that writes orders with their outbox rows, and returns the last one."""

    def write(*, ordered_at: datetime | None = None, count: int = 1, **columns: Any) -> Placed:
        orders, rows = [], []
        for _ in range(count):
            order = events.PlacedOrder(
                id=uuid7(),
                user_id="user-7",
                email="minji@example.com",
                locale="ko",
                currency="KRW",
                amount=Decimal(24000),
                ordered_at=ordered_at or datetime.now(UTC),
                items=[],
            )
            event = events.order_created(order, event_id=uuid7())
            orders.append(
                {
                    name: getattr(order, name)
                    for name in Order.__table__.columns.keys()  # noqa: SIM118 - no mapping
                }
            )
            rows.append(
                {
                    "id": event.id,
                    "aggregatetype": events.AGGREGATE_TYPE,
                    "aggregateid": event.key,
                    "type": events.TYPE,
                    "payload": event.value,
                    "headers": event.headers,
                    "occurred_at": event.occurred_at,
                    **columns,
                }
            )
        with engine.begin() as connection:
            connection.execute(insert(Order), orders)
            connection.execute(insert(OutboxRow), rows)
        return Placed(event.key, event)

    return write


@pytest.fixture
def publish(
    autocommit: Connection, publisher: Publisher, topic: Topic, query: Query
) -> Callable[[], None]:
    """Give a function that publishes all that waits, as the active relay does."""

    def all_batches() -> None:
        topic_id = topic.describe().id
        while query("SELECT FROM outbox WHERE state = 'INIT' LIMIT 1"):
            publish_batch(autocommit, publisher, topic_id=topic_id)
        query("UPDATE outbox SET state = 'COMPLETED' WHERE state = 'PUBLISHED'")

    return all_batches


@pytest.fixture
def write(settings: Settings, topic: Topic) -> Write:
    """Give a function that writes an event to the topic past the outbox."""
    producer = Producer(dict(settings.kafka))

    def send(event: events.Event, **changed: str) -> None:
        errors: list[Any] = []
        producer.produce(
            TOPIC,
            event.value,
            event.key,
            headers={**event.headers, **changed},
            timestamp=int(event.occurred_at.timestamp() * 1000),
            on_delivery=lambda error, _: errors.append(error),
        )
        producer.flush(10)
        assert errors == [None]

    return send


@pytest.fixture
def alter_retention(admin: AdminClient, topic: Topic) -> Iterator[Callable[[str], None]]:
    """Give a function that lets the topic keep its records for another time."""

    def alter(value: str) -> None:
        operation = AlterConfigOpType.SET
        entry = ConfigEntry("retention.ms", value, incremental_operation=operation)
        resource = ConfigResource(ResourceType.TOPIC, TOPIC, incremental_configs=[entry])
        admin.incremental_alter_configs([resource])[resource].result(10)

    yield alter
    alter(TOPIC_SETTINGS["retention.ms"])


NOTHING = {
    "orders": 0,
    "with_event": 0,
    "repeated_events": 0,
    "on_their_way": 0,
    "outside_retention": 0,
    "missing": [],
    "ghosts": [],
}


def test_where_all_is_there_nothing_is_named(
    place: Place, publish: Publish, reconcile: Callable[..., Outcome]
) -> None:
    """Every order has its event, and the command ends with 0."""
    place(count=7)
    publish()
    outcome = reconcile()
    assert (outcome.code, outcome.found) == (0, NOTHING | {"orders": 7, "with_event": 7})


def test_a_range_without_orders_is_no_fault(reconcile: Callable[..., Outcome]) -> None:
    """All counts are 0."""
    outcome = reconcile()
    assert (outcome.code, outcome.found) == (0, NOTHING)


def test_a_report_for_people_names_what_is_not_as_it_should_be(
    place: Place, publish: Publish, write: Write, command: Run, begun: datetime, query: Query
) -> None:
    """Counts first; then the orders without event and the events without order, twenty of each."""
    missing = place(state="COMPLETED").id
    place(count=SHOWN_IDS + 4, state="COMPLETED")
    ghost = place()
    publish()
    query("DELETE FROM orders WHERE id = :id", id=ghost.id)
    done = command("reconcile", "--from", begun.isoformat())
    lines = [line.split() for line in done.stdout.splitlines()]
    assert (done.returncode, lines[0], lines[7], lines[-1]) == (
        EXIT_FOUND,
        ["orders", "25"],
        ["missing", missing],
        ["ghost", ghost.id],
    )
    assert lines[-2] == ["missing", "and", "5", "more,", "see", "--json"]


def test_a_missing_event_is_named_and_mended(
    place: Place, publish: Publish, reconcile: Callable[..., Outcome], command: Run
) -> None:
    """What the topic has lost is published again by `outbox republish`, and all is there."""
    place(count=3)
    publish()
    lost = place(state="COMPLETED", topic_id="an earlier one", partition=0, offset=1).id
    before = reconcile()
    mended = command("outbox", "republish", lost)
    in_between = reconcile()
    publish()
    after = reconcile()
    assert (before.code, before.missing, before.with_event) == (EXIT_FOUND, [lost], 3)
    assert (mended.returncode, in_between.code, in_between.on_their_way) == (0, 0, 1)
    assert (after.code, after.with_event, after.missing) == (0, 4, [])


@pytest.mark.parametrize("state", ["INIT", "PUBLISHED"])
def test_what_is_on_its_way_is_not_missing(
    place: Place, reconcile: Callable[..., Outcome], state: str
) -> None:
    """The relay takes it there, and the read-back looks whether it is."""
    place(state=state)
    outcome = reconcile()
    assert (outcome.code, outcome.on_their_way, outcome.missing) == (0, 1, [])


def test_what_came_after_the_scan_is_not_missing(
    place: Place, topic: Topic, engine: Engine, begun: datetime, produce: Callable[..., None]
) -> None:
    """Seen in the topic beyond the end that was read up to, and before the one it has now."""
    described, ends = topic.describe(), bounds_of(topic)
    for _ in range(30):
        produce()
    partition = next(number for number, end in bounds_of(topic).items() if end > ends[number])
    beyond = bounds_of(topic)[partition]
    place(state="COMPLETED", topic_id=described.id, partition=partition, offset=ends[partition])
    read_past = place(
        state="COMPLETED", topic_id=described.id, partition=partition, offset=ends[partition] - 1
    )
    cut_off = place(state="COMPLETED", topic_id=described.id, partition=partition, offset=beyond)
    scan = Scan(described, ends, Counter(), -math.inf)
    report = compare(engine, topic, scan, begun, datetime.now(UTC))
    assert len(report.order_ids.on_their_way) == 1
    assert set(report.summary()["missing"]) == {read_past.id, cut_off.id}


def bounds_of(topic: Topic) -> dict[int, int]:
    """Return where each partition ends."""
    found = topic.bounds(range(topic.describe().partitions))
    return {number: bound.end for number, bound in found.items()}


def test_what_failed_is_missing(place: Place, reconcile: Callable[..., Outcome]) -> None:
    """No relay takes it there."""
    order_id = place(state="FAILED").id
    outcome = reconcile()
    assert (outcome.code, outcome.missing, outcome.on_their_way) == (EXIT_FOUND, [order_id], 0)


def test_an_order_without_an_outbox_row_is_missing(
    place: Place, query: Query, reconcile: Callable[..., Outcome]
) -> None:
    """Purged after 14 days, the row can say nothing; the topic can."""
    order_id = place().id
    query("DELETE FROM outbox")
    outcome = reconcile()
    assert (outcome.code, outcome.missing) == (EXIT_FOUND, [order_id])


def test_an_event_without_its_order_is_a_ghost(
    place: Place, publish: Publish, query: Query, reconcile: Callable[..., Outcome]
) -> None:
    """A database restored to an earlier time has lost what it had committed."""
    place(count=2)
    ghost = place().id
    publish()
    query("DELETE FROM orders WHERE id = :id", id=ghost)
    outcome = reconcile()
    assert (outcome.code, outcome.ghosts, outcome.orders) == (EXIT_FOUND, [ghost], 2)


@pytest.mark.parametrize(
    "changed",
    [
        {"ce_source": "/shipping"},
        {"ce_source": ""},
        {"ce_subject": "parcel-12"},
        {"ce_subject": "\N{SNOWMAN}"},
    ],
    ids=["of another source", "without source", "of no order", "not an id"],
)
def test_a_foreign_record_is_no_ghost(
    place: Place,
    write: Write,
    query: Query,
    reconcile: Callable[..., Outcome],
    changed: dict[str, str],
) -> None:
    """Others may write to the topic."""
    foreign = place()
    query("DELETE FROM orders")
    write(foreign.event, **changed)
    outcome = reconcile()
    assert (outcome.code, outcome.found) == (0, NOTHING)


def test_what_is_there_more_than_once_is_counted(
    place: Place, publish: Publish, write: Write, reconcile: Callable[..., Outcome]
) -> None:
    """At least once is the promise: repetitions are no fault."""
    place(count=2)
    placed = place()
    publish()
    for _ in range(3):
        write(placed.event)
    outcome = reconcile()
    assert (outcome.code, outcome.with_event, outcome.repeated_events) == (0, 3, 3)


def test_an_event_published_again_behind_later_ones_is_found(
    place: Place, publish: Publish, reconcile: Callable[..., Outcome], begun: datetime
) -> None:
    """Its record has its order's time, and lies behind records of later times."""
    time.sleep(0.05)
    late = datetime.now(UTC)
    time.sleep(0.05)
    place(count=20)
    publish()
    place(ordered_at=begun + (late - begun) / 2)
    publish()
    outcome = reconcile(until=late)
    assert (outcome.code, outcome.orders, outcome.with_event) == (0, 1, 1)


def test_an_event_of_an_order_outside_the_range_is_no_ghost(
    place: Place, write: Write, reconcile: Callable[..., Outcome], begun: datetime
) -> None:
    """An order whose record is of the same millisecond as --from, but whose time is before."""
    millisecond = begun.replace(microsecond=begun.microsecond // 1000 * 1000) + timedelta(
        milliseconds=1
    )
    placed = place(ordered_at=millisecond)
    write(placed.event)
    outcome = reconcile(since=millisecond + timedelta(microseconds=1))
    assert (outcome.code, outcome.orders, outcome.ghosts) == (0, 0, [])


def test_the_range_is_half_open(
    place: Place, publish: Publish, reconcile: Callable[..., Outcome], begun: datetime
) -> None:
    """An order placed at --from is in, one at --to is not."""
    place(ordered_at=begun, count=2)
    place(ordered_at=begun + HOUR / 2)
    publish()
    outcome = reconcile(until=begun + HOUR / 2)
    assert (outcome.code, outcome.orders, outcome.with_event) == (0, 2, 2)


def test_orders_older_than_the_topic_keeps_are_only_counted(
    place: Place, reconcile: Callable[..., Outcome], begun: datetime
) -> None:
    """Their events may be gone; those the topic should still have are named."""
    place(ordered_at=begun - RETENTION - HOUR, state="COMPLETED")
    kept = place(ordered_at=begun - RETENTION + HOUR, state="COMPLETED").id
    outcome = reconcile(since=begun - RETENTION - 2 * HOUR)
    assert (outcome.code, outcome.outside_retention, outcome.missing) == (EXIT_FOUND, 1, [kept])
    older = reconcile(since=begun - RETENTION - 2 * HOUR, until=begun - RETENTION)
    assert (older.code, older.outside_retention) == (0, 1)


@pytest.mark.parametrize("retention", ["-1", str(2**63 - 1)], ids=["no end", "longest"])
def test_what_is_kept_for_ever_is_never_outside(
    alter_retention: Callable[[str], None],
    place: Place,
    reconcile: Callable[..., Outcome],
    begun: datetime,
    retention: str,
) -> None:
    """Where the topic forgets nothing, an old event that is not there is missing."""
    alter_retention(retention)
    order_id = place(ordered_at=begun - 2 * RETENTION, state="COMPLETED").id
    outcome = reconcile(since=begun - 2 * RETENTION - HOUR, until=begun - 2 * RETENTION + HOUR)
    assert (outcome.code, outcome.missing) == (EXIT_FOUND, [order_id])


def test_more_orders_than_one_question_takes(
    place: Place, publish: Publish, query: Query, reconcile: Callable[..., Outcome]
) -> None:
    """Missing events and ghosts in the thousands are asked for in parts, and all are named."""
    place(count=MANY)
    publish()
    lost = place(count=ASKED_IDS + 1, state="FAILED").id
    query("DELETE FROM orders WHERE id IN (SELECT id FROM orders ORDER BY id LIMIT 1100)")
    outcome = reconcile()
    assert (outcome.code, outcome.orders, outcome.with_event) == (
        EXIT_FOUND,
        MANY + ASKED_IDS + 1 - 1100,
        MANY - 1100,
    )
    assert (len(outcome.ghosts), len(outcome.missing)) == (1100, ASKED_IDS + 1)
    assert lost in outcome.missing


@pytest.mark.parametrize(
    ("since", "until", "complaint"),
    [
        ("2026-11-01T00:00", "2026-11-02T00:00Z", "names no offset from UTC"),
        ("2026-11-01T00:00Z", "2026-11-02", "names no offset from UTC"),
        ("2026-11-02T00:00Z", "2026-11-01T00:00Z", "--from must be before --to"),
        ("2026-11-01T00:00Z", "2026-11-01T09:00+09:00", "--from must be before --to"),
        ("9999-01-01T00:00Z", None, "--from must be before --to"),
        ("yesterday", None, "Invalid isoformat string: 'yesterday'"),
        ("2026-13-01T00:00Z", None, "month must be in 1..12"),
    ],
)
def test_a_range_that_is_none_is_exit_2(
    command: Run, since: str, until: str | None, complaint: str
) -> None:
    """A time without its offset from UTC would be another one elsewhere."""
    options = ["--to", until] if until else []
    refused = command("reconcile", "--from", since, *options)
    assert (refused.returncode, complaint in refused.stderr) == (EXIT_USAGE, True)


def test_a_range_has_a_beginning(command: Run) -> None:
    """Nobody reads 63 days of events by accident."""
    assert command("reconcile").returncode == EXIT_USAGE


def test_offsets_from_utc_are_the_same_moment(
    place: Place, publish: Publish, command: Run, begun: datetime
) -> None:
    """A range told in Seoul's time is the range told in UTC."""
    place()
    publish()
    seoul = datetime.fromisoformat("2000-01-01T00:00+09:00").tzinfo
    done = command("reconcile", "--from", begun.astimezone(seoul).isoformat(), "--json")
    assert json.loads(done.stdout)["with_event"] == 1


@pytest.mark.parametrize("since", ["1900-01-01T00:00Z", "1969-12-31T23:59:59.999Z"])
def test_a_range_may_begin_before_kafka_counts(
    place: Place, publish: Publish, command: Run, since: str
) -> None:
    """From the very beginning is a range too: what is there is found."""
    placed = place()
    publish()
    done = command("reconcile", "--from", since, "--json")
    assert (placed.id in done.stdout, done.stderr) == (False, "")
    assert json.loads(done.stdout)["with_event"] == 1


def test_with_ids_every_order_is_in_one_list(
    place: Place, publish: Publish, command: Run, begun: datetime
) -> None:
    """Beside what is told without; whoever joins it with another service misses none."""
    old = place(ordered_at=begun - RETENTION - HOUR, state="COMPLETED").id
    there = place().id
    publish()
    waiting, failed = place().id, place(state="FAILED").id
    arguments = ("reconcile", "--from", (begun - RETENTION - 2 * HOUR).isoformat(), "--json")
    with_ids, without = (
        json.loads(command(*arguments, *option).stdout) for option in (("--ids",), ())
    )
    lists = with_ids.pop("order_ids")
    assert lists == {
        "with_event": [there],
        "on_their_way": [waiting],
        "outside_retention": [old],
        "missing": [failed],
    }
    assert (with_ids, without["orders"]) == (without, 4)


def test_ids_are_for_scripts(command: Run, begun: datetime) -> None:
    """Without --json they would fill the screen: exit 2."""
    refused = command("reconcile", "--from", begun.isoformat(), "--ids")
    assert (refused.returncode, refused.stdout) == (EXIT_USAGE, "")
