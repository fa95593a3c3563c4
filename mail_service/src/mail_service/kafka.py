"""The only file that knows Kafka: one member of the group mail-service."""

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from confluent_kafka import (
    Consumer,
    KafkaError,
    KafkaException,
    Message,
    TopicCollection,
    TopicPartition,
)
from confluent_kafka.admin import AdminClient, OffsetSpec

from mail_service.telemetry import log

TOPIC = "order-created"
GROUP = "mail-service"
REQUEST_TIMEOUT_SECONDS = 10.0
# The year 9000: a producer may write any time stamp, Python's time ends with 9999.
LAST_MILLISECOND = 221_845_392_000_000
LIBRDKAFKA = logging.getLogger("librdkafka")


class KafkaUnavailable(Exception):
    """The cluster did not answer, or the topic is not there; worth another try."""


@dataclass(frozen=True, slots=True)
class Record:
    """What Kafka carries; `at` is the record's own timestamp."""

    topic_id: str
    partition: int
    offset: int
    key: bytes | None
    value: bytes | None
    headers: Sequence[tuple[str, bytes]]
    at: datetime


@dataclass(frozen=True, slots=True)
class Log:
    """A partition as the cluster has it now."""

    cluster_id: str
    topic_id: str
    partition: int
    log_start: int


