"""The only file that knows Kafka: the topic, the publisher, the reader."""

import logging
import socket
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
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
from confluent_kafka.admin import AdminClient, ConfigResource, NewTopic, OffsetSpec

from order_service.telemetry import log, readback_gaps

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
REASON_SECONDS = 0.5
QUEUE_FULL_WAIT_SECONDS = 0.1
# How long a batch may wait for room in the client's queue, all its records together.
QUEUE_FULL_SECONDS = 10.0
STOP_GRACE_SECONDS = 5.0
DESCRIBE_SECONDS = 30.0
SILENCE_SECONDS = 30.0
READ_RECORDS = 1_000

# No broker will ever take such a record; every other error is worth another try.
REFUSED_FOR_GOOD = frozenset(
    {KafkaError.MSG_SIZE_TOO_LARGE, KafkaError.INVALID_MSG, KafkaError._INVALID_ARG}
)


class KafkaUnavailable(Exception):
    """The cluster did not answer, or the topic is not there; worth another try."""


class PropertyRefused(Exception):
    """A KAFKA_… setting that the client does not know, or a value that it does not take."""


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
    replication: int


@dataclass(frozen=True, slots=True)
class TopicCheck:
    """How the topic differs from its declaration: what is refused, and what is only said."""

    faults: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


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
class Record:
    """A record as the topic has it; what is not UTF-8 in a header has question marks."""

    partition: int
    offset: int
    key: bytes | None
    value: bytes | None
    headers: Mapping[str, str]
    timestamp_ms: int


@dataclass(frozen=True, slots=True)
class Batch:
    """Some records as read, and the first offset not read of each partition that moved."""

    records: list[Record]
    next_offsets: dict[int, int]


def client_id(role: str) -> str:
    """Name a client in the broker's logs and quotas."""
    return f"order-service-{role}-{socket.gethostname()}"


class Topic:
    """The topic order-created, as administrators see it.

    Whatever is asked here raises KafkaUnavailable when there is no answer.
    """

    def __init__(self, properties: Mapping[str, str]) -> None:
        with _configured():
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
        """Return id, partitions and replication; a topic that is not there is no answer either."""
        with _answered():
            future = self._admin.describe_topics(
                TopicCollection([TOPIC]), request_timeout=REQUEST_TIMEOUT_SECONDS
            )[TOPIC]
            found = future.result(REQUEST_TIMEOUT_SECONDS)
        replication = min(len(partition.replicas) for partition in found.partitions)
        return TopicState(str(found.topic_id), len(found.partitions), replication)

    def settings(self) -> dict[str, str]:
        """Return the topic's settings, defaults of the cluster included."""
        resource = ConfigResource(ConfigResource.Type.TOPIC, TOPIC)
        with _answered():
            future = self._admin.describe_configs(
                [resource], request_timeout=REQUEST_TIMEOUT_SECONDS
            )[resource]
            found = future.result(REQUEST_TIMEOUT_SECONDS)
        return {name: entry.value for name, entry in found.items()}

    def check(self) -> TopicCheck:
        """Compare the topic with its declaration."""
        state, brokers = self.describe(), self._brokers()
        check = TopicCheck()
        if state.partitions < PARTITIONS:
            check.faults.append(f"{state.partitions} partitions instead of {PARTITIONS}")
        if state.partitions > PARTITIONS:
            check.warnings.append(f"{state.partitions} partitions instead of {PARTITIONS}")
        if state.replication < (wanted := min(REPLICATION_WANTED, brokers)):
            check.faults.append(f"replication {state.replication} instead of {wanted}")
        try:
            check.faults.extend(_setting_faults(self.settings(), state.replication))
        except KafkaUnavailable as error:
            # Whoever publishes need not have the right to see them.
            check.warnings.append(f"its settings cannot be read: {error}")
        return check

    def bounds(self, partitions: Iterable[int]) -> dict[int, Bounds]:
        """Ask the broker where each partition starts and ends, now."""
        asked = list(partitions)
        starts = self._list_offsets(asked, OffsetSpec.earliest())
        ends = self._list_offsets(asked, OffsetSpec.latest())
        return {partition: Bounds(start, ends[partition]) for partition, start in starts.items()}

    def offsets_at(self, moment: datetime, partitions: Iterable[int]) -> dict[int, int]:
        """Return the first offset of each partition whose record is of `moment` or later."""
        asked = list(partitions)
        # Kafka counts from 1970, and means something else by what is negative.
        milliseconds = max(0, int(moment.timestamp() * 1000))
        found = self._list_offsets(asked, OffsetSpec.for_timestamp(milliseconds))
        ends = self._list_offsets(asked, OffsetSpec.latest())
        # The broker says -1 where every record is older.
        return {
            partition: offset if offset >= 0 else ends[partition]
            for partition, offset in found.items()
        }

    def list_all(self) -> dict[str, int]:
        """Return how many partitions each topic of the cluster has."""
        with _answered():
            found = self._admin.list_topics(timeout=REQUEST_TIMEOUT_SECONDS).topics
        return {name: len(topic.partitions) for name, topic in found.items()}

    def ensure(self) -> bool:
        """Create the topic as declared; return whether it was missing."""
        replication = min(REPLICATION_WANTED, self._brokers())
        settings = {
            **TOPIC_SETTINGS,
            "min.insync.replicas": str(min(MIN_INSYNC_REPLICAS_WANTED, replication)),
        }
        topic = NewTopic(TOPIC, PARTITIONS, replication, config=settings)
        with _answered():
            try:
                self._admin.create_topics([topic])[TOPIC].result(REQUEST_TIMEOUT_SECONDS)
            except KafkaException as error:
                if error.args[0].code() != KafkaError.TOPIC_ALREADY_EXISTS:
                    raise
                return False
        return True

    def _brokers(self) -> int:
        with _answered():
            return len(self._admin.list_topics(timeout=REQUEST_TIMEOUT_SECONDS).brokers)

    def _list_offsets(self, partitions: Iterable[int], spec: OffsetSpec) -> dict[int, int]:
        asked = {TopicPartition(TOPIC, partition): spec for partition in partitions}
        with _answered():
            answers = self._admin.list_offsets(asked, request_timeout=REQUEST_TIMEOUT_SECONDS)
            return {
                where.partition: answer.result(REQUEST_TIMEOUT_SECONDS).offset
                for where, answer in answers.items()
            }


