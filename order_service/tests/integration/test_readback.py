import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from typing import Any
from uuid import UUID

import pytest
from confluent_kafka import TopicPartition
from confluent_kafka.admin import AdminClient
from prometheus_client import REGISTRY
from sqlalchemy import Connection, Engine
from uuid_utils.compat import uuid7

from order_service import outbox
from order_service.kafka import TOPIC, Publisher, Topic
from order_service.readback import ReadBack
from order_service.settings import Settings

AddEvent = Callable[..., UUID]
RowOf = Callable[[UUID], Any]
Query = Callable[..., Any]
WaitUntil = Callable[..., Any]
Ends = Callable[[], dict[int, int]]
StartRelay = Callable[..., tuple[threading.Event, "Future[None]"]]

pytestmark = pytest.mark.usefixtures("caught_up")


@pytest.fixture
def readback(make_readback: Callable[[Topic], ReadBack], settings: Settings) -> ReadBack:
    """Give a read-back that does not run yet."""
    return make_readback(Topic(settings.kafka))


def foreign_count() -> float:
    return REGISTRY.get_sample_value("order_records_foreign_total") or 0.0


def test_what_is_seen_in_the_topic_is_completed(
    readback: ReadBack,
    publish: Callable[[], None],
    add_event: AddEvent,
    row_of: RowOf,
    wait_until: WaitUntil,
) -> None:
    """A published event is COMPLETED at the place where it was published."""
    event_id = add_event()
    publish()
    published = row_of(event_id)
    with readback.running():
        wait_until(lambda: row_of(event_id).state == "COMPLETED")
    completed = row_of(event_id)
    assert (completed.topic_id, completed.partition, completed.offset) == (
        published.topic_id,
        published.partition,
        published.offset,
    )


def test_the_position_is_behind_what_was_seen(
    readback: ReadBack,
    publish: Callable[[], None],
    autocommit: Connection,
    add_event: AddEvent,
    row_of: RowOf,
    wait_until: WaitUntil,
) -> None:
    """The next offset to be read is the one after the event's."""
    event_id = add_event()
    publish()
    with readback.running():
        wait_until(lambda: row_of(event_id).state == "COMPLETED")
    row = row_of(event_id)
    stored = outbox.positions(autocommit, topic_id=row.topic_id)
    assert stored[row.partition] == row.offset + 1


@pytest.fixture
def refused_positions(query: Query) -> Iterator[Callable[[], None]]:
    """Let no position be written, and give a function that ends this."""

    def end() -> None:
        query("ALTER TABLE readback_positions DROP CONSTRAINT IF EXISTS nothing_goes_in")

    query(
        "ALTER TABLE readback_positions"
        " ADD CONSTRAINT nothing_goes_in CHECK (next_offset < 0) NOT VALID"
    )
    yield end
    end()


def test_without_its_position_nothing_is_completed(
    readback: ReadBack,
    publish: Callable[[], None],
    add_event: AddEvent,
    row_of: RowOf,
    query: Query,
    refused_positions: Callable[[], None],
    wait_until: WaitUntil,
) -> None:
    """State and position are written together: both fail, then both are there."""
    event_id = add_event()
    publish()
    rolled_back = "SELECT xact_rollback FROM pg_stat_database WHERE datname = current_database()"
    before = query(rolled_back)[0][0]
    with readback.running():
        wait_until(lambda: query(rolled_back)[0][0] > before)
        held = row_of(event_id).state
        refused_positions()
        wait_until(lambda: row_of(event_id).state == "COMPLETED")
    assert held == "PUBLISHED"


@pytest.mark.fault("F-O5")
def test_what_is_seen_before_its_report_is_completed(
    readback: ReadBack,
    publisher: Publisher,
    autocommit: Connection,
    add_event: AddEvent,
    row_of: RowOf,
    wait_until: WaitUntil,
) -> None:
    """The read-back may be faster than the relay: INIT becomes COMPLETED."""
    event_id = add_event()
    publisher.publish(outbox.select_init(autocommit, after=None, limit=1))
    with readback.running():
        wait_until(lambda: row_of(event_id).state == "COMPLETED")


@pytest.mark.fault("F-O5")
def test_a_report_that_comes_late_changes_nothing(
    readback: ReadBack,
    publisher: Publisher,
    topic: Topic,
    autocommit: Connection,
    add_event: AddEvent,
    row_of: RowOf,
    wait_until: WaitUntil,
) -> None:
    """A row that is COMPLETED stays as the read-back left it."""
    event_id = add_event()
    delivery = publisher.publish(outbox.select_init(autocommit, after=None, limit=1))
    with readback.running():
        wait_until(lambda: row_of(event_id).state == "COMPLETED")
    before = row_of(event_id)
    outbox.mark_published(autocommit, topic_id=topic.describe().id, reports=delivery.confirmed)
    assert row_of(event_id) == before


@pytest.mark.parametrize(
    "headers",
    [
        [],
        [("ce_id", b"garbage")],
        [("ce_id", b"\xff\xfe")],
        [("__TypeId__", b"com.example.Order")],
        [("ce_id", uuid7().bytes)],
        [("ce_id", str(uuid7()).encode())],
    ],
    ids=["no headers", "garbage", "not UTF-8", "of Spring", "raw bytes", "an id not ours"],
)
def test_a_foreign_record_is_counted_and_passed(
    readback: ReadBack,
    produce: Callable[..., None],
    publish: Callable[[], None],
    add_event: AddEvent,
    row_of: RowOf,
    wait_until: WaitUntil,
    headers: list[tuple[str, bytes]],
) -> None:
    """Others may write to the topic: their records hold up none of ours."""
    before = foreign_count()
    produce(headers=headers)
    event_id = add_event()
    publish()
    with readback.running():
        wait_until(lambda: row_of(event_id).state == "COMPLETED")
        wait_until(lambda: foreign_count() == before + 1)


