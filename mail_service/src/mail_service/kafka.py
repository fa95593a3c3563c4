"""The only file that knows Kafka: a member of the group mail-service, and a reader beside it."""

import logging
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Self

from confluent_kafka import (
    Consumer,
    KafkaError,
    KafkaException,
    Message,
    TopicCollection,
    TopicPartition,
)
from confluent_kafka.admin import (
    AdminClient,
    ConfigResource,
    OffsetSpec,
    ResourceType,
    TopicDescription,
)

from mail_service.telemetry import log, offsets_not_committed

TOPIC = "order-created"
GROUP = "mail-service"
REQUEST_TIMEOUT_SECONDS = 10.0
# How long a topic that was deleted and made anew is taken for the old one.
DESCRIBE_SECONDS = 30.0
# How soon a partition is looked at again for which a person has to decide.
STOPPED_SECONDS = 2.0
JOINING_SECONDS = 5.0
# The year 9000: a producer may write any time stamp, Python's time ends with 9999.
LAST_MILLISECOND = 221_845_392_000_000
READ_RECORDS = 500
READ_SECONDS = 1.0
SILENCE_SECONDS = 30.0
NONE_UNREADABLE: Mapping[tuple[str, int], int] = {}
LIBRDKAFKA = logging.getLogger("librdkafka")


class KafkaUnavailable(Exception):
    """The cluster did not answer, or the topic is not there; worth another try."""


class PropertyRefused(Exception):
    """A KAFKA_… setting that the client does not know, or a value that it does not take."""


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
    """A partition as the cluster has it now: from `start` up to, not including, `end`.

    `committed` is how far the group says it is, a witness only. The topic keeps records for
    `retention_ms`; None is for ever, or nobody may ask. What begins at `unreadable_at` came and
    could not be unpacked.
    """

    cluster_id: str
    topic_id: str
    partition: int
    start: int
    end: int
    committed: int | None
    retention_ms: int | None
    unreadable_at: int | None


class Topic:
    """The topic, and how far the group is in it, as the cluster has them."""

    def __init__(
        self, properties: Mapping[str, str], *, client_id: str, consumer: Consumer | None = None
    ) -> None:
        named: dict[str, Any] = {**properties, "client.id": client_id}
        with _configured():
            self._admin = AdminClient(named, logger=LIBRDKAFKA)
            # The admin client's own list_consumer_group_offsets ends the process when the
            # coordinator is not there yet (librdkafka issue 5040).
            self._consumer = consumer or Consumer({**named, "group.id": GROUP}, logger=LIBRDKAFKA)

    def id(self) -> str:
        """Return the topic's id, which no topic of this name made later has."""
        return str(self._described().topic_id)

    def describe(
        self,
        partitions: Collection[int] | None = None,
        *,
        unreadable_at: Mapping[tuple[str, int], int] = NONE_UNREADABLE,
    ) -> list[Log]:
        """Ask for the topic's id and where each of these partitions, or of all, starts and ends.

        A named partition without a leader is left out: it must not keep the others waiting. Of all,
        none may be: raises KafkaUnavailable.
        """
        with _answered():
            cluster = self._admin.describe_cluster(request_timeout=REQUEST_TIMEOUT_SECONDS)
            cluster_id = str(cluster.result(REQUEST_TIMEOUT_SECONDS).cluster_id)
        are_all = partitions is None
        if partitions is None:
            partitions = [each.id for each in self._described().partitions]
        starts = self.starts(partitions)
        ends = self._list_offsets(partitions, OffsetSpec.latest())
        if are_all and starts.keys() & ends.keys() != set(partitions):
            raise KafkaUnavailable("a partition has no leader")
        topic_id, retention_ms = self.id(), self._retention_ms()
        committed = self._committed(partitions, topic_id)
        return [
            Log(
                cluster_id,
                topic_id,
                partition,
                starts[partition],
                ends[partition],
                committed.get(partition),
                retention_ms,
                unreadable_at.get((topic_id, partition)),
            )
            for partition in sorted(starts.keys() & ends.keys())
        ]

    def starts(self, partitions: Collection[int]) -> dict[int, int]:
        """Return the first offset of each partition."""
        return self._list_offsets(partitions, OffsetSpec.earliest())

    def offsets_at(self, moment: datetime, logs: Sequence[Log]) -> dict[int, int]:
        """Return the first offset of each partition whose record is of `moment` or later."""
        # Kafka counts from 1970, and means something else by what is negative.
        milliseconds = max(0, int(moment.timestamp() * 1000))
        spec = OffsetSpec.for_timestamp(milliseconds)
        found = self._list_offsets([where.partition for where in logs], spec)
        # The broker says -1 where every record is older.
        return {
            where.partition: offset if offset >= 0 else where.end
            for where in logs
            if (offset := found.get(where.partition)) is not None
        }

    def _described(self) -> TopicDescription:
        with _answered():
            topics = self._admin.describe_topics(
                TopicCollection([TOPIC]), request_timeout=REQUEST_TIMEOUT_SECONDS
            )
            found: TopicDescription = topics[TOPIC].result(REQUEST_TIMEOUT_SECONDS)
        return found

    def _committed(self, partitions: Collection[int], topic_id: str) -> dict[int, int]:
        """Ask for the group's commits; those into a topic that is no more say nothing."""
        asked = [TopicPartition(TOPIC, partition) for partition in partitions]
        with _answered():
            found = self._consumer.committed(asked, timeout=REQUEST_TIMEOUT_SECONDS)
        return {
            answer.partition: answer.offset
            for answer in found
            if answer.offset >= 0 and answer.metadata in {None, "", topic_id}
        }

    def _list_offsets(self, partitions: Collection[int], spec: OffsetSpec) -> dict[int, int]:
        asked = {TopicPartition(TOPIC, partition): spec for partition in partitions}
        found = {}
        if asked:
            with _answered():
                answers = self._admin.list_offsets(asked, request_timeout=REQUEST_TIMEOUT_SECONDS)
            for where, answer in answers.items():
                try:
                    found[where.partition] = answer.result(REQUEST_TIMEOUT_SECONDS).offset
                except (KafkaException, TimeoutError) as error:
                    log.warning("partition.not_placed", partition=where.partition, error=str(error))
        return found

    def _retention_ms(self) -> int | None:
        asked = ConfigResource(ResourceType.TOPIC, TOPIC)
        with _answered():
            answers = self._admin.describe_configs([asked], request_timeout=REQUEST_TIMEOUT_SECONDS)
            try:
                found = answers[asked].result(REQUEST_TIMEOUT_SECONDS)["retention.ms"].value
            except KafkaException as error:
                if error.args[0].code() != KafkaError.TOPIC_AUTHORIZATION_FAILED:
                    raise
                log.warning("topic.settings_hidden", error=error.args[0].str())
                return None
        return int(found) if int(found) >= 0 else None


