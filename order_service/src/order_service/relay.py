"""Active or standing by; select → publish → PUBLISHED.

One relay is active: the one whose session holds the advisory lock. It selects rows on that very
session, so a relay that lost its connection stops publishing with its next select.
"""

import contextlib
import select
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any
from uuid import UUID

import psycopg2
from sqlalchemy import Connection, Engine, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from order_service import idempotency, outbox, startup
from order_service.kafka import Delivery, KafkaUnavailable, Publisher, Topic
from order_service.telemetry import (
    events_published,
    log,
    outbox_events,
    outbox_oldest_age,
    relay_is_active,
    snapshot_oldest_age,
)

# Two keys are another space than the one-key locks of idempotency.py.
LOCK_KEYS = {"first": 0x6F72, "second": 0x6C79}
STANDBY_SECONDS = 1.0
POLL_SECONDS = 1.0
BATCH_ROWS = 500
RETRY_SECONDS = 1.0
# How often a select begins at the very start: every second, and less often in a backlog.
START_SECONDS = 1.0
START_SECONDS_BEHIND = 5.0
# Longer than an order's transaction can last.
OVERLAP_MS = 30_000
PURGE_SECONDS = 60.0
MEASURE_SECONDS = 15.0

# A client that vanished with its host must not hold the lock: the server asks after it.
_SERVER_KEEPALIVE = text("""
    SELECT set_config('tcp_keepalives_idle', '5', false),
           set_config('tcp_keepalives_interval', '2', false),
           set_config('tcp_keepalives_count', '3', false),
           set_config('tcp_user_timeout', '10000', false)
""")
_TRY_LOCK = text("SELECT pg_try_advisory_lock(:first, :second)")


class Frontier:
    """Where the next select begins, so that it need not pass what was published before.

    While somebody's old snapshot holds vacuum back, the index still leads to every version of a
    published row. A row with a lower id that commits later is not lost: ids begin with their time,
    so the next select begins a while before the last one's end, and now and then at the very start.
    """

    def __init__(self) -> None:
        self._last: UUID | None = None
        self._is_behind = False
        self._from_start_at = float("-inf")

    def after(self, now: float) -> UUID | None:
        """Return the id after which to select; None is the start."""
        wait_seconds = START_SECONDS_BEHIND if self._is_behind else START_SECONDS
        if self._last is None or now - self._from_start_at > wait_seconds:
            self._from_start_at = now
            return None
        overlap_ms = 0 if self._is_behind else OVERLAP_MS
        return UUID(int=max(0, self._last.int - (overlap_ms << 80)))

    def note(self, delivery: Delivery) -> None:
        """Learn how far the last select came."""
        ids = [*delivery.confirmed, *delivery.refused]
        self._is_behind = delivery.size >= BATCH_ROWS and not delivery.postponed
        if delivery.postponed:
            self._last = None
        elif ids:
            self._last = max(ids)


