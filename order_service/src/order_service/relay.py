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

import psycopg2
from sqlalchemy import Connection, Engine, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from order_service import idempotency, outbox
from order_service.kafka import Delivery, KafkaUnavailable, Publisher, Topic
from order_service.telemetry import events_published, log, relay_is_active

# Two keys are another space than the one-key locks of idempotency.py.
LOCK_KEYS = {"first": 0x6F72, "second": 0x6C79}
STANDBY_SECONDS = 1.0
POLL_SECONDS = 1.0
BATCH_ROWS = 500
RETRY_SECONDS = 1.0
PURGE_SECONDS = 60.0

# A client that vanished with its host must not hold the lock: the server asks after it.
_SERVER_KEEPALIVE = text("""
    SELECT set_config('tcp_keepalives_idle', '5', false),
           set_config('tcp_keepalives_interval', '2', false),
           set_config('tcp_keepalives_count', '3', false),
           set_config('tcp_user_timeout', '10000', false)
""")
_TRY_LOCK = text("SELECT pg_try_advisory_lock(:first, :second)")


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
        self._purged_at = float("-inf")
        self.round_at = time.monotonic()

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
        connection.execute(text(f"LISTEN {outbox.CHANNEL}"))
        log.info("relay.activated")
        with relay_is_active.track_inprogress(), self._companion():
            while not self._stop.is_set():
                self.round_at = time.monotonic()
                self._round(connection)
                self._purge(connection)
        log.info("relay.deactivated")

    def _round(self, connection: Connection) -> None:
        try:
            # Known before the batch is produced: a delivery report names no topic id.
            topic_id = self._topic.current().id
        except KafkaUnavailable as error:
            log.warning("topic.not_described", error=str(error))
            self._stop.wait(RETRY_SECONDS)
            return
        delivery = publish_batch(connection, self._publisher, topic_id=topic_id)
        if delivery.postponed:
            self._topic.forget()
            self._stop.wait(RETRY_SECONDS)
        elif delivery.size < BATCH_ROWS:
            _wait_for_work(connection)

    def _purge(self, connection: Connection) -> None:
        """Delete old Idempotency-Keys: a batch a minute; while there are more, a batch a round."""
        if time.monotonic() - self._purged_at > PURGE_SECONDS:
            purged = idempotency.purge(connection)
            if purged < idempotency.PURGE_ROWS:
                self._purged_at = time.monotonic()


def publish_batch(connection: Connection, publisher: Publisher, *, topic_id: str) -> Delivery:
    """Publish the oldest events that wait, and write down what the broker said of each."""
    delivery = publisher.publish(outbox.select_init(connection, limit=BATCH_ROWS))
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
