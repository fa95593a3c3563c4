"""Where each partition is read from: a row of the ledger, moved in the transaction of a take-in.

What cannot be read is a gap, and waits for a person. A person who moves a position raises its
epoch: a take-in that began before it writes nothing.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, text

from mail_service.models import columns

# All or none, in the statement that takes the batch in: what comes after it asks `may.move`.
# Forward only, and only from where this take-in began: a position that was set back in between,
# by a restore or an operator, must be read from anew, not jumped over.
MOVE = """
    batch AS (
        SELECT *
          FROM unnest(CAST(:moved_topic_ids AS text[]), CAST(:moved_partitions AS integer[]),
                      CAST(:moved_epochs AS integer[]), CAST(:moved_began_ats AS bigint[]),
                      CAST(:moved_next_offsets AS bigint[]))
               AS batch (topic_id, partition, epoch, began_at, next_offset)
    ), found AS (
        SELECT topic_id, partition, batch.next_offset
          FROM positions JOIN batch USING (topic_id, partition)
         WHERE positions.epoch = batch.epoch AND positions.next_offset >= batch.began_at
           AND NOT (SELECT is_paused FROM control)
         ORDER BY topic_id, partition
           FOR UPDATE OF positions
    ), may AS (
        SELECT (SELECT count(*) FROM found) = (SELECT count(*) FROM batch) AS move
    ), moved AS (
        UPDATE positions
           SET next_offset = greatest(positions.next_offset, found.next_offset)
          FROM found, may
         WHERE may.move
           AND positions.topic_id = found.topic_id AND positions.partition = found.partition
    )
"""

_POSITION = text("""
    SELECT next_offset, epoch, cluster_id, held_until, accepted_until, released_at
      FROM positions
     WHERE topic_id = :topic_id AND partition = :partition
""")

_OPEN_POSITION = text("""
    INSERT INTO positions (cluster_id, topic_id, partition, next_offset)
    VALUES (:cluster_id, :topic_id, :partition, :next_offset)
    ON CONFLICT (topic_id, partition) DO NOTHING
""")

_CLOSE_EARLIER_TOPICS = text("""
    INSERT INTO gaps (topic_id, partition, first_offset, reason)
    SELECT topic_id, partition, next_offset, 'topic recreated'
      FROM positions
     WHERE partition = :partition AND topic_id <> :topic_id
    ON CONFLICT (topic_id, partition, first_offset) DO NOTHING
""")

# Only while the position is where the gap was found. One that was accepted may stop it once more.
_NOTE_GAP = text("""
    INSERT INTO gaps (topic_id, partition, first_offset, end_offset, reason)
    SELECT topic_id, partition, :first_offset, :end_offset, :reason
      FROM positions
     WHERE topic_id = :topic_id AND partition = :partition AND next_offset = :position
    ON CONFLICT (topic_id, partition, first_offset) DO UPDATE
       SET end_offset = excluded.end_offset, reason = excluded.reason, found_at = now(),
           accepted_at = NULL
     WHERE gaps.accepted_at IS NOT NULL
""")


_ALL = text("""
    SELECT partition, next_offset, epoch FROM positions WHERE topic_id = :topic_id
""")

_OPEN_GAPS = text("""
    SELECT id, topic_id, partition, first_offset, end_offset, reason, found_at
      FROM gaps WHERE accepted_at IS NULL ORDER BY id
""")

_ACCEPT_GAP = text("""
    UPDATE gaps SET accepted_at = now() WHERE id = :id AND accepted_at IS NULL RETURNING id
""")

_GO_ON = text("""
    UPDATE positions
       SET next_offset = :next_offset, epoch = epoch + 1, released_at = now(),
           accepted_until = greatest(accepted_until, next_offset)
     WHERE topic_id = :topic_id AND partition = :partition
""")

_REWIND = text("""
    UPDATE positions
       SET next_offset = least(next_offset, :next_offset), epoch = epoch + 1,
           held_until = greatest(held_until, :held_until),
           accepted_until = greatest(accepted_until, next_offset, :held_until)
     WHERE topic_id = :topic_id AND partition = :partition
