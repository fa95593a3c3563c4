import os
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import pytest
from confluent_kafka import TIMESTAMP_CREATE_TIME, Message
from confluent_kafka.admin import (
    AdminClient,
    AlterConfigOpType,
    ConfigEntry,
    ConfigResource,
    ResourceType,
)
from sqlalchemy import Connection, Engine, event
from uuid_utils.compat import uuid7

from order_service import outbox
from order_service.kafka import TOPIC, Publisher, Topic
from order_service.models import make_engine
from order_service.relay import POLL_SECONDS, publish_batch
from order_service.settings import Settings

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
TOO_LARGE = 2_000_000
TAKEOVER_SECONDS = 5.0

AddEvent = Callable[..., UUID]
RowOf = Callable[[UUID], Any]
Query = Callable[..., Any]
WaitUntil = Callable[..., Any]
Ends = Callable[[], dict[int, int]]
RecordsSince = Callable[[Mapping[int, int]], list[Message]]
StartRelay = Callable[..., tuple[threading.Event, "Future[None]"]]


def event_ids(records: list[Message]) -> Counter[str]:
    headers: list[dict[str, Any]] = [dict(record.headers() or ()) for record in records]
    return Counter(each["ce_id"].decode() for each in headers)


def test_a_published_row_says_where_its_record_is(
    publish: Callable[[], None],
    add_event: AddEvent,
    row_of: RowOf,
    topic: Topic,
    ends: Ends,
    records_since: RecordsSince,
) -> None:
    """Partition, offset and topic id of the row are those of the record in the topic."""
    before = ends()
    event_id = add_event()
    publish()
    row, (record,) = row_of(event_id), records_since(before)
    assert (row.state, row.topic_id, row.partition, row.offset) == (
        "PUBLISHED",
        topic.describe().id,
        record.partition(),
        record.offset(),
    )


