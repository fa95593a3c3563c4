"""The only file that knows Kafka: the topic, the publisher, the reader."""

import logging
import socket
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

from confluent_kafka import (
    OFFSET_BEGINNING,
    Consumer,
    KafkaError,
    KafkaException,
    Message,
    Producer,
    TopicCollection,
    TopicPartition,
)
from confluent_kafka.admin import AdminClient, NewTopic, OffsetSpec

from order_service.telemetry import log

TOPIC = "order-created"
PARTITIONS = 3
DAY_MS = 24 * 60 * 60 * 1000
TOPIC_SETTINGS = {
    "cleanup.policy": "delete",
    "retention.ms": str(63 * DAY_MS),
    "segment.ms": str(DAY_MS),
}
# As many replicas as a cluster of one or of many can hold; the promise wants three, two in sync.
REPLICATION_WANTED = 3
MIN_INSYNC_REPLICAS_WANTED = 2
READER_GROUP = "order-outbox"

REQUEST_TIMEOUT_SECONDS = 10.0
LIBRDKAFKA = logging.getLogger("librdkafka")
DELIVERY_TIMEOUT_MS = 30_000
LINGER_MS = 1
QUEUE_FULL_WAIT_SECONDS = 0.1
STOP_GRACE_SECONDS = 5.0
DESCRIBE_SECONDS = 30.0

# No broker will ever take such a record; every other error is worth another try.
REFUSED_FOR_GOOD = frozenset(
    {KafkaError.MSG_SIZE_TOO_LARGE, KafkaError.INVALID_MSG, KafkaError._INVALID_ARG}
)


class KafkaUnavailable(Exception):
    """The cluster did not answer, or the topic is not there; worth another try."""


class PublisherFailed(Exception):
    """The producer cannot go on: the process ends and is started anew."""


@dataclass(frozen=True, slots=True)
class Coordinates:
    """Where a record is; an offset the broker did not name is None."""

    partition: int | None
    offset: int | None


@dataclass(frozen=True, slots=True)
class TopicState:
    """The topic as the cluster describes it; a topic made anew has another id."""

    id: str
    partitions: int


@dataclass(frozen=True, slots=True)
class Bounds:
    """The first offset of a partition's log, and the one after its last."""

    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Outgoing:
    """What is to be published: the bytes exactly as they were encoded with the order."""

    id: UUID
    key: str
    value: bytes
    headers: Mapping[str, str]
    occurred_at: datetime


@dataclass(slots=True)
class Delivery:
    """What became of one batch, by event id."""

    confirmed: dict[UUID, Coordinates]
    refused: dict[UUID, str]
    postponed: dict[UUID, str]

    @property
    def size(self) -> int:
        """How many records were in the batch."""
        return len(self.confirmed) + len(self.refused) + len(self.postponed)


@dataclass(frozen=True, slots=True)
class Seen:
    """A batch of records as read: ours by event id, how many others, the first offsets not read."""

    events: dict[UUID, Coordinates]
    foreign: int
    next_offsets: dict[int, int]


def client_id(role: str) -> str:
    """Name a client in the broker's logs and quotas."""
    return f"order-service-{role}-{socket.gethostname()}"