@contextmanager
def _configured() -> Iterator[None]:
    """Turn what librdkafka says of its properties into PropertyRefused."""
    try:
        yield
    except KafkaException as error:
        raise PropertyRefused(error.args[0].str()) from error


@contextmanager
def _answered() -> Iterator[None]:
    """Turn every way in which a cluster does not answer into KafkaUnavailable."""
    try:
        yield
    except KafkaException as error:
        raise KafkaUnavailable(error.args[0].str()) from error
    except TimeoutError as error:
        raise KafkaUnavailable(f"no answer within {REQUEST_TIMEOUT_SECONDS:g} s") from error


def _setting_faults(settings: Mapping[str, str], replication: int) -> Iterator[str]:
    cleanup_policy, retention_ms = settings["cleanup.policy"], int(settings["retention.ms"])
    if cleanup_policy != TOPIC_SETTINGS["cleanup.policy"]:
        yield f"cleanup.policy={cleanup_policy} instead of {TOPIC_SETTINGS['cleanup.policy']}"
    if 0 <= retention_ms < int(TOPIC_SETTINGS["retention.ms"]):
        yield f"retention.ms={retention_ms}, less than {TOPIC_SETTINGS['retention.ms']}"
    # A broker caps such a minimum in silence, and one replica then is enough (KAFKA-21110).
    in_sync = int(settings["min.insync.replicas"])
    if in_sync > replication:
        yield f"min.insync.replicas={in_sync} with replication {replication}"