def test_a_restart_goes_on_from_the_stored_position(
    readback: ReadBack,
    publish: Callable[[], None],
    add_event: AddEvent,
    row_of: RowOf,
    query: Query,
    wait_until: WaitUntil,
) -> None:
    """What was read before the restart is not read again."""
    first = add_event()
    publish()
    with readback.running():
        wait_until(lambda: row_of(first).state == "COMPLETED")
    query("UPDATE outbox SET state = 'FAILED'")
    second = add_event()
    publish()
    with readback.running():
        wait_until(lambda: row_of(second).state == "COMPLETED")
    assert row_of(first).state == "FAILED"


def test_without_positions_the_topic_is_read_from_its_start(
    readback: ReadBack,
    publish: Callable[[], None],
    add_event: AddEvent,
    row_of: RowOf,
    query: Query,
    wait_until: WaitUntil,
) -> None:
    """A read-back that knows nothing reads all there is."""
    event_id = add_event()
    publish()
    query("DELETE FROM readback_positions")
    with readback.running():
        wait_until(lambda: row_of(event_id).state == "COMPLETED")


@pytest.fixture(params=["before its start", "beyond its end"])
def outside_the_log(
    request: pytest.FixtureRequest,
    caught_up: None,
    engine: Engine,
    admin: AdminClient,
    topic: Topic,
    produce: Callable[..., None],
    ends: Ends,
) -> Mapping[int, int]:
    """Let the stored positions lie outside the log, and return where it ends."""
    for _ in range(20):
        produce()
    now = ends()
    if request.param == "beyond its end":
        positions = {partition: end + 100 for partition, end in now.items()}
    else:
        deleted = [TopicPartition(TOPIC, partition, end) for partition, end in now.items()]
        for answer in admin.delete_records(deleted).values():
            answer.result(10)
        positions = dict.fromkeys(now, 0)
    with engine.begin() as connection:
        outbox.complete(connection, topic_id=topic.describe().id, seen={}, next_offsets=positions)
    return now


@pytest.mark.usefixtures("outside_the_log")
def test_a_position_outside_the_log_does_not_stop_the_read_back(
    readback: ReadBack,
    publish: Callable[[], None],
    add_event: AddEvent,
    query: Query,
    wait_until: WaitUntil,
) -> None:
    """It goes on at the log's nearer bound: what is published from then on is seen."""

    def completes_in_every_partition() -> bool:
        add_event()
        publish()
        rows = query("SELECT DISTINCT partition FROM outbox WHERE state = 'COMPLETED'")
        return len(rows) == 3

    with readback.running():
        wait_until(completes_in_every_partition)


def test_a_sweep_sends_back_what_is_not_in_the_log(
    readback: ReadBack, topic: Topic, ends: Ends, add_event: AddEvent, row_of: RowOf
) -> None:
    """An event that the broker acknowledged and then lost is published again."""
    now, described = ends(), topic.describe()
    event_id = add_event(state="PUBLISHED", topic_id=described.id, partition=1, offset=now[1])
    readback.sweep(described)
    assert row_of(event_id).state == "INIT"


def test_a_sweep_leaves_what_is_still_to_be_read(
    readback: ReadBack,
    topic: Topic,
    publish: Callable[[], None],
    add_event: AddEvent,
    row_of: RowOf,
) -> None:
    """An event in the log that was not read yet is lag, and lag waits."""
    event_id = add_event()
    publish()
    readback.sweep(topic.describe())
    assert row_of(event_id).state == "PUBLISHED"


def test_a_recreated_topic_is_filled_again_while_all_is_running(
    make_readback: Callable[[Topic], ReadBack],
    start_relay: StartRelay,
    delete_topic: Callable[[], None],
    create_topic: Callable[[], None],
    settings: Settings,
    add_event: AddEvent,
    row_of: RowOf,
    wait_until: WaitUntil,
) -> None:
    """What was PUBLISHED in the old topic waits anew, what was COMPLETED is so in the new one."""
    topic = Topic(settings.kafka)
    start_relay(topic=topic, companion=make_readback(topic).running)
    completed = add_event()
    wait_until(lambda: row_of(completed).state == "COMPLETED")
    old_id = row_of(completed).topic_id
    delete_topic()
    create_topic()
    published = add_event(state="PUBLISHED", topic_id=old_id, partition=0, offset=10**6)
    # What 30 s would bring about: relay and read-back describe the topic anew.
    topic.forget()
    wait_until(lambda: row_of(published).state == "INIT")
    wait_until(lambda: row_of(completed).topic_id != old_id)
    wait_until(lambda: row_of(completed).state == "COMPLETED")


def test_a_topic_that_is_not_there_yet_is_waited_for(
    readback: ReadBack,
    delete_topic: Callable[[], None],
    create_topic: Callable[[], None],
    publish: Callable[[], None],
    add_event: AddEvent,
    row_of: RowOf,
    wait_until: WaitUntil,
) -> None:
    """A read-back that starts before its topic is there reads it as soon as it is."""
    delete_topic()
    with readback.running():
        create_topic()
        event_id = add_event()
        publish()
        wait_until(lambda: row_of(event_id).state == "COMPLETED")