class Relay:
    """Publishes the outbox while it is the active one; `companion` runs for just as long."""

    def __init__(
        self,
        *,
        engine: Engine,
        topic: Topic,
        publisher: Publisher,
        companion: Callable[[], AbstractContextManager[None]],
        stop: threading.Event,
    ) -> None:
        self._engine = engine
        self._topic = topic
        self._publisher = publisher
        self._companion = companion
        self._stop = stop
        self._checked_topic_id = ""
        self._highest_offsets: dict[int, int] = {}
        self._frontier = Frontier()
        self._purged_at = self._measured_at = float("-inf")
        self.round_at = time.monotonic()
        self.has_topic = True

    def run(self) -> None:
        """Stand by, take over, publish; return when told to stop."""
        while not self._stop.is_set():
            try:
                with self._session() as connection:
                    if self._stand_by(connection):
                        self._be_active(connection)
            except (DBAPIError, PoolTimeout) as error:
                log.warning("relay.disconnected", error=type(error).__name__)
                self._stop.wait(RETRY_SECONDS)

    @contextmanager
    def _session(self) -> Iterator[Connection]:
        """Open one autocommit session: a transaction left open would hold vacuum back."""
        with self._engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            try:
                connection.execute(_SERVER_KEEPALIVE)
                yield connection
            finally:
                # Never back into the pool: lock and LISTEN must end with the session.
                connection.invalidate()

    def _stand_by(self, connection: Connection) -> bool:
        """Try for the lock once a second; return False when told to stop."""
        while not self._stop.is_set():
            self.round_at = time.monotonic()
            if connection.execute(_TRY_LOCK, LOCK_KEYS).scalar_one():
                return True
            self._stop.wait(STANDBY_SECONDS)
        return False

    def _be_active(self, connection: Connection) -> None:
        startup.require(startup.database_faults(connection))
        _warn_of_pooler(connection)
        connection.execute(text(f"LISTEN {outbox.CHANNEL}"))
        log.info("relay.activated")
        with relay_is_active.track_inprogress(), self._companion():
            while not self._stop.is_set():
                self.round_at = time.monotonic()
                self._round(connection)
                self._purge(connection)
                self._measure(connection)
        log.info("relay.deactivated")

    def _round(self, connection: Connection) -> None:
        try:
            # Known before the batch is produced: a delivery report names no topic id.
            topic_id = self._topic.current().id
            self._check_topic(topic_id)
        except KafkaUnavailable as error:
            self.has_topic = False
            log.warning("topic.not_described", error=str(error))
            self._stop.wait(RETRY_SECONDS)
            return
        self.has_topic = True
        after = self._frontier.after(time.monotonic())
        delivery = publish_batch(connection, self._publisher, topic_id=topic_id, after=after)
        self._frontier.note(delivery)
        if delivery.postponed:
            self._topic.forget()
            self._stop.wait(RETRY_SECONDS)
        elif self._fell(delivery):
            # The log begins anew: the id we knew may be that of a topic that is no more.
            self._topic.forget()
        elif delivery.size < BATCH_ROWS:
            _wait_for_work(connection)

    def _check_topic(self, topic_id: str) -> None:
        """Refuse a topic that is not as declared: at the start, and one that was made anew."""
        if topic_id == self._checked_topic_id:
            return
        check = self._topic.check()
        for warning in check.warnings:
            log.warning("topic.differs", what=warning)
        startup.require([f"topic order-created: {fault}" for fault in check.faults])
        self._checked_topic_id = topic_id

    def _fell(self, delivery: Delivery) -> bool:
        """Say whether a partition gave out an offset lower than one it gave out before."""
        lowest: dict[int, int] = {}
        highest = self._highest_offsets.copy()
        for where in delivery.confirmed.values():
            if where.partition is not None and where.offset is not None:
                lowest.setdefault(where.partition, where.offset)
                highest[where.partition] = where.offset
        has_fallen = any(
            offset < self._highest_offsets.get(partition, 0) for partition, offset in lowest.items()
        )
        self._highest_offsets = highest
        return has_fallen

    def _purge(self, connection: Connection) -> None:
        """Delete what is old: a batch of each a minute; while there is more, a batch a round."""
        if time.monotonic() - self._purged_at > PURGE_SECONDS:
            keys, rows = idempotency.purge(connection), outbox.purge(connection)
            if keys < idempotency.PURGE_ROWS and rows < outbox.PURGE_ROWS:
                self._purged_at = time.monotonic()

    def _measure(self, connection: Connection) -> None:
        if time.monotonic() - self._measured_at > MEASURE_SECONDS:
            backlog = outbox.backlog(connection)
            for state, count in backlog.counts.items():
                outbox_events.labels(state).set(count)
            outbox_oldest_age.set(backlog.oldest_age_seconds)
            snapshot_oldest_age.set(backlog.oldest_snapshot_age_seconds)
            self._measured_at = time.monotonic()


def publish_batch(
    connection: Connection, publisher: Publisher, *, topic_id: str, after: UUID | None = None
) -> Delivery:
    """Publish the oldest events that wait, and write down what the broker said of each."""
    delivery = publisher.publish(outbox.select_init(connection, after=after, limit=BATCH_ROWS))
    if delivery.confirmed:
        outbox.mark_published(connection, topic_id=topic_id, reports=delivery.confirmed)
        events_published.labels("confirmed").inc(len(delivery.confirmed))
    for event_id, reason in delivery.refused.items():
        outbox.mark_failed(connection, event_id, reason=reason)
        events_published.labels("refused").inc()
        log.error("event.refused", event_id=str(event_id), reason=reason)
    if delivery.postponed:
        events_published.labels("postponed").inc(len(delivery.postponed))
        reasons = sorted(set(delivery.postponed.values()))
        log.warning("events.postponed", count=len(delivery.postponed), reasons=reasons)
    return delivery


def _wait_for_work(connection: Connection) -> None:
    """Return when an order was committed, at the latest after the polling interval."""
    session: Any = connection.connection.dbapi_connection
    if not session.notifies:
        select.select([session], [], [], POLL_SECONDS)
        with contextlib.suppress(psycopg2.Error):
            # A session that has ended says so at the next select, as SQLAlchemy's error.
            session.poll()
    session.notifies.clear()


def _warn_of_pooler(connection: Connection) -> None:
    """Say so when somebody stands between us and the database: lock and LISTEN need one session.

    A pooler that keeps a session for each client is fine; we cannot see which kind it is.
    """
    session: Any = connection.connection.dbapi_connection
    behind = connection.execute(text("SELECT pg_backend_pid()")).scalar_one()
    if behind != session.get_backend_pid():
        log.warning("database.pooled", needed="a direct or session-pooled connection")
