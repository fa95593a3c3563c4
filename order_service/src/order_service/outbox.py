"""The outbox: one row for each event, and a statement for each arrow.

    INIT ──delivery report──▶ PUBLISHED ──seen in the topic──▶ COMPLETED ──14 days──▶ deleted
      │ ◀──────proven lost─────┘  │                               │
      │ ◀─────────────────────────│──topic recreated · republish──┘
      │ ◀──────────────retry──────│──┐
      └──cannot be published──▶ FAILED ◀──lost once too often

COMPLETED is reached from any state: what was seen in the topic is in the topic. It says nothing
about the mail. `retry` and `republish` are an operator's. Rows are selected by state, never by
`id > last` alone: a row with a lower id may commit later.

There is one event for each order today. Were a later event type to share a key, a publish that
fails would have to hold back the key's later rows: `select_init` is where that would break.
"""

import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from uuid import UUID

from sqlalchemy import Connection, text

from order_service.kafka import Coordinates, Outgoing

CHANNEL = "order_outbox"
# What is not yet seen in the topic.
OPEN = ("INIT", "PUBLISHED", "FAILED")
# Tells the active relay that there is work; when it does not hear, it polls. Sent after the order's
# commit: inside its transaction it would make all commits of the database wait for each other.
WAKE_RELAY = f"NOTIFY {CHANNEL}"
MAX_REPUBLICATIONS = 3
REPUBLISH_BASE_SECONDS = 5
COMPLETED_KEPT_DAYS = 14
DAY_SECONDS = 24 * 60 * 60
PURGE_ROWS = 1_000
# Nobody acts differently on more, and counting would take longer.
MOST_COUNTED = 100_000

# A row that somebody holds could not be marked, and would be published again and again: it is left
# out here, and one that is held since is left in INIT by the mark.
_SELECT_INIT = text("""
    SELECT id, aggregateid, payload, headers, occurred_at FROM outbox
     WHERE state = 'INIT' AND due_at <= now() AND (CAST(:after AS uuid) IS NULL OR id > :after)
     ORDER BY id
     LIMIT :limit
       FOR UPDATE SKIP LOCKED
""")

_INIT_TO_PUBLISHED = text("""
    UPDATE outbox
       SET state = 'PUBLISHED', published_at = clock_timestamp(),
           topic_id = :topic_id, partition = report.partition, "offset" = report."offset"
      FROM (SELECT held.id, told.partition, told."offset"
              FROM unnest(CAST(:ids AS uuid[]), CAST(:partitions AS integer[]),
                          CAST(:offsets AS bigint[])) AS told (id, partition, "offset")
              JOIN outbox AS held ON held.id = told.id AND held.state = 'INIT'
               FOR UPDATE OF held SKIP LOCKED) AS report
     WHERE outbox.id = report.id
""")

_INIT_TO_FAILED = text("""
    UPDATE outbox SET state = 'FAILED', reason = :reason WHERE id = :id AND state = 'INIT'
""")

_ANY_TO_COMPLETED = text("""
    UPDATE outbox
       SET state = 'COMPLETED', completed_at = clock_timestamp(), reason = NULL,
           published_at = coalesce(outbox.published_at, clock_timestamp()),
           topic_id = :topic_id, partition = seen.partition, "offset" = seen."offset"
      FROM unnest(CAST(:ids AS uuid[]), CAST(:partitions AS integer[]), CAST(:offsets AS bigint[]))
           AS seen (id, partition, "offset")
     WHERE outbox.id = seen.id AND outbox.state <> 'COMPLETED'
""")

_KNOWN = text("SELECT id FROM outbox WHERE id = ANY(CAST(:ids AS uuid[]))")

_MOVE_POSITIONS = text("""
    INSERT INTO readback_positions (topic_id, partition, next_offset)
    SELECT :topic_id, partition, next_offset
      FROM unnest(CAST(:partitions AS integer[]), CAST(:next_offsets AS bigint[]))
           AS moved (partition, next_offset)
    ON CONFLICT (topic_id, partition) DO UPDATE SET next_offset = excluded.next_offset
""")

