"""What the read-back, the sweep and the purge make of a log and a table with gaps."""

import threading
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import pytest
from confluent_kafka import Message, TopicPartition
from confluent_kafka.admin import AdminClient
from prometheus_client import REGISTRY
from sqlalchemy import Connection, Engine
from structlog.testing import capture_logs
from uuid_utils.compat import uuid7

from order_service import events, outbox, readback
from order_service.kafka import DESCRIBE_SECONDS, TOPIC, Topic
from order_service.readback import ReadBack
from order_service.settings import Settings

DAY = timedelta(days=1)
REDESCRIBED_SECONDS = 15.0

AddEvent = Callable[..., UUID]
RowOf = Callable[[UUID], Any]
Query = Callable[..., Any]
WaitUntil = Callable[..., Any]
Ends = Callable[[], dict[int, int]]
RecordsSince = Callable[[Mapping[int, int]], list[Message]]
StatesOf = Callable[[Iterable[UUID]], set[tuple[str, int]]]
StartRelay = Callable[..., tuple[threading.Event, "Future[None]"]]

pytestmark = pytest.mark.usefixtures("caught_up")


@pytest.fixture
def reading(make_readback: Callable[[Topic], ReadBack], settings: Settings) -> ReadBack:
    """Give a read-back that does not run yet."""
    return make_readback(Topic(settings.kafka))


@pytest.fixture
def positions(engine: Engine, topic: Topic) -> Callable[[], dict[int, int]]:
    """Give a function that tells up to where each partition was read."""

    def stored() -> dict[int, int]:
        with engine.begin() as connection:
            return outbox.positions(connection, topic_id=topic.describe().id)

    return stored


@pytest.fixture
def read_all(
    reading: ReadBack,
    positions: Callable[[], dict[int, int]],
    ends: Ends,
    wait_until: WaitUntil,
) -> Callable[[], None]:
    """Give a function that lets the read-back run until its positions are the ends."""

    def run() -> None:
        with reading.running():
            wait_until(lambda: positions() == ends())

    return run


@pytest.fixture
def sweep(reading: ReadBack, topic: Topic) -> Callable[[], None]:
    """Give a function that sweeps once, as the read-back does every few seconds."""
    return lambda: reading.sweep(topic.describe())


@pytest.fixture
def publish_new(publish: Callable[[], None], add_event: AddEvent) -> Callable[[int], list[UUID]]:
    """Give a function that publishes so many new events and returns their ids."""

    def add(count: int) -> list[UUID]:
        event_ids = [add_event() for _ in range(count)]
        publish()
        return event_ids

    return add


@pytest.fixture
def states_of(row_of: RowOf) -> Callable[[Iterable[UUID]], set[tuple[str, int]]]:
    """Give a function that tells in what states events are, and how often republished."""

    def states(event_ids: Iterable[UUID]) -> set[tuple[str, int]]:
        rows = [row_of(event_id) for event_id in event_ids]
        return {(row.state, row.republished_count) for row in rows}

    return states


def counted(metric: str, **labels: str) -> float:
    return REGISTRY.get_sample_value(metric, labels) or 0.0


def gaps(bound: str) -> float:
    return counted("order_readback_gaps_total", bound=bound)


def id_of(moment: datetime) -> UUID:
    """Return an id as it would have been made at that moment (UUIDv7)."""
    milliseconds = int(moment.timestamp() * 1000)
    return UUID(int=milliseconds << 80 | (uuid7().int & ((1 << 80) - 1)))


# Positions outside the log


@pytest.fixture
def beyond_the_end(
    produce: Callable[..., None], autocommit: Connection, topic: Topic, ends: Ends
) -> dict[int, int]:
    """Store positions that the log does not reach, and return where it ends."""
    produce()
    now = ends()
    beyond = {partition: end + 100 for partition, end in now.items()}
    outbox.complete(autocommit, topic_id=topic.describe().id, seen={}, next_offsets=beyond)
    return now


def test_a_position_beyond_the_end_goes_back_to_the_end(
    beyond_the_end: dict[int, int],
    read_all: Callable[[], None],
    positions: Callable[[], dict[int, int]],
    sweep: Callable[[], None],
    publish_new: Callable[[int], list[UUID]],
    states_of: StatesOf,
    records_since: RecordsSince,
) -> None:
    """The log was cut: what is published there from then on is seen, not taken for lost."""
    before = gaps("end")
    read_all()
    written_back = positions()
    event_ids = publish_new(10)
    sweep()
    swept = states_of(event_ids)
    read_all()
    assert (written_back, gaps("end") - before) == (beyond_the_end, len(beyond_the_end))
    assert (swept, states_of(event_ids)) == ({("PUBLISHED", 0)}, {("COMPLETED", 0)})
    assert len(records_since(beyond_the_end)) == len(event_ids)