class Member:
    """Reads the partitions the group gives it, each from where `place` says.

    Partitions that could not be placed yet, because the cluster or the ledger did not answer, wait
    in `place_waiting`.
    """

    def __init__(
        self,
        properties: Mapping[str, str],
        *,
        client_id: str,
        session_timeout_ms: int,
        place: Callable[[Log], int],
    ) -> None:
        self._place = place
        self._waiting: set[int] = set()
        self._placed: set[int] = set()
        self._topic_id: str | None = None
        self._admin = AdminClient({**properties, "client.id": client_id}, logger=LIBRDKAFKA)
        self._consumer = Consumer(
            {
                "reconnect.backoff.max.ms": "1000",
                "fetch.wait.max.ms": "100",
                "queued.max.messages.kbytes": "8192",
                **properties,
                "client.id": client_id,
                "group.id": GROUP,
                "session.timeout.ms": str(session_timeout_ms),
                "heartbeat.interval.ms": str(session_timeout_ms // 6),
                "partition.assignment.strategy": "cooperative-sticky",
                "enable.auto.commit": "false",
                "enable.auto.offset.store": "false",
                "auto.offset.reset": "error",
                "allow.auto.create.topics": "false",
            },
            logger=LIBRDKAFKA,
        )

    def join(self) -> None:
        """Join the group; partitions come with the next reads."""
        self._consumer.subscribe(
            [TOPIC],
            on_assign=self._on_assign,
            on_revoke=self._on_revoke,
            on_lost=self._on_revoke,
        )

    def read(self, *, limit: int, timeout_seconds: float) -> list[Record]:
        """Return what there is, waiting for the first record only."""
        first = self._consumer.poll(timeout_seconds)
        if first is None:
            return []
        rest = self._consumer.consume(limit - 1, 0) if limit > 1 else []
        return [record for message in (first, *rest) if (record := self._record(message))]

    def place_waiting(self) -> None:
        """Start reading the partitions that wait for their position."""
        if not self._waiting:
            return
        for where in self._describe(self._waiting):
            start = self._place(where)
            self._consumer.incremental_assign([TopicPartition(TOPIC, where.partition, start)])
            self._waiting.discard(where.partition)
            self._placed.add(where.partition)
            log.info("partition.placed", partition=where.partition, offset=start)

    def place_anew(self, partitions: Iterable[int]) -> None:
        """Have partitions read from their position in the ledger again."""
        for partition in self._placed.intersection(partitions):
            self._consumer.incremental_unassign([TopicPartition(TOPIC, partition)])
            self._placed.discard(partition)
            self._waiting.add(partition)

    def commit(self, next_offsets: Mapping[int, int]) -> None:
        """Tell the group how far we are: a witness, the ledger is what counts."""
        offsets = [
            TopicPartition(TOPIC, partition, offset) for partition, offset in next_offsets.items()
        ]
        try:
            self._consumer.commit(offsets=offsets, asynchronous=True)
        except KafkaException as error:
            log.warning("offsets.not_committed", error=str(error))

    def pause(self) -> None:
        """Fetch nothing, and stay in the group by reading on."""
        self._consumer.pause(self._consumer.assignment())

    def resume(self) -> None:
        """Fetch again."""
        self._consumer.resume(self._consumer.assignment())

    def leave(self) -> None:
        """Leave the group, so that others have the partitions at once."""
        self._consumer.close()

    def _on_assign(self, consumer: Consumer, partitions: list[TopicPartition]) -> None:
        # Nothing is read before its position is known: librdkafka would start at the commit.
        consumer.incremental_assign([])
        self._waiting |= {partition.partition for partition in partitions}

    def _on_revoke(self, consumer: Consumer, partitions: list[TopicPartition]) -> None:
        gone = {partition.partition for partition in partitions}
        consumer.incremental_unassign(
            [TopicPartition(TOPIC, partition) for partition in sorted(gone & self._placed)]
        )
        self._waiting -= gone
        self._placed -= gone

    def _record(self, message: Message) -> Record | None:
        error = message.error()
        partition = message.partition()
        if error is not None:
            self._note_error(error, partition)
            return None
        if partition not in self._placed or self._topic_id is None:
            return None
        _, milliseconds = message.timestamp()
        return Record(
            topic_id=self._topic_id,
            partition=partition,
            offset=message.offset() or 0,
            key=_bytes(message.key()),
            value=_bytes(message.value()),
            headers=_headers(message),
            at=datetime.fromtimestamp(min(max(milliseconds, 0), LAST_MILLISECOND) / 1000, UTC),
        )

    def _note_error(self, error: KafkaError, partition: int | None) -> None:
        if error.code() == KafkaError._AUTO_OFFSET_RESET:
            log.error("position.outside_log", partition=partition)
        else:
            log.warning("kafka.read_failed", error=error.str())

    def _describe(self, partitions: Iterable[int]) -> list[Log]:
        """Ask the cluster for the topic's id and where each partition's log starts.

        A partition without a leader is left out: it must not keep the others waiting.
        """
        asked = {
            TopicPartition(TOPIC, partition): OffsetSpec.earliest() for partition in partitions
        }
        try:
            cluster = self._admin.describe_cluster(request_timeout=REQUEST_TIMEOUT_SECONDS)
            topics = self._admin.describe_topics(
                TopicCollection([TOPIC]), request_timeout=REQUEST_TIMEOUT_SECONDS
            )
            starts = self._admin.list_offsets(asked, request_timeout=REQUEST_TIMEOUT_SECONDS)
            cluster_id = str(cluster.result(REQUEST_TIMEOUT_SECONDS).cluster_id)
            self._topic_id = str(topics[TOPIC].result(REQUEST_TIMEOUT_SECONDS).topic_id)
        except (KafkaException, TimeoutError) as error:
            raise KafkaUnavailable(str(error)) from error
        found = []
        for where, start in starts.items():
            try:
                offset = start.result(REQUEST_TIMEOUT_SECONDS).offset
            except (KafkaException, TimeoutError) as error:
                log.warning("partition.not_placed", partition=where.partition, error=str(error))
            else:
                found.append(Log(cluster_id, self._topic_id, where.partition, offset))
        return found


def _bytes(value: str | bytes | None) -> bytes | None:
    return value.encode() if isinstance(value, str) else value


def _headers(message: Message) -> Sequence[tuple[str, bytes]]:
    try:
        headers: Any = message.headers() or ()
    except (SystemError, UnicodeDecodeError):
        # A name that is not UTF-8: the client cannot show the headers. They are as good as none.
        return []
    return [(name, _bytes(value) or b"") for name, value in headers]