class Member:
    """Reads the partitions the group gives it, each from where `place` says.

    Partitions that could not be placed yet, because the cluster or the ledger did not answer, wait
    in `place_waiting`; so do those for which `place` returns None, until a person has decided.
    """

    def __init__(
        self,
        properties: Mapping[str, str],
        *,
        client_id: str,
        session_timeout_ms: int,
        place: Callable[[Log], int | None],
    ) -> None:
        self._place = place
        self._waiting: set[int] = set()
        self._has_joined = self._is_paused = False
        self._placed: dict[int, str] = {}
        self._expected: dict[int, int] = {}
        self._said: dict[int, tuple[str, int]] = {}
        self._not_taken: set[int] = set()
        self._said_again_at = float("-inf")
        self._unreadable_at: dict[tuple[str, int], int] = {}
        self._wait_until = float("-inf")
        self._described_at = float("-inf")
        with _configured():
            self._consumer = Consumer(
                {
                    "reconnect.backoff.max.ms": "1000",
                    "fetch.wait.max.ms": "100",
                    # What is fetched ahead is bounded in bytes, and small records in number: the
                    # client needs half a kilobyte more for each.
                    "queued.max.messages.kbytes": "8192",
                    "queued.min.messages": "1000",
                    **properties,
                    "client.id": client_id,
                    "group.id": GROUP,
                    "session.timeout.ms": str(session_timeout_ms),
                    # A member hears of another one with its next heartbeat, and twice.
                    "heartbeat.interval.ms": str(min(3_000, session_timeout_ms // 6)),
                    "partition.assignment.strategy": "cooperative-sticky",
                    "enable.auto.commit": "false",
                    "enable.auto.offset.store": "false",
                    "auto.offset.reset": "error",
                    "allow.auto.create.topics": "false",
                    "on_commit": self._note_commit,
                },
                logger=LIBRDKAFKA,
            )
        self.topic = Topic(properties, client_id=client_id, consumer=self._consumer)

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

    @property
    def has_joined(self) -> bool:
        """Whether the group has said which partitions are this replica's, if only none."""
        return self._has_joined

    @property
    def placed(self) -> Collection[int]:
        """The partitions that this replica reads."""
        return self._placed.keys()

    @property
    def waiting(self) -> int:
        """How many of its partitions this replica does not read."""
        return len(self._waiting)

    def place_waiting(self) -> None:
        """Start reading the partitions that wait; have those of a topic made anew placed anew."""
        now = time.monotonic()
        if self._placed and now - self._described_at > DESCRIBE_SECONDS:
            topic_id = self.topic.id()
            self.place_anew(
                [number for number, placed in self._placed.items() if placed != topic_id]
            )
            self._described_at = now
        if not self._waiting or now < self._wait_until:
            return
        for where in self.topic.describe(self._waiting, unreadable_at=self._unreadable_at):
            start = self._place(where)
            if start is None:
                self._wait_until = now + STOPPED_SECONDS
                continue
            self._consumer.incremental_assign([TopicPartition(TOPIC, where.partition, start)])
            self._waiting.discard(where.partition)
            self._placed[where.partition] = where.topic_id
            self._expected[where.partition] = start
            log.info("partition.placed", partition=where.partition, offset=start)

    def place_anew(self, partitions: Iterable[int]) -> None:
        """Have partitions read from their position in the ledger again."""
        if placed := set(partitions) & self._placed.keys():
            self._stop_reading(placed)
            self._waiting |= placed

    def commit(self, next_offsets: Mapping[int, tuple[str, int]]) -> None:
        """Tell the group how far we are, each partition with its topic's id.

        It is a witness, the ledger is what counts. What the group does not take, as while members
        come and go, is said once more.
        """
        self._said.update(next_offsets)
        offsets = [
            TopicPartition(TOPIC, partition, offset, metadata=topic_id)
            for partition, (topic_id, offset) in next_offsets.items()
        ]
        try:
            self._consumer.commit(offsets=offsets, asynchronous=True)
        except KafkaException as error:
            self._note_commit(error.args[0], offsets)

    def commit_again(self) -> None:
        """Say once more, for the partitions that are still ours, what the group did not take."""
        now = time.monotonic()
        if self._not_taken and now - self._said_again_at > STOPPED_SECONDS:
            said = {number: self._said[number] for number in self._not_taken & self._placed.keys()}
            self._not_taken.clear()
            self._said_again_at = now
            if said:
                self.commit(said)

    def _note_commit(self, error: KafkaError | None, partitions: Sequence[TopicPartition]) -> None:
        if error is not None:
            self._not_taken |= {partition.partition for partition in partitions}
            offsets_not_committed.inc()
            log.warning("offsets.not_committed", error=error.str())

    def pause(self) -> None:
        """Fetch nothing, and stay in the group by reading on."""
        self._is_paused = True
        self._consumer.pause(self._consumer.assignment())

    def resume(self) -> None:
        """Fetch again, unless it does."""
        if self._is_paused:
            self._is_paused = False
            self._consumer.resume(self._consumer.assignment())

    def leave(self) -> None:
        """Leave the group, so that others have the partitions at once.

        One that is still joining cannot be left, and would hold its partitions for a session: its
        end is awaited for a while.
        """
        give_up_at = time.monotonic() + JOINING_SECONDS
        while not self._has_joined and time.monotonic() < give_up_at:
            self._consumer.poll(0.1)
        self._consumer.close()

    def _on_assign(self, consumer: Consumer, partitions: list[TopicPartition]) -> None:
        # Nothing is read before its position is known: librdkafka would start at the commit.
        consumer.incremental_assign([])
        self._has_joined = True
        self._waiting |= {partition.partition for partition in partitions}
        self._wait_until = float("-inf")

    def _on_revoke(self, _: Consumer, partitions: list[TopicPartition]) -> None:
        gone = {partition.partition for partition in partitions}
        self._stop_reading(gone & self._placed.keys())
        self._waiting -= gone
        # Whoever has it now says more: what we said would take the group's commit back.
        self._not_taken -= gone

    def _stop_reading(self, placed: Collection[int]) -> None:
        """Read none of these any more."""
        asked = [TopicPartition(TOPIC, partition) for partition in sorted(placed)]
        # librdkafka keeps a pause for a partition that goes and comes again: nobody would end it.
        self._consumer.resume(asked)
        self._consumer.incremental_unassign(asked)
        for partition in placed:
            del self._placed[partition]

    def _record(self, message: Message) -> Record | None:
        error, partition = message.error(), message.partition()
        if error is not None:
            self._note_error(error, partition, message.offset())
            return None
        topic_id = self._placed.get(partition) if partition is not None else None
        if partition is None or topic_id is None:
            return None
        record = _record(message, topic_id)
        self._expected[partition] = record.offset + 1
        return record

    def _note_error(self, error: KafkaError, partition: int | None, offset: int | None) -> None:
        code = error.code()
        if code == KafkaError._AUTO_OFFSET_RESET and partition is not None:
            # Placed anew, it is found to lie outside the log, and the gap is written down.
            log.error("position.outside_log", partition=partition)
            self.place_anew([partition])
        elif (
            code == KafkaError._BAD_COMPRESSION and partition in self._placed and offset is not None
        ):
            # It would be fetched again and again; as a gap it waits for a person. The error names
            # the batch's first offset, which a person may have gone beyond already.
            offset = max(offset, self._expected[partition])
            log.error("record.not_unpacked", partition=partition, offset=offset)
            self._unreadable_at[self._placed[partition], partition] = offset
            self.place_anew([partition])
        else:
            log.warning("kafka.read_failed", error=error.str())

    def log_starts(self) -> dict[int, tuple[str, int]]:
        """Return topic id and first offset of each partition that is read."""
        starts = self.topic.starts(self._placed)
        return {number: (self._placed[number], start) for number, start in starts.items()}


class Reader:
    """Reads ranges of the topic beside the group: it joins nothing and commits nothing."""

    def __init__(self, properties: Mapping[str, str], *, client_id: str) -> None:
        with _configured():
            self._consumer = Consumer(
                {
                    "reconnect.backoff.max.ms": "1000",
                    "fetch.wait.max.ms": "100",
                    **properties,
                    "client.id": client_id,
                    # The client demands one, even of whom it only assigns.
                    "group.id": GROUP,
                    "enable.auto.commit": "false",
                    "enable.auto.offset.store": "false",
                    "auto.offset.reset": "earliest",
                    "allow.auto.create.topics": "false",
                    # Not every offset holds a record: a transaction's marker does not.
                    "enable.partition.eof": "true",
                },
                logger=LIBRDKAFKA,
            )

    def __enter__(self) -> Self:
        """Nothing is read yet."""
        return self

    def __exit__(self, *_: object) -> None:
        """Leave the cluster."""
        self._consumer.close()

    def read_between(self, ranges: Mapping[int, range], *, topic_id: str) -> Iterator[list[Record]]:
        """Yield each partition's records in its range of offsets, in batches.

        Raises KafkaUnavailable when the broker is silent for 30 s.
        """
        ends = {partition: wanted.stop for partition, wanted in ranges.items() if wanted}
        self._consumer.assign(
            [TopicPartition(TOPIC, partition, ranges[partition].start) for partition in ends]
        )
        heard_at = time.monotonic()
        while ends:
            records = []
            first = self._consumer.poll(READ_SECONDS)
            rest = [] if first is None else self._consumer.consume(READ_RECORDS, 0)
            for message in (first, *rest) if first is not None else ():
                partition, offset = message.partition() or 0, message.offset() or 0
                if _is_heard(message):
                    heard_at = time.monotonic()
                if message.error() is None and offset < ends.get(partition, 0):
                    records.append(_record(message, topic_id))
                if _is_past(message, ends.get(partition)):
                    del ends[partition]
            if records:
                yield records
            if time.monotonic() - heard_at > SILENCE_SECONDS:
                raise KafkaUnavailable(f"nothing was read for {SILENCE_SECONDS:g} s")


def _is_heard(message: Message) -> bool:
    """Say whether the broker has answered; raise KafkaUnavailable for what nobody can read."""
    error = message.error()
    if error is None or error.code() == KafkaError._PARTITION_EOF:
        return True
    if error.code() == KafkaError._BAD_COMPRESSION:
        where = f"partition {message.partition()}, offset {message.offset()}"
        raise KafkaUnavailable(f"{where}: it cannot be unpacked")
    log.warning("kafka.read_failed", error=error.str())
    return False


def _is_past(message: Message, end: int | None) -> bool:
    """Say whether a partition has been read up to its end, and not been so before."""
    error = message.error()
    if end is None:
        return False
    if error is None:
        return (message.offset() or 0) + 1 >= end
    return error.code() == KafkaError._PARTITION_EOF


def _record(message: Message, topic_id: str) -> Record:
    _, milliseconds = message.timestamp()
    return Record(
        topic_id=topic_id,
        partition=message.partition() or 0,
        offset=message.offset() or 0,
        key=_bytes(message.key()),
        value=_bytes(message.value()),
        headers=_headers(message),
        at=_moment(milliseconds),
    )


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


def _moment(milliseconds: int) -> datetime:
    """Return a record's timestamp as a time; one that has none came now."""
    if milliseconds < 0:
        return datetime.now(UTC)
    return datetime.fromtimestamp(min(milliseconds, LAST_MILLISECOND) / 1000, UTC)


def _bytes(value: str | bytes | None) -> bytes | None:
    return value.encode() if isinstance(value, str) else value


def _headers(message: Message) -> Sequence[tuple[str, bytes]]:
    try:
        headers: Any = message.headers() or ()
    except (SystemError, UnicodeDecodeError):
        # A name that is not UTF-8: the client cannot show the headers. They are as good as none.
        return []
    return [(name, _bytes(value) or b"") for name, value in headers]