@pytest.fixture
def delete_records(admin: AdminClient, ends: Ends) -> Callable[[], None]:
    """Give a function that deletes all records that are in the topic."""

    def delete() -> None:
        asked = [TopicPartition(TOPIC, partition, end) for partition, end in ends().items()]
        for answer in admin.delete_records(asked).values():
            answer.result(10)

    return delete


def test_what_was_deleted_before_it_was_read_is_published_again(
    delete_records: Callable[[], None],
    read_all: Callable[[], None],
    sweep: Callable[[], None],
    publish: Callable[[], None],
    publish_new: Callable[[int], list[UUID]],
    states_of: StatesOf,
    query: Query,
) -> None:
    """The read-back goes on at the log's start: rows before it are lost, later ones are seen."""
    before, deleted = gaps("start"), publish_new(10)
    partitions = query("SELECT DISTINCT partition FROM outbox")
    delete_records()
    kept = publish_new(10)
    read_all()
    sweep()
    lost, seen = states_of(deleted), states_of(kept)
    query("UPDATE outbox SET due_at = now() WHERE state = 'INIT'")
    publish()
    read_all()
    assert (lost, seen, gaps("start") - before) == (
        {("INIT", 1)},
        {("COMPLETED", 0)},
        len(partitions),
    )
    assert states_of(deleted) == {("COMPLETED", 1)}


# Events without a row


@pytest.fixture
def write_event(produce: Callable[..., None]) -> Callable[[UUID], None]:
    """Give a function that writes an event of ours to the topic, past the outbox."""

    def write(event_id: UUID) -> None:
        order = events.PlacedOrder(
            uuid7(), "user-7", "minji@example.com", "ko", "KRW", 1, datetime.now(UTC), []
        )
        event = events.order_created(order, event_id=event_id)
        produce(event.value, [(name, value.encode()) for name, value in event.headers.items()])

    return write


@pytest.fixture
def phantoms(read_all: Callable[[], None]) -> Callable[[], tuple[float, list[str]]]:
    """Give a function that reads all and returns how many phantoms were counted, and whose."""

    def read() -> tuple[float, list[str]]:
        before = counted("order_events_phantom_total")
        with capture_logs() as logs:
            read_all()
        told = [line["event_id"] for line in logs if line["event"] == "event.phantom"]
        return counted("order_events_phantom_total") - before, told

    return read


def test_an_event_that_the_outbox_does_not_know_is_a_phantom(
    write_event: Callable[[UUID], None],
    phantoms: Callable[[], tuple[float, list[str]]],
    publish: Callable[[], None],
    add_event: AddEvent,
) -> None:
    """The database lost what it had committed: counted and told, once; its neighbour is none."""
    event_id = uuid7()
    write_event(event_id)
    add_event()
    publish()
    assert phantoms() == (1, [str(event_id)])
    assert phantoms() == (0, [])


def test_the_youngest_row_that_can_be_purged_bounds_the_phantoms(
    write_event: Callable[[UUID], None], phantoms: Callable[[], tuple[float, list[str]]]
) -> None:
    """An event of 15 days ago may have had its row; one of 13 days ago must still have it."""
    write_event(id_of(datetime.now(UTC) - 15 * DAY))
    missed = id_of(datetime.now(UTC) - 13 * DAY)
    write_event(missed)
    assert phantoms() == (1, [str(missed)])


def test_an_event_that_is_seen_again_is_no_phantom(
    write_event: Callable[[UUID], None],
    phantoms: Callable[[], tuple[float, list[str]]],
    publish: Callable[[], None],
    add_event: AddEvent,
) -> None:
    """Seen before, it has its row."""
    event_id = add_event()
    publish()
    first = phantoms()
    write_event(event_id)
    assert (first, phantoms()) == ((0, []), (0, []))


def test_an_event_of_another_source_is_no_phantom(
    produce: Callable[..., None], phantoms: Callable[[], tuple[float, list[str]]]
) -> None:
    """Its id is none of ours."""
    produce(headers=[("ce_id", str(uuid7()).encode()), ("ce_source", b"/shipping")])
    assert phantoms() == (0, [])