_POSITIONS = text("""
    SELECT partition, next_offset FROM readback_positions WHERE topic_id = :topic_id
""")

_SELECT_PUBLISHED = text("""
    SELECT id, topic_id, partition, "offset" FROM outbox
     WHERE state = 'PUBLISHED' AND (CAST(:after AS uuid) IS NULL OR id > :after)
     ORDER BY id
     LIMIT :limit
""")

# Lost is: read past and not seen; or at or beyond the end of its partition, as the broker gave it
# after the row was read; or in a topic that is no more. All else is lag. The row must still be
# what was read, so an event published anew in between is left alone.
_PUBLISHED_TO_INIT_OR_FAILED = text("""
    UPDATE outbox
       SET state = CASE WHEN republished_count < :most THEN 'INIT' ELSE 'FAILED' END,
           republished_count = least(republished_count + 1, :most),
           due_at = now() + :base_seconds * interval '1 second' * power(2, republished_count),
           reason = 'lost'
      FROM unnest(CAST(:ids AS uuid[]), CAST(:topic_ids AS text[]), CAST(:partitions AS integer[]),
                  CAST(:offsets AS bigint[]), CAST(:end_offsets AS bigint[]))
           AS read (id, topic_id, partition, "offset", end_offset)
      LEFT JOIN readback_positions AS position
        ON position.topic_id = :topic_id AND position.partition = read.partition
     WHERE outbox.id = read.id AND outbox.state = 'PUBLISHED'
       AND outbox.topic_id = read.topic_id
       AND outbox.partition IS NOT DISTINCT FROM read.partition
       AND outbox."offset" IS NOT DISTINCT FROM read."offset"
       AND (read.topic_id <> :topic_id
            OR read."offset" < position.next_offset
            OR read."offset" >= read.end_offset)
    RETURNING outbox.id, outbox.state
""")

_HAS_EARLIER_TOPIC = text("""
    SELECT EXISTS (SELECT FROM readback_positions WHERE topic_id <> :topic_id)
""")

_COMPLETED_TO_INIT = text("""
    UPDATE outbox SET state = 'INIT', due_at = now(), reason = 'topic recreated'
     WHERE id IN (SELECT id FROM outbox
                   WHERE state = 'COMPLETED' AND topic_id <> :topic_id
                     AND (CAST(:after AS uuid) IS NULL OR id > :after)
                   ORDER BY id LIMIT :limit)
    RETURNING id
""")

_FORGET_EARLIER_TOPICS = text("DELETE FROM readback_positions WHERE topic_id <> :topic_id")

_FAILED = text("""
    SELECT aggregateid FROM outbox
     WHERE state = 'FAILED'
       AND (CAST(:order_ids AS text[]) IS NULL OR aggregateid = ANY(:order_ids))
""")

_FAILED_TO_INIT = text("""
    UPDATE outbox SET state = 'INIT', due_at = now(), republished_count = 0, reason = NULL
     WHERE state = 'FAILED'
       AND (CAST(:order_ids AS text[]) IS NULL OR aggregateid = ANY(:order_ids))
    RETURNING aggregateid
""")

_PUBLISHED_OR_COMPLETED = text("""
    SELECT aggregateid FROM outbox
     WHERE state IN ('PUBLISHED', 'COMPLETED') AND aggregateid = ANY(:order_ids)
""")

_PUBLISHED_OR_COMPLETED_TO_INIT = text("""
    UPDATE outbox
       SET state = 'INIT', due_at = now(), republished_count = 0, reason = 'republish'
     WHERE state IN ('PUBLISHED', 'COMPLETED') AND aggregateid = ANY(:order_ids)
    RETURNING aggregateid
""")

# Ids begin with the time they were made (UUIDv7), so the oldest rows are the first of the index.
_PURGE = text("""
    DELETE FROM outbox
     WHERE id = ANY(ARRAY(SELECT id FROM outbox
                           WHERE state = 'COMPLETED' AND id < :before
                             AND completed_at < now() - :days * interval '1 day'
                           ORDER BY id LIMIT :limit))
""")