class Topic:
    """The topic order-created, as administrators see it."""

    def __init__(self, properties: Mapping[str, str]) -> None:
        self._admin = AdminClient(
            {**properties, "client.id": client_id("admin")}, logger=LIBRDKAFKA
        )
        self._known: tuple[TopicState, float] | None = None

    def current(self) -> TopicState:
        """Return the topic as described at most 30 s ago."""
        if self._known is None or time.monotonic() - self._known[1] > DESCRIBE_SECONDS:
            self._known = (self.describe(), time.monotonic())
        return self._known[0]

    def forget(self) -> None:
        """Describe the topic anew at the next question."""
        self._known = None

    def describe(self) -> TopicState:
        """Return id and partitions; raise KafkaUnavailable when there is no answer or no topic."""
        try:
            future = self._admin.describe_topics(
                TopicCollection([TOPIC]), request_timeout=REQUEST_TIMEOUT_SECONDS
            )[TOPIC]
            description = future.result(REQUEST_TIMEOUT_SECONDS)
        except (KafkaException, TimeoutError) as error:
            raise KafkaUnavailable(str(error)) from error
        return TopicState(str(description.topic_id), len(description.partitions))

    def bounds(self, partitions: Iterable[int]) -> dict[int, Bounds]:
        """Ask the broker where each partition starts and ends, now."""
        asked = [TopicPartition(TOPIC, partition) for partition in partitions]
        try:
            starts = self._list_offsets(asked, OffsetSpec.earliest())
            ends = self._list_offsets(asked, OffsetSpec.latest())
        except (KafkaException, TimeoutError) as error:
            raise KafkaUnavailable(str(error)) from error
        return {partition: Bounds(start, ends[partition]) for partition, start in starts.items()}

    def _list_offsets(self, asked: Sequence[TopicPartition], spec: OffsetSpec) -> dict[int, int]:
        answers = self._admin.list_offsets(
            dict.fromkeys(asked, spec), request_timeout=REQUEST_TIMEOUT_SECONDS
        )
        return {
            where.partition: answer.result(REQUEST_TIMEOUT_SECONDS).offset
            for where, answer in answers.items()
        }

    def ensure(self) -> bool:
        """Create the topic as declared; return whether it was missing."""
        try:
            brokers = len(self._admin.list_topics(timeout=REQUEST_TIMEOUT_SECONDS).brokers)
            replication = min(REPLICATION_WANTED, brokers)
            settings = {
                **TOPIC_SETTINGS,
                "min.insync.replicas": str(min(MIN_INSYNC_REPLICAS_WANTED, replication)),
            }
            topic = NewTopic(TOPIC, PARTITIONS, replication, config=settings)
            self._admin.create_topics([topic])[TOPIC].result(REQUEST_TIMEOUT_SECONDS)
        except KafkaException as error:
            if error.args[0].code() == KafkaError.TOPIC_ALREADY_EXISTS:
                return False
            raise KafkaUnavailable(str(error)) from error
        except TimeoutError as error:
            raise KafkaUnavailable(str(error)) from error
        return True


class Publisher:
    """Publishes batches; the relay's only way to write to the topic."""

    def __init__(self, properties: Mapping[str, str], stop: threading.Event) -> None:
        self._stop = stop
        self._fatal: KafkaError | None = None
        self._producer = Producer(
            {
                "reconnect.backoff.max.ms": "1000",
                "compression.type": "lz4",
                "linger.ms": str(LINGER_MS),
                **properties,
                "client.id": client_id("relay"),
                "enable.idempotence": "true",
                "acks": "all",
                "partitioner": "murmur2_random",
                "delivery.timeout.ms": str(DELIVERY_TIMEOUT_MS),
                "allow.auto.create.topics": "false",
                "error_cb": self._note_error,
            },
            logger=LIBRDKAFKA,
        )

    def publish(self, records: Sequence[Outgoing]) -> Delivery:
        """Return when the broker has answered for each record, at most the delivery time-out later.

        Told to stop, it waits 5 s at most. Raises PublisherFailed when the producer is beyond use.
        """
        delivery = self._publish_together(records)
        # A broker refuses whole batches: only a record refused alone is itself to blame.
        suspects = [record for record in records if record.id in delivery.refused]
        if len(records) > 1 and suspects:
            delivery.postponed |= delivery.refused
            delivery.refused = {}
            for record in suspects:
                alone = self._publish_together([record])
                if alone.postponed:
                    break
                del delivery.postponed[record.id]
                delivery.confirmed |= alone.confirmed
                delivery.refused |= alone.refused
        return delivery

    def _publish_together(self, records: Sequence[Outgoing]) -> Delivery:
        delivery = Delivery({}, {}, {record.id: "no delivery report" for record in records})
        for record in records:
            self._produce(record, delivery)
        deadline = time.monotonic() + DELIVERY_TIMEOUT_MS / 1000 + REQUEST_TIMEOUT_SECONDS
        while len(self._producer) and time.monotonic() < deadline and not self._fatal:
            self._producer.poll(QUEUE_FULL_WAIT_SECONDS)
            if self._stop.is_set():
                self._producer.flush(STOP_GRACE_SECONDS)
                break
        if self._fatal:
            raise PublisherFailed(self._fatal.str())
        return delivery

    def _produce(self, record: Outgoing, delivery: Delivery) -> None:
        def report(error: KafkaError | None, message: Message) -> None:
            self._note_report(delivery, record.id, error, message)

        deadline = time.monotonic() + DELIVERY_TIMEOUT_MS / 1000
        while True:
            try:
                self._producer.produce(
                    TOPIC,
                    key=record.key.encode(),
                    value=record.value,
                    headers=[(name, value.encode()) for name, value in record.headers.items()],
                    timestamp=int(record.occurred_at.timestamp() * 1000),
                    on_delivery=report,
                )
            except BufferError:
                if time.monotonic() > deadline or self._stop.is_set():
                    return
                self._producer.poll(QUEUE_FULL_WAIT_SECONDS)
            except KafkaException as error:
                self._note_failure(delivery, record.id, error.args[0])
                return
            else:
                return

    def _note_report(
        self, delivery: Delivery, event_id: UUID, error: KafkaError | None, message: Message
    ) -> None:
        if error is not None:
            self._note_failure(delivery, event_id, error)
            return
        delivery.postponed.pop(event_id, None)
        offset = message.offset()
        delivery.confirmed[event_id] = Coordinates(
            message.partition(), offset if offset is not None and offset >= 0 else None
        )

    def _note_failure(self, delivery: Delivery, event_id: UUID, error: KafkaError) -> None:
        if error.code() in REFUSED_FOR_GOOD:
            delivery.postponed.pop(event_id, None)
            delivery.refused[event_id] = error.str()
        else:
            delivery.postponed[event_id] = error.str()

    def _note_error(self, error: KafkaError) -> None:
        if error.fatal():
            self._fatal = error
        log.warning("kafka.client_failed", error=error.str(), is_fatal=error.fatal())