# What is old


@pytest.fixture
def aged(add_event: AddEvent) -> Callable[..., UUID]:
    """Give a function that adds an event made and COMPLETED so many days ago."""

    def add(*, made: float, completed: float | None, state: str = "COMPLETED") -> UUID:
        now = datetime.now(UTC)
        return add_event(
            id=id_of(now - made * DAY),
            state=state,
            completed_at=None if completed is None else now - completed * DAY,
        )

    return add


@pytest.fixture
def kept(aged: Callable[..., UUID]) -> set[UUID]:
    """Add what no purge may delete."""
    return {
        aged(made=13.9, completed=13.9),
        aged(made=20, completed=13.9),
        aged(made=0, completed=0),
        aged(made=20, completed=None, state="FAILED"),
        aged(made=20, completed=20, state="FAILED"),
        aged(made=20, completed=20, state="PUBLISHED"),
    }


def test_only_what_was_completed_long_ago_is_purged(
    autocommit: Connection, aged: Callable[..., UUID], kept: set[UUID], query: Query
) -> None:
    """14 days after COMPLETED; however old, a row of another state stays."""
    aged(made=14.1, completed=14.1)
    aged(made=400, completed=399)
    waiting = aged(made=20, completed=20, state="INIT")
    purged = outbox.purge(autocommit)
    assert (purged, {row.id for row in query("SELECT id FROM outbox")}) == (2, kept | {waiting})


def test_a_purge_deletes_a_batch(
    autocommit: Connection, aged: Callable[..., UUID], monkeypatch: pytest.MonkeyPatch, query: Query
) -> None:
    """The oldest first, so that no statement takes long."""
    monkeypatch.setattr(outbox, "PURGE_ROWS", 2)
    made = [aged(made=days, completed=days) for days in (20, 19, 18, 17, 16)]
    purged = outbox.purge(autocommit)
    left = {row.id for row in query("SELECT id FROM outbox")}
    again = [outbox.purge(autocommit) for _ in range(3)]
    assert (purged, left, again) == (2, set(made[2:]), [2, 1, 0])


def test_an_idle_relay_purges(
    start_relay: StartRelay,
    aged: Callable[..., UUID],
    kept: set[UUID],
    monkeypatch: pytest.MonkeyPatch,
    query: Query,
    wait_until: WaitUntil,
) -> None:
    """Batch after batch until nothing old is left, though there is nothing to publish."""
    monkeypatch.setattr(outbox, "PURGE_ROWS", 2)
    for _ in range(5):
        aged(made=20, completed=20)
    start_relay()
    wait_until(lambda: {row.id for row in query("SELECT id FROM outbox")} == kept)


# What is lost


