"""Where this replica reads its partitions: at the ledger's positions, unless these cannot be."""

import dataclasses
from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from sqlalchemy import Connection, Engine

from mail_service import positions, startup
from mail_service.kafka import Log, Record
from mail_service.positions import EXPIRED, LOG_ENDS, NOT_UNPACKED, Move, Start
from mail_service.startup import StartUpRefused
from mail_service.telemetry import log


class Places:
    """The positions as this replica last knew them, and what it found amiss."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._starts: dict[int, tuple[str, Start]] = {}
        self._gaps: dict[int, _Gap] = {}

    def moves(self, records: Sequence[Record]) -> list[Move]:
        """Say of each partition where this batch began and ends."""
        ends = {record.partition: record.offset + 1 for record in records}
        return [
            Move(topic_id, partition, start.epoch, start.next_offset, ends[partition])
            for partition, (topic_id, start) in self._starts.items()
            if partition in ends
        ]

    def note(self, moves: Sequence[Move]) -> None:
        """Remember moves that were committed."""
        for move in moves:
            _, start = self._starts[move.partition]
            start = dataclasses.replace(start, next_offset=move.next_offset)
            self._starts[move.partition] = (move.topic_id, start)

    def known(self, partition: int) -> Start:
        """Return how a partition that is being read was last found in the ledger."""
        return self._starts[partition][1]

    def astray(self, connection: Connection, partitions: Collection[int]) -> set[int]:
        """Return those partitions that the ledger has elsewhere.

        A person has moved them, or the whole ledger was set back.
        """
        by_topic: dict[str, dict[int, Start]] = defaultdict(dict)
        for partition in partitions:
            topic_id, start = self._starts[partition]
            by_topic[topic_id][partition] = start
        there = [
            positions.are_at(connection, topic_id, starts) for topic_id, starts in by_topic.items()
        ]
        return set(partitions).difference(*there)

    def start_of(self, where: Log) -> Start:
        """Return where the ledger is.

        Raises StartUpRefused when this ledger cannot be the one that the group worked with, or
        would forget mails before the topic forgets their records.
        """
        startup.require(startup.retention_faults(where.retention_ms))
        with self._engine.begin() as connection:
            start = positions.start_of(
                connection,
                cluster_id=where.cluster_id,
                topic_id=where.topic_id,
                partition=where.partition,
                log_start=where.start,
            )
        _require_same_past(where, start)
        return start

    def place(self, where: Log) -> int | None:
        """Return the ledger's position; None while it lies outside the log, which is a gap.

        Raises StartUpRefused.
        """
        start = self.start_of(where)
        gap = _gap(where, start.next_offset)
        if gap is None:
            self._gaps.pop(where.partition, None)
            self._starts[where.partition] = (where.topic_id, start)
            return start.next_offset
        # The log's end was asked for before the position was read, and both may have moved: what
        # is found twice is so, and began where it was found first.
        earlier = self._gaps.get(where.partition)
        if earlier is not None and earlier.reason == gap.reason:
            self._note_gap(where, earlier, start.next_offset)
        else:
            self._gaps[where.partition] = gap
        return None

    def _note_gap(self, where: Log, gap: "_Gap", position: int) -> None:
        with self._engine.begin() as connection:
            is_new = positions.note_gap(
                connection,
                topic_id=where.topic_id,
                partition=where.partition,
                position=position,
                first_offset=gap.first_offset,
                end_offset=gap.end_offset,
                reason=gap.reason,
            )
        if is_new:
            log.error("gap.found", partition=where.partition, **dataclasses.asdict(gap))


def _require_same_past(where: Log, start: Start) -> None:
    """Refuse a ledger that was lost, restored to an earlier state, or is another group's."""
    if start.cluster_id != where.cluster_id:
        raise StartUpRefused(
            f"the ledger's position of partition {where.partition} is of the cluster"
            f" {start.cluster_id}, this one is {where.cluster_id}"
        )
    # Where a person has said so the group may have been further.
    known = max(start.next_offset, start.accepted_until)
    if where.committed is not None and where.committed > known:
        raise StartUpRefused(
            f"the group has committed offset {where.committed} of partition {where.partition}, the"
            f" ledger knows only up to {start.next_offset}: it was lost, restored or is another's;"
            " mails would be sent again (`mail-service positions rewind` holds them)"
        )


@dataclass(frozen=True, slots=True)
class _Gap:
    first_offset: int
    end_offset: int
    reason: str


def _gap(where: Log, position: int) -> _Gap | None:
    """Say what of a log cannot be read, or was there and is no more."""
    if where.unreadable_at == position:
        return _Gap(position, position + 1, NOT_UNPACKED)
    if position < where.start:
        return _Gap(position, where.start, EXPIRED)
    if position > where.end:
        return _Gap(where.end, position, LOG_ENDS)
    return None
