"""Seen in the topic → COMPLETED; proven lost → INIT."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from uuid import UUID

from sqlalchemy import Engine
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from order_service import events, outbox
from order_service.kafka import Batch, Coordinates, KafkaUnavailable, Reader, Topic, TopicState
from order_service.telemetry import (
    events_completed,
    events_lost,
    events_phantom,
    log,
    records_foreign,
)

BATCH_RECORDS = 1_000
READ_TIMEOUT_SECONDS = 0.5
SWEEP_SECONDS = 5.0
SWEEP_ROWS = 1_000
RETRY_SECONDS = 1.0


class ReadBack:
    """Our own reader of the topic: what it has seen there, every group can read."""

    def __init__(
        self, *, engine: Engine, topic: Topic, make_reader: Callable[[Topic], Reader]
    ) -> None:
        self._engine = engine
        self._topic = topic
        self._make_reader = make_reader
        self._swept_to: UUID | None = None
        self._renewed_to: UUID | None = None

    @contextmanager
    def running(self) -> Iterator[None]:
        """Read in a thread for as long as the block runs."""
        stop = threading.Event()
        thread = threading.Thread(target=self._run, args=(stop,), name="read-back")
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()

    def _run(self, stop: threading.Event) -> None:
        while not stop.is_set():
            try:
                self._topic.forget()
                self._read_topic(self._topic.current(), stop)
            except (KafkaUnavailable, DBAPIError, PoolTimeout) as error:
                log.warning("readback.interrupted", error=type(error).__name__)
                stop.wait(RETRY_SECONDS)

    def _read_topic(self, topic: TopicState, stop: threading.Event) -> None:
        """Read until told to stop, or until the topic is another or has other partitions."""
        with self._engine.connect() as connection, connection.begin():
            positions = outbox.positions(connection, topic_id=topic.id)
        reader = self._make_reader(self._topic)
        try:
            reader.assign(range(topic.partitions), positions)
            log.info("readback.assigned", topic_id=topic.id, partitions=topic.partitions)
            swept_at = time.monotonic()
            while not stop.is_set() and self._topic.current() == topic:
                batch = reader.read(limit=BATCH_RECORDS, timeout_seconds=READ_TIMEOUT_SECONDS)
                if batch.next_offsets:
                    self._complete(topic, batch)
                    reader.commit(batch.next_offsets)
                if time.monotonic() - swept_at > SWEEP_SECONDS:
                    self.sweep(topic)
                    swept_at = time.monotonic()
        finally:
            reader.close()

    def _complete(self, topic: TopicState, batch: Batch) -> None:
        """Write what was seen and how far was read, together."""
        ours = [
            (event_id, Coordinates(record.partition, record.offset))
            for record in batch.records
            if (event_id := events.id_in(record.headers)) is not None
        ]
        seen = dict(ours)
        with self._engine.begin() as connection:
            completed = outbox.complete(
                connection, topic_id=topic.id, seen=seen, next_offsets=batch.next_offsets
            )
            # The others were seen before, or their rows were purged, or never were.
            phantoms = outbox.unknown(connection, seen) if completed < len(seen) else set()
        events_completed.inc(completed)
        records_foreign.inc(len(batch.records) - len(ours))
        events_phantom.inc(len(phantoms))
        for event_id in phantoms:
            where = seen[event_id]
            log.error(
                "event.phantom",
                event_id=str(event_id),
                partition=where.partition,
                offset=where.offset,
            )

    def sweep(self, topic: TopicState) -> None:
        """Send back to INIT what is proven lost; all else is lag, and waits.

        One call looks at 1,000 rows and the next one goes on after them, so that reading never
        waits long for a sweep.
        """
        self._renew(topic)
        with self._engine.begin() as connection:
            published = outbox.select_published(connection, after=self._swept_to, limit=SWEEP_ROWS)
        self._swept_to = published[-1].id if len(published) == SWEEP_ROWS else None
        if published:
            self._send_back_lost(topic, published)

    def _renew(self, topic: TopicState) -> None:
        with self._engine.begin() as connection:
            renewed = outbox.republish_into_new_topic(
                connection, topic_id=topic.id, after=self._renewed_to, limit=SWEEP_ROWS
            )
        if renewed:
            self._renewed_to = renewed[-1]
            log.error("topic.recreated", topic_id=topic.id, republished_count=len(renewed))
        else:
            self._renewed_to = None

    def _send_back_lost(self, topic: TopicState, published: outbox.Rows) -> None:
        # Asked after the rows were read: what was published since lies beyond these ends.
        bounds = self._topic.bounds(range(topic.partitions))
        end_offsets = {partition: bound.end for partition, bound in bounds.items()}
        with self._engine.begin() as connection:
            lost = outbox.republish_lost(
                connection, topic_id=topic.id, published=published, end_offsets=end_offsets
            )
        for event_id, state in lost.items():
            events_lost.labels(state).inc()
            log.error("event.lost", event_id=str(event_id), state=state)