_COLUMNS = """
    SELECT id AS event_id, aggregateid AS order_id, state, topic_id, partition, "offset",
           occurred_at, published_at, completed_at, republished_count, reason
      FROM outbox
"""
_SHOW = text(f"{_COLUMNS} WHERE aggregateid = :order_id")
_LIST = text(f"{_COLUMNS} WHERE state = :state ORDER BY id LIMIT :limit")

_COUNT = text("""
    SELECT count(*) AS counted, extract(epoch FROM now() - min(occurred_at)) AS oldest_age_seconds
      FROM (SELECT occurred_at FROM outbox WHERE state = :state ORDER BY id LIMIT :most) AS row
""")

_OLDEST_SNAPSHOT = text("""
    SELECT coalesce(extract(epoch FROM now() - min(xact_start)), 0)
      FROM pg_stat_activity
     WHERE datname = current_database() AND backend_xmin IS NOT NULL AND pid <> pg_backend_pid()
""")


Rows = Sequence[Any]


@dataclass(frozen=True, slots=True)
class Backlog:
    """What is not yet in the topic: how many by state, the oldest one's age, and what delays it."""

    counts: Mapping[str, int]
    oldest_age_seconds: float
    oldest_snapshot_age_seconds: float


def select_init(connection: Connection, *, after: UUID | None, limit: int) -> list[Outgoing]:
    """Return the oldest events that wait for being published, of those after this one."""
    rows = connection.execute(_SELECT_INIT, {"after": after, "limit": limit})
    return [
        Outgoing(row.id, row.aggregateid, bytes(row.payload), row.headers, row.occurred_at)
        for row in rows
    ]


def mark_published(
    connection: Connection, *, topic_id: str, reports: Mapping[UUID, Coordinates]
) -> None:
    """Note where the broker says each event is; an event already seen there stays COMPLETED."""
    connection.execute(
        _INIT_TO_PUBLISHED,
        {
            "topic_id": topic_id,
            "ids": list(reports),
            "partitions": [where.partition for where in reports.values()],
            "offsets": [where.offset for where in reports.values()],
        },
    )


def mark_failed(connection: Connection, event_id: UUID, *, reason: str) -> None:
    """Set aside an event that no broker will take."""
    connection.execute(_INIT_TO_FAILED, {"id": event_id, "reason": reason})


def complete(
    connection: Connection,
    *,
    topic_id: str,
    seen: Mapping[UUID, Coordinates],
    next_offsets: Mapping[int, int],
) -> int:
    """Write what was seen, and how far was read; return how many events became COMPLETED.

    The caller's transaction holds both, so a position never passes an event that is not noted.
    """
    moved = connection.execute(
        _ANY_TO_COMPLETED,
        {
            "topic_id": topic_id,
            "ids": list(seen),
            "partitions": [where.partition for where in seen.values()],
            "offsets": [where.offset for where in seen.values()],
        },
    ).rowcount
    connection.execute(
        _MOVE_POSITIONS,
        {
            "topic_id": topic_id,
            "partitions": list(next_offsets),
            "next_offsets": list(next_offsets.values()),
        },
    )
    return moved


def unknown(connection: Connection, event_ids: Collection[UUID]) -> set[UUID]:
    """Return those of these events that have no row, though none was purged yet.

    An event of ours that is younger than any purge and has no row tells of a database that lost
    what it had committed.
    """
    known = connection.execute(_KNOWN, {"ids": list(event_ids)}).scalars()
    purged_before = _id_of_days_ago(COMPLETED_KEPT_DAYS)
    return {event_id for event_id in set(event_ids).difference(known) if event_id > purged_before}


def positions(connection: Connection, *, topic_id: str) -> dict[int, int]:
    """Return the first offset not read, by partition."""
    rows = connection.execute(_POSITIONS, {"topic_id": topic_id})
    return {row.partition: row.next_offset for row in rows}


def select_published(connection: Connection, *, after: UUID | None, limit: int) -> Rows:
    """Return the oldest events after this one that were published and not yet seen."""
    return connection.execute(_SELECT_PUBLISHED, {"after": after, "limit": limit}).all()


