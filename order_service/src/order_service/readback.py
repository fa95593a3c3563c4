"""Seen in the topic → COMPLETED; proven lost → INIT."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from sqlalchemy import Engine
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from order_service import outbox
from order_service.kafka import KafkaUnavailable, Reader, Seen, Topic, TopicState
from order_service.telemetry import events_completed, events_lost, log, records_foreign

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
                self._read_topic(self._topic.describe(), stop)
            except (KafkaUnavailable, DBAPIError, PoolTimeout) as error:
                log.warning("readback.interrupted", error=type(error).__name__)
                stop.wait(RETRY_SECONDS)

    def _read_topic(self, topic: TopicState, stop: threading.Event) -> None:
        """Read until told to stop, or until the topic is another or has other partitions."""
        with self._engine.connect() as connection, connection.begin():
            positions = outbox.positions(connection, topic_id=topic.id)
        reader = self._make_reader(self._topic)
        try:
            reader.assign(topic.partitions, positions)
            log.info("readback.assigned", topic_id=topic.id, partitions=topic.partitions)
            swept_at = time.monotonic()
            while not stop.is_set() and self._topic.current() == topic:
                seen = reader.read(limit=BATCH_RECORDS, timeout_seconds=READ_TIMEOUT_SECONDS)
                if seen.next_offsets:
                    self._complete(topic, seen)
                    reader.commit(seen.next_offsets)
                if time.monotonic() - swept_at > SWEEP_SECONDS:
                    self.sweep(topic)
                    swept_at = time.monotonic()
        finally:
            reader.close()

    def _complete(self, topic: TopicState, seen: Seen) -> None:
        with self._engine.begin() as connection:
            completed = outbox.complete(
                connection,
                topic_id=topic.id,
                seen=seen.events,
                next_offsets=seen.next_offsets,
            )
            # A record may carry an id that is none of ours; ours may have been seen before.
            known = len(seen.events)
            if completed < known:
                known = outbox.count_known(connection, seen.events)
        events_completed.inc(completed)
        records_foreign.inc(seen.foreign + len(seen.events) - known)

    def sweep(self, topic: TopicState) -> None:
        """Send back to INIT what is proven lost; all else is lag, and waits."""
        with self._engine.begin() as connection:
            published = outbox.select_published(connection, limit=SWEEP_ROWS)
            renewed = outbox.republish_into_new_topic(
                connection, topic_id=topic.id, limit=SWEEP_ROWS
            )
        if renewed:
            log.error("topic.recreated", topic_id=topic.id, republished_count=renewed)
        if not published:
            return
        bounds = self._topic.bounds(range(topic.partitions))
        end_offsets = {partition: bound.end for partition, bound in bounds.items()}
        with self._engine.begin() as connection:
            lost = outbox.republish_lost(
                connection, topic_id=topic.id, published=published, end_offsets=end_offsets
            )
        for event_id, state in lost.items():
            events_lost.inc()
            log.error("event.lost", event_id=str(event_id), state=state)