""")

EXPIRED = "expired before it was read"
NOT_UNPACKED = "it cannot be unpacked"
LOG_ENDS = "the log ends before the position"


class PositionMoved(Exception):
    """The position is not where this take-in began: nothing was written; seek anew."""


@dataclass(frozen=True, slots=True)
class Move:
    """A partition read from `began_at` up to, not including, `next_offset`."""

    topic_id: str
    partition: int
    epoch: int
    began_at: int
    next_offset: int


@dataclass(frozen=True, slots=True)
class Start:
    """Where to read a partition from, and what goes with it; `models.Position` says what."""

    next_offset: int
    epoch: int
    cluster_id: str
    held_until: int
    accepted_until: int
    released_at: datetime | None


@dataclass(frozen=True, slots=True)
class Gap:
    """Offsets that were never read, found by a replica; a topic that is no more has no end."""

    id: int
    topic_id: str
    partition: int
    first_offset: int
    end_offset: int | None
    reason: str
    found_at: datetime


def as_moved(moves: Sequence[Move]) -> dict[str, list[Any]]:
    """Return what `MOVE` is to be told of a batch."""
    return columns(moves, Move, prefix="moved_")


def start_of(
    connection: Connection, *, cluster_id: str, topic_id: str, partition: int, log_start: int
) -> Start:
    """Return where a partition is to be read from; one never read is opened at its log's start.

    What was not read of a topic that is no more becomes a gap.
    """
    where = {"topic_id": topic_id, "partition": partition}
    is_new = connection.execute(
        _OPEN_POSITION, {**where, "cluster_id": cluster_id, "next_offset": log_start}
    ).rowcount
    if is_new:
        connection.execute(_CLOSE_EARLIER_TOPICS, where)
    row = connection.execute(_POSITION, where).one()
    return Start(**row._mapping)


def note_gap(
    connection: Connection,
    *,
    topic_id: str,
    partition: int,
    position: int,
    first_offset: int,
    end_offset: int,
    reason: str,
) -> bool:
    """Write down offsets that cannot be read from a position; return whether this is new."""
    noted = connection.execute(
        _NOTE_GAP,
        {
            "topic_id": topic_id,
            "partition": partition,
            "position": position,
            "first_offset": first_offset,
            "end_offset": end_offset,
            "reason": reason,
        },
    )
    return noted.rowcount > 0


def next_offsets(connection: Connection, topic_id: str) -> dict[int, int]:
    """Return how far each partition of a topic was taken in."""
    rows = connection.execute(_ALL, {"topic_id": topic_id})
    return {row.partition: row.next_offset for row in rows}


def are_at(connection: Connection, topic_id: str, starts: Mapping[int, Start]) -> set[int]:
    """Return those partitions of a topic that are just where they were found last."""
    rows = connection.execute(_ALL, {"topic_id": topic_id})
    found = {row.partition: (row.next_offset, row.epoch) for row in rows}
    return {
        partition
        for partition, start in starts.items()
        if found.get(partition) == (start.next_offset, start.epoch)
    }


def open_gaps(connection: Connection) -> list[Gap]:
    """Return the gaps that wait for a person, as they were found."""
    return [Gap(**row._mapping) for row in connection.execute(_OPEN_GAPS)]


def accept_gap(connection: Connection, gap: Gap, *, go_on_at: int | None = None) -> int | None:
    """Go on behind a gap; return from where, or None when there is nothing to go on with.

    Mails taken in from then on have their full time again. A log that ends before the position goes
    on at that end: what was written since is new. Raises PositionMoved when somebody was faster.
    """
    if connection.execute(_ACCEPT_GAP, {"id": gap.id}).one_or_none() is None:
        raise PositionMoved
    next_offset = gap.first_offset if gap.reason == LOG_ENDS else go_on_at or gap.end_offset
    if next_offset is not None:
        connection.execute(
            _GO_ON,
            {
                "topic_id": gap.topic_id,
                "partition": gap.partition,
                "next_offset": next_offset,
            },
        )
    return next_offset


def rewind(
    connection: Connection,
    *,
    topic_id: str,
    partition: int,
    next_offset: int,
    held_until: int,
) -> None:
    """Read a partition again from `next_offset`, never from later than now.

    What lies below `held_until` is taken in as HELD; so far a commit of the group is accepted.
    """
    connection.execute(
        _REWIND,
        {
            "topic_id": topic_id,
            "partition": partition,
            "next_offset": next_offset,
            "held_until": held_until,
        },
    )