class Publisher:
    """Publishes batches; the relay's only way to write to the topic."""

    def __init__(self, properties: Mapping[str, str], stop: threading.Event) -> None:
        self._stop = stop
        self._fatal: KafkaError | None = None
        with _configured():
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
        try:
            return self._publish(records)
        except KafkaException as error:
            # Out of a poll comes only what is fatal, and the error callback may not hear of it.
            raise self._failed(error.args[0]) from error

    def _publish(self, records: Sequence[Outgoing]) -> Delivery:
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
        deadline = time.monotonic() + QUEUE_FULL_SECONDS
        for record in records:
            self._produce(record, delivery, deadline)
        deadline = time.monotonic() + DELIVERY_TIMEOUT_MS / 1000 + REQUEST_TIMEOUT_SECONDS
        while len(self._producer) and time.monotonic() < deadline and not self._fatal:
            self._producer.poll(QUEUE_FULL_WAIT_SECONDS)
            if self._stop.is_set():
                self._producer.flush(STOP_GRACE_SECONDS)
                break
        if self._fatal:
            raise self._failed(self._fatal)
        return delivery

    def _failed(self, error: KafkaError) -> PublisherFailed:
        """Say why: the error callback knows more than a call that fails, and a poll lets it."""
        with suppress(KafkaException):
            self._producer.poll(REASON_SECONDS)
        return PublisherFailed((self._fatal or error).str())

    def _produce(self, record: Outgoing, delivery: Delivery, deadline: float) -> None:
        def report(error: KafkaError | None, message: Message) -> None:
            self._note_report(delivery, record.id, error, message)

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
        if error.code() == KafkaError._FATAL:
            self._fatal = self._fatal or error
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

    def __init__(self, properties: Mapping[str, str], topic: Topic, *, role: str) -> None:
        self._topic = topic
        self._next_offsets: dict[int, int] = {}
        with _configured():
            self._consumer = Consumer(
                {
                    "reconnect.backoff.max.ms": "1000",
                    "fetch.wait.max.ms": "100",
                    **properties,
                    "client.id": client_id(role),
                    "group.id": READER_GROUP,
                    "enable.auto.commit": "false",
                    "enable.auto.offset.store": "false",
                    "auto.offset.reset": "error",
                    "allow.auto.create.topics": "false",
                    # Not every offset holds a record: a transaction's marker does not.
                    "enable.partition.eof": "true",
                },
                logger=LIBRDKAFKA,
            )

    def assign(self, partitions: Iterable[int], positions: Mapping[int, int]) -> None:
        """Read these partitions, each from its position or else from its start."""
        self._consumer.assign(
            [
                TopicPartition(TOPIC, partition, positions.get(partition, OFFSET_BEGINNING))
                for partition in partitions
            ]
        )

    def read(self, *, limit: int, timeout_seconds: float) -> Batch:
        """Return what there is, waiting for the first record only.

        A position outside the log goes to the nearer bound, which is then the first offset not
        read: what lies between was not seen, and the batch does not pretend so.
        """
        first = self._consumer.poll(timeout_seconds)
        messages = [] if first is None else [first, *self._consumer.consume(limit - 1, 0)]
        records: list[Record] = []
        next_offsets: dict[int, int] = {}
        for message in messages:
            error = message.error()
            if error is None:
                records.append(_record(message))
                next_offsets[records[-1].partition] = records[-1].offset + 1
            elif error.code() == KafkaError._PARTITION_EOF:
                next_offsets[_known(message.partition())] = _known(message.offset())
            elif error.code() == KafkaError._AUTO_OFFSET_RESET:
                next_offsets |= self._recover(message)
            else:
                log.warning("kafka.read_failed", error=error.str())
        moved = dict(next_offsets.items() - self._next_offsets.items())
        self._next_offsets |= moved
        return Batch(records, moved)

    def read_between(
        self, starts: Mapping[int, int], ends: Mapping[int, int]
    ) -> Iterator[Sequence[Record]]:
        """Yield the records from these offsets up to those, in batches.

        Raises KafkaUnavailable when the broker is silent for 30 s.
        """
        ahead = {partition for partition, start in starts.items() if start < ends[partition]}
        self.assign(ahead, starts)
        heard_at = time.monotonic()
        while ahead:
            batch = self.read(limit=READ_RECORDS, timeout_seconds=1.0)
            yield [record for record in batch.records if record.offset < ends[record.partition]]
            ahead -= {
                partition
                for partition, offset in batch.next_offsets.items()
                if offset >= ends[partition]
            }
            if batch.next_offsets:
                heard_at = time.monotonic()
            elif time.monotonic() - heard_at > SILENCE_SECONDS:
                raise KafkaUnavailable(f"nothing was read for {SILENCE_SECONDS:g} s")

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

    def _recover(self, message: Message) -> dict[int, int]:
        """Go on at the nearer bound of the log; return that as the partition's next offset."""
        partition, position = _known(message.partition()), message.offset() or 0
        bounds = self._topic.bounds([partition])[partition]
        side, target = ("end", bounds.end) if position > bounds.end else ("start", bounds.start)
        readback_gaps.labels(side).inc()
        log.error(
            "reader.position_outside_log",
            partition=partition,
            position=position,
            start=bounds.start,
            end=bounds.end,
        )
        self._consumer.incremental_unassign([TopicPartition(TOPIC, partition)])
        self._consumer.incremental_assign([TopicPartition(TOPIC, partition, target)])
        return {partition: target}


def _record(message: Message) -> Record:
    _, milliseconds = message.timestamp()
    return Record(
        partition=_known(message.partition()),
        offset=_known(message.offset()),
        key=_bytes(message.key()),
        value=_bytes(message.value()),
        headers=_headers(message),
        timestamp_ms=milliseconds,
    )


def _known(number: int | None) -> int:
    if number is None:
        raise KafkaUnavailable("a record without its coordinates")
    return number


def _bytes(value: Any) -> bytes | None:
    return value.encode() if isinstance(value, str) else value


def _headers(message: Message) -> dict[str, str]:
    try:
        headers: Any = message.headers() or ()
    except (SystemError, UnicodeDecodeError):
        # A name that is not UTF-8 is none of ours, and the client cannot show it.
        return {}
    return {name: (value or b"").decode(errors="replace") for name, value in headers}