class Reader:
    """Reads the topic by assignment: it never joins a group, its commits only show its lag."""

    def __init__(self, properties: Mapping[str, str], topic: Topic) -> None:
        self._topic = topic
        self._consumer = Consumer(
            {
                "reconnect.backoff.max.ms": "1000",
                "fetch.wait.max.ms": "100",
                **properties,
                "client.id": client_id("read-back"),
                "group.id": READER_GROUP,
                "enable.auto.commit": "false",
                "enable.auto.offset.store": "false",
                "auto.offset.reset": "error",
                "allow.auto.create.topics": "false",
            },
            logger=LIBRDKAFKA,
        )

    def assign(self, partitions: int, positions: Mapping[int, int]) -> None:
        """Read all partitions, each from its position or else from its start."""
        self._consumer.assign(
            [
                TopicPartition(TOPIC, partition, positions.get(partition, OFFSET_BEGINNING))
                for partition in range(partitions)
            ]
        )

    def read(self, *, limit: int, timeout_seconds: float) -> Seen:
        """Return what there is, waiting for the first record only."""
        first = self._consumer.poll(timeout_seconds)
        messages = [] if first is None else [first, *self._consumer.consume(limit - 1, 0)]
        seen = Seen({}, 0, {})
        foreign = 0
        for message in messages:
            error = message.error()
            if error is not None:
                self._recover(error, message)
                continue
            where = Coordinates(_partition(message), message.offset())
            event_id = _event_id(message)
            if event_id is None:
                foreign += 1
            else:
                seen.events[event_id] = where
            seen.next_offsets[_partition(message)] = (message.offset() or 0) + 1
        return Seen(seen.events, foreign, seen.next_offsets)

    def commit(self, next_offsets: Mapping[int, int]) -> None:
        """Show the lag of `order-outbox`; our own positions are what counts."""
        offsets = [
            TopicPartition(TOPIC, partition, offset) for partition, offset in next_offsets.items()
        ]
        try:
            self._consumer.commit(offsets=offsets, asynchronous=True)
        except KafkaException as error:
            log.warning("offsets.not_committed", error=str(error))

    def close(self) -> None:
        """Leave the cluster."""
        self._consumer.close()

    def _recover(self, error: KafkaError, message: Message) -> None:
        """Go on at the nearer bound of the log when the position lies outside it."""
        if error.code() != KafkaError._AUTO_OFFSET_RESET:
            log.warning("kafka.read_failed", error=error.str())
            return
        partition, position = _partition(message), message.offset() or 0
        bounds = self._topic.bounds([partition])[partition]
        target = bounds.end if position > bounds.end else bounds.start
        log.error(
            "readback.position_outside_log", partition=partition, position=position, to=target
        )
        self._consumer.incremental_unassign([TopicPartition(TOPIC, partition)])
        self._consumer.incremental_assign([TopicPartition(TOPIC, partition, target)])


def _partition(message: Message) -> int:
    partition = message.partition()
    if partition is None:
        raise KafkaUnavailable("a record without a partition")
    return partition


def _event_id(message: Message) -> UUID | None:
    """Return the record's `ce_id`, or None for a record that cannot be ours."""
    try:
        headers: Any = message.headers() or ()
    except (SystemError, UnicodeDecodeError):
        # A name that is not UTF-8 is none of ours, and the client cannot show it.
        return None
    for name, value in headers:
        if name == "ce_id":
            try:
                return UUID(value.decode() if isinstance(value, bytes) else str(value))
            except ValueError:
                return None
    return None