def test_a_record_is_the_row(
    publish: Callable[[], None],
    add_event: AddEvent,
    row_of: RowOf,
    ends: Ends,
    records_since: RecordsSince,
) -> None:
    """Key, value, headers in their order, and the order's time are those of the row."""
    before = ends()
    event_id = add_event()
    publish()
    row, (record,) = row_of(event_id), records_since(before)
    assert (record.key(), record.value(), record.headers(), record.timestamp()) == (
        row.aggregateid.encode(),
        bytes(row.payload),
        [(name, value.encode()) for name, value in row.headers.items()],
        (TIMESTAMP_CREATE_TIME, (row.occurred_at - EPOCH) // timedelta(milliseconds=1)),
    )


def test_a_row_is_published_once(
    publish: Callable[[], None], add_event: AddEvent, ends: Ends, records_since: RecordsSince
) -> None:
    """What is PUBLISHED is not selected again."""
    before = ends()
    event_id = add_event()
    publish()
    publish()
    assert event_ids(records_since(before)) == {str(event_id): 1}


@pytest.mark.fault("F-K6")
def test_a_row_that_is_too_large_fails_alone(
    publish: Callable[[], None], add_event: AddEvent, row_of: RowOf
) -> None:
    """The rows before and after it are published."""
    first, large, last = add_event(), add_event(payload=b"x" * TOO_LARGE), add_event()
    publish()
    assert (row_of(first).state, row_of(large).state, row_of(last).state) == (
        "PUBLISHED",
        "FAILED",
        "PUBLISHED",
    )


def test_a_row_that_failed_says_why(
    publish: Callable[[], None], add_event: AddEvent, row_of: RowOf
) -> None:
    """The operator reads in the row what is wrong with it."""
    event_id = add_event(payload=b"x" * TOO_LARGE)
    publish()
    assert row_of(event_id).reason.endswith("Message size too large")


@pytest.fixture
def narrow_topic(admin: AdminClient, topic: Topic) -> Iterator[None]:
    """Let the broker take records up to 10 kB only."""

    def alter(operation: AlterConfigOpType) -> None:
        entry = ConfigEntry("max.message.bytes", "10000", incremental_operation=operation)
        resource = ConfigResource(ResourceType.TOPIC, TOPIC, incremental_configs=[entry])
        admin.incremental_alter_configs([resource])[resource].result(10)

    alter(AlterConfigOpType.SET)
    yield
    alter(AlterConfigOpType.DELETE)


@pytest.mark.fault("F-K6")
@pytest.mark.usefixtures("narrow_topic")
def test_a_row_that_the_broker_finds_too_large_fails_alone(
    publish: Callable[[], None], add_event: AddEvent, query: Query, wait_until: WaitUntil
) -> None:
    """A broker refuses a whole batch of records; the rows that are not to blame are published."""
    large = add_event(payload=os.urandom(20_000))
    for _ in range(30):
        add_event(payload=os.urandom(1_000))

    def settled() -> bool:
        publish()
        return not query("SELECT FROM outbox WHERE state = 'INIT'")

    wait_until(settled)
    failed = [row.id for row in query("SELECT id FROM outbox WHERE state = 'FAILED'")]
    assert failed == [large]


@pytest.mark.fault("F-K6")
@pytest.mark.usefixtures("narrow_topic")
def test_rows_that_are_too_large_only_together_are_published(
    publish: Callable[[], None], add_event: AddEvent, query: Query
) -> None:
    """Many small rows may come to a batch that the broker refuses: none of them is to blame."""
    for _ in range(60):
        add_event(payload=os.urandom(1_000))
    publish()
    assert not query("SELECT FROM outbox WHERE state = 'FAILED'")


@pytest.mark.fault("F-O9")
def test_a_row_that_commits_late_with_a_lower_id_is_published(
    publish: Callable[[], None], add_event: AddEvent, row_of: RowOf, engine: Engine
) -> None:
    """Rows are selected by state, never by `id > last`."""
    lower, higher = uuid7(), uuid7()
    with engine.connect() as late:
        add_event(id=lower, connection=late)
        add_event(id=higher)
        publish()
        late.commit()
    publish()
    assert (row_of(higher).state, row_of(lower).state) == ("PUBLISHED", "PUBLISHED")


def test_a_publisher_alone_leaves_rows_published(
    start_relay: StartRelay, add_event: AddEvent, row_of: RowOf, wait_until: WaitUntil
) -> None:
    """COMPLETED is for the read-back to say: without it rows stay PUBLISHED, and flow."""
    start_relay()
    first = add_event()
    wait_until(lambda: row_of(first).state == "PUBLISHED")
    second = add_event()
    wait_until(lambda: row_of(second).state == "PUBLISHED")
    assert row_of(first).state == "PUBLISHED"


def test_a_relay_wakes_when_told(
    start_relay: StartRelay,
    add_event: AddEvent,
    row_of: RowOf,
    query: Query,
    wait_until: WaitUntil,
) -> None:
    """Of five events in a row one may be slow; they go out long before the relay would poll."""
    start_relay()
    seconds = []
    for number in range(6):
        event_id = add_event()
        woken_at = time.monotonic()
        query(outbox.WAKE_RELAY)
        wait_until(lambda event_id=event_id: row_of(event_id).state == "PUBLISHED")
        if number:
            seconds.append(time.monotonic() - woken_at)
    assert sorted(seconds)[-2] < POLL_SECONDS / 2


@pytest.mark.fault("F-O17")
def test_a_relay_that_nobody_wakes_polls(
    start_relay: StartRelay, add_event: AddEvent, row_of: RowOf, wait_until: WaitUntil
) -> None:
    """A wake-up that is not heard costs a second, not the event."""
    start_relay()
    seconds = []
    for _ in range(3):
        added_at = time.monotonic()
        event_id = add_event()
        wait_until(lambda event_id=event_id: row_of(event_id).state == "PUBLISHED")
        seconds.append(time.monotonic() - added_at)
    assert min(seconds) < 2 * POLL_SECONDS


@pytest.mark.fault("F-O10")
def test_of_two_relays_one_publishes(
    start_relay: StartRelay,
    add_event: AddEvent,
    query: Query,
    ends: Ends,
    records_since: RecordsSince,
    wait_until: WaitUntil,
) -> None:
    """With two relays running every event is in the topic once."""
    before = ends()
    start_relay()
    start_relay()
    added = [add_event() for _ in range(50)]
    wait_until(lambda: not query("SELECT FROM outbox WHERE state = 'INIT'"))
    assert event_ids(records_since(before)) == dict.fromkeys(map(str, added), 1)


def test_another_relay_takes_over_when_the_active_one_stops(
    start_relay: StartRelay,
    add_event: AddEvent,
    row_of: RowOf,
    active_session: Callable[[], int | None],
    wait_until: WaitUntil,
) -> None:
    """The relay that stood by is active within seconds, and publishes."""
    stop, first = start_relay()
    wait_until(active_session)
    start_relay()
    stop.set()
    first.result(TAKEOVER_SECONDS)
    event_id = add_event()
    wait_until(lambda: row_of(event_id).state == "PUBLISHED", seconds=TAKEOVER_SECONDS)


def test_another_relay_takes_over_when_the_active_one_loses_its_session(
    start_relay: StartRelay,
    query: Query,
    active_session: Callable[[], int | None],
    wait_until: WaitUntil,
) -> None:
    """The lock ends with the session, and another session holds it within seconds."""
    start_relay()
    lost = wait_until(active_session)
    start_relay()
    query("SELECT pg_terminate_backend(:pid)", pid=lost)
    wait_until(lambda: active_session() not in {None, lost}, seconds=TAKEOVER_SECONDS)


def test_a_relay_whose_session_was_ended_stands_by_again(
    start_relay: StartRelay,
    add_event: AddEvent,
    row_of: RowOf,
    query: Query,
    active_session: Callable[[], int | None],
    wait_until: WaitUntil,
) -> None:
    """A restart of the database does not end the relay: alone, it becomes active once more."""
    start_relay()
    first = add_event()
    wait_until(lambda: row_of(first).state == "PUBLISHED")
    query("SELECT pg_terminate_backend(:pid)", pid=active_session())
    second = add_event()
    wait_until(lambda: row_of(second).state == "PUBLISHED", seconds=TAKEOVER_SECONDS)


def test_a_relay_whose_link_broke_stands_by_again(
    start_relay: StartRelay,
    settings: Settings,
    add_event: AddEvent,
    row_of: RowOf,
    wait_until: WaitUntil,
) -> None:
    """A connection that ends without a word, while the relay waits, does not end the relay."""
    sockets: list[socket.socket] = []
    engine = make_engine(settings.database_url)
    event.listen(
        engine,
        "connect",
        lambda session, _: sockets.append(socket.socket(fileno=os.dup(session.fileno()))),
    )
    start_relay(session_engine=engine)
    first = add_event()
    wait_until(lambda: row_of(first).state == "PUBLISHED")
    sockets[0].shutdown(socket.SHUT_RDWR)
    second = add_event()
    wait_until(lambda: row_of(second).state == "PUBLISHED", seconds=TAKEOVER_SECONDS)
    for each in sockets:
        each.close()


@pytest.mark.parametrize("relays", [1, 2], ids=["active", "standing by"])
def test_a_relay_told_to_stop_returns(
    start_relay: StartRelay,
    active_session: Callable[[], int | None],
    wait_until: WaitUntil,
    relays: int,
) -> None:
    """Active or standing by, it is gone within seconds."""
    stop, future = start_relay()
    wait_until(active_session)
    if relays == 2:
        stop, future = start_relay()
    stop.set()
    future.result(TAKEOVER_SECONDS)


def test_an_active_relay_holds_no_transaction_open(
    start_relay: StartRelay,
    add_event: AddEvent,
    row_of: RowOf,
    query: Query,
    active_session: Callable[[], int | None],
    wait_until: WaitUntil,
) -> None:
    """A snapshot held for long would stop vacuum for the whole database."""
    start_relay()
    event_id = add_event()
    wait_until(lambda: row_of(event_id).state == "PUBLISHED")
    state = "SELECT state FROM pg_stat_activity WHERE pid = :pid"
    wait_until(lambda: query(state, pid=active_session())[0].state == "idle")


def test_a_publisher_that_finds_no_broker_postpones(
    settings: Settings, autocommit: Connection, add_event: AddEvent, row_of: RowOf
) -> None:
    """Told to stop while the broker is away, it leaves the row to the next relay."""
    stop = threading.Event()
    stop.set()
    away = Publisher({**settings.kafka, "bootstrap.servers": "127.0.0.1:1"}, stop)
    event_id = add_event()
    publish_batch(autocommit, away, topic_id="unknown")
    assert row_of(event_id).state == "INIT"