def republish_lost(
    connection: Connection,
    *,
    topic_id: str,
    published: Rows,
    end_offsets: Mapping[int, int],
) -> Mapping[UUID, str]:
    """Send back those of `published` that are proven lost; return their new states.

    `end_offsets` must have been asked of the broker after `published` was read.
    """
    moved = connection.execute(
        _PUBLISHED_TO_INIT_OR_FAILED,
        {
            "topic_id": topic_id,
            "most": MAX_REPUBLICATIONS,
            "base_seconds": REPUBLISH_BASE_SECONDS,
            "ids": [row.id for row in published],
            "topic_ids": [row.topic_id for row in published],
            "partitions": [row.partition for row in published],
            "offsets": [row.offset for row in published],
            "end_offsets": [end_offsets.get(row.partition) for row in published],
        },
    )
    return {row.id: row.state for row in moved}


def republish_into_new_topic(
    connection: Connection, *, topic_id: str, after: UUID | None, limit: int
) -> list[UUID]:
    """Send back up to `limit` events that were completed in a topic that is no more.

    Return them in their order, so that the next call can go on `after` the last; the last call
    forgets the earlier topic.
    """
    if not connection.execute(_HAS_EARLIER_TOPIC, {"topic_id": topic_id}).scalar_one():
        return []
    which = {"topic_id": topic_id, "after": after, "limit": limit}
    moved = sorted(connection.execute(_COMPLETED_TO_INIT, which).scalars())
    if len(moved) < limit:
        connection.execute(_FORGET_EARLIER_TOPICS, {"topic_id": topic_id})
    return moved


def retry(
    connection: Connection, order_ids: Sequence[str] | None, *, is_dry_run: bool = False
) -> list[str]:
    """Let these orders' FAILED events, or all, be published again; return whose they are."""
    statement = _FAILED if is_dry_run else _FAILED_TO_INIT
    return list(connection.execute(statement, {"order_ids": order_ids}).scalars())


def republish(
    connection: Connection, order_ids: Sequence[str], *, is_dry_run: bool = False
) -> list[str]:
    """Publish events once more that were PUBLISHED or COMPLETED; return whose they are.

    Their ids stay, so a reader that has an event already takes it for a duplicate.
    """
    statement = _PUBLISHED_OR_COMPLETED if is_dry_run else _PUBLISHED_OR_COMPLETED_TO_INIT
    return list(connection.execute(statement, {"order_ids": list(order_ids)}).scalars())


def purge(connection: Connection) -> int:
    """Delete a batch of the rows that were COMPLETED 14 days ago; return how many."""
    return connection.execute(
        _PURGE,
        {
            "before": _id_of_days_ago(COMPLETED_KEPT_DAYS),
            "days": COMPLETED_KEPT_DAYS,
            "limit": PURGE_ROWS,
        },
    ).rowcount


def backlog(connection: Connection) -> Backlog:
    """Count what is not yet in the topic."""
    counts, ages = {}, [0.0]
    for state in OPEN:
        row = connection.execute(_COUNT, {"state": state, "most": MOST_COUNTED}).one()
        counts[state] = row.counted
        ages.append(float(row.oldest_age_seconds or 0))
    snapshot = float(connection.execute(_OLDEST_SNAPSHOT).scalar_one())
    return Backlog(counts, max(ages), snapshot)


def show(connection: Connection, order_id: str) -> list[dict[str, Any]]:
    """Return the rows of one order, as an operator sees them."""
    return [dict(row._mapping) for row in connection.execute(_SHOW, {"order_id": order_id})]


def list_rows(connection: Connection, states: Iterable[str], *, limit: int) -> list[dict[str, Any]]:
    """Return up to `limit` rows of these states, oldest first within each."""
    rows: list[dict[str, Any]] = []
    for state in states:
        found = connection.execute(_LIST, {"state": state, "limit": limit - len(rows)})
        rows += [dict(row._mapping) for row in found]
    return rows


def _id_of_days_ago(days: int) -> UUID:
    """Return the lowest id an event of that time can have (UUIDv7, RFC 9562 §5.7)."""
    milliseconds = int((time.time() - days * DAY_SECONDS) * 1000)
    return UUID(int=milliseconds << 80)