def test_sweeps_go_on_where_the_last_one_ended(
    reading: ReadBack,
    topic: Topic,
    publish: Callable[[], None],
    add_event: AddEvent,
    row_of: RowOf,
    query: Query,
    ends: Ends,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """However much is in lag, the lost row behind it is found; then they begin anew."""
    monkeypatch.setattr(readback, "SWEEP_ROWS", 3)
    lowest = uuid7()
    for _ in range(7):
        add_event()
    publish()
    described = topic.describe()
    missing = {"state": "PUBLISHED", "topic_id": described.id, "partition": 1, "offset": ends()[1]}
    last = add_event(**missing)
    states = []
    for _ in range(3):
        reading.sweep(described)
        states.append(row_of(last).state)
    first = add_event(id=lowest, **missing)
    reading.sweep(described)
    in_lag = query("SELECT FROM outbox WHERE state = 'PUBLISHED'")
    assert (states, row_of(first).state, len(in_lag)) == (
        ["PUBLISHED", "PUBLISHED", "INIT"],
        "INIT",
        7,
    )


def test_what_is_never_recognised_fails_after_three_more_tries(
    read_all: Callable[[], None],
    sweep: Callable[[], None],
    publish: Callable[[], None],
    add_event: AddEvent,
    states_of: StatesOf,
    query: Query,
    ends: Ends,
    records_since: RecordsSince,
) -> None:
    """A row whose ce_id names no event is in the topic four times, then an operator's."""
    start = ends()
    event_id = add_event(headers={"ce_id": "not an id", "ce_source": events.SOURCE})
    found = []
    for _ in range(5):
        publish()
        read_all()
        sweep()
        found += states_of([event_id])
        # What the growing pause of 5, 10 and 20 s would bring about.
        query("UPDATE outbox SET due_at = now()")
    assert (found, len(records_since(start))) == (
        [("INIT", 1), ("INIT", 2), ("INIT", 3), ("FAILED", 3), ("FAILED", 3)],
        4,
    )


# A topic made anew


@pytest.fixture
def remake_topic(
    delete_topic: Callable[[], None], create_topic: Callable[[], None]
) -> Callable[[], None]:
    """Give a function that deletes the topic and makes it anew."""

    def remake() -> None:
        delete_topic()
        create_topic()

    return remake


@pytest.mark.fault("F-K8")
def test_an_offset_that_falls_tells_of_a_topic_made_anew(
    start_relay: StartRelay,
    topic: Topic,
    remake_topic: Callable[[], None],
    add_event: AddEvent,
    row_of: RowOf,
    settings: Settings,
    wait_until: WaitUntil,
) -> None:
    """The relay learns the new topic id with the next event, not 30 s later."""
    start_relay(topic=Topic(settings.kafka))
    key = str(uuid7())
    first, second = add_event(aggregateid=key), add_event(aggregateid=key)
    wait_until(lambda: {row_of(each).state for each in (first, second)} == {"PUBLISHED"})
    old_id = topic.describe().id
    remake_topic()
    new_id = topic.describe().id

    def is_known() -> bool:
        event_id = add_event(aggregateid=key)
        wait_until(lambda: row_of(event_id).state == "PUBLISHED")
        return bool(row_of(event_id).topic_id == new_id)

    wait_until(is_known, seconds=REDESCRIBED_SECONDS)
    assert (REDESCRIBED_SECONDS < DESCRIBE_SECONDS, old_id != new_id) == (True, True)


@pytest.fixture
def read_by_another(
    make_readback: Callable[[Topic], ReadBack],
    settings: Settings,
    positions: Callable[[], dict[int, int]],
    ends: Ends,
    wait_until: WaitUntil,
) -> Callable[[], None]:
    """Give a function that lets a new process' read-back read all and sweep."""

    def run() -> None:
        topic = Topic(settings.kafka)
        other = make_readback(topic)
        with other.running():
            wait_until(lambda: positions() == ends())
        other.sweep(topic.describe())

    return run


@pytest.mark.fault("F-K8")
def test_a_topic_made_anew_is_read_from_its_start_though_its_log_is_longer(
    read_by_another: Callable[[], None],
    remake_topic: Callable[[], None],
    publish: Callable[[], None],
    publish_new: Callable[[int], list[UUID]],
    states_of: StatesOf,
    query: Query,
    ends: Ends,
) -> None:
    """Positions belong to a topic id: what lies before the old ones is seen all the same."""
    remake_topic()
    seen = publish_new(20)
    read_by_another()
    old_ends, old = ends(), states_of(seen)
    remake_topic()
    early = publish_new(80)
    read_by_another()
    found = states_of(seen), states_of(early)
    publish()
    read_by_another()
    assert all(end > old_ends[partition] for partition, end in ends().items())
    assert (old, *found) == ({("COMPLETED", 0)}, {("INIT", 0)}, {("COMPLETED", 0)})
    assert states_of([*seen, *early]) == {("COMPLETED", 0)}
    assert len(query("SELECT DISTINCT topic_id FROM outbox")) == 1


def test_a_read_back_interrupted_by_a_topic_made_anew_reads_the_new_one_at_once(
    reading: ReadBack,
    delete_topic: Callable[[], None],
    create_topic: Callable[[], None],
    publish_new: Callable[[int], list[UUID]],
    states_of: StatesOf,
    query: Query,
    wait_until: WaitUntil,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What it knew of the old topic is forgotten, not asked again and again until it is stale."""
    monkeypatch.setattr(readback, "SWEEP_SECONDS", 0.1)
    first = publish_new(1)
    with capture_logs() as logs, reading.running():
        wait_until(lambda: states_of(first) == {("COMPLETED", 0)})
        # Without an offset it is lag for ever: each sweep asks for the topic's ends.
        query("UPDATE outbox SET state = 'PUBLISHED', \"offset\" = NULL")
        delete_topic()
        wait_until(lambda: "readback.interrupted" in [line["event"] for line in logs])
        create_topic()
        second = publish_new(1)
        wait_until(lambda: states_of(second) == {("COMPLETED", 0)}, seconds=REDESCRIBED_SECONDS)
    assert [line["event"] for line in logs].count("readback.assigned") <= 6
