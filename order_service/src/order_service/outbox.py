"""The outbox: one row for each event, and a statement for each arrow.

    INIT ──delivery report──▶ PUBLISHED ──seen in the topic──▶ COMPLETED
      │ ◀──────proven lost─────┘  │                               │
      │ ◀─────────────────────────│────────topic recreated────────┘
      └──cannot be published──▶ FAILED ◀──lost once too often

COMPLETED is reached from any state: what was seen in the topic is in the topic. It says nothing
about the mail. Rows are selected by state, never by `id > last`: a row with a lower id may commit
later.

There is one event for each order today. Were a later event type to share a key, a publish that
fails would have to hold back the key's later rows: `select_init` is where that would break.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any
from uuid import UUID

from sqlalchemy import Connection, Engine, text
from sqlalchemy.exc import SQLAlchemyError

from order_service.kafka import Coordinates, Outgoing
from order_service.telemetry import log

CHANNEL = "order_outbox"
MAX_REPUBLICATIONS = 3
REPUBLISH_BASE_SECONDS = 5

_SELECT_INIT = text("""
    SELECT id, aggregateid, payload, headers, occurred_at FROM outbox
     WHERE state = 'INIT' AND due_at <= now()
     ORDER BY id
     LIMIT :limit
""")

_INIT_TO_PUBLISHED = text("""
    UPDATE outbox
       SET state = 'PUBLISHED', published_at = clock_timestamp(),
           topic_id = :topic_id, partition = report.partition, "offset" = report."offset"
      FROM unnest(CAST(:ids AS uuid[]), CAST(:partitions AS integer[]), CAST(:offsets AS bigint[]))
           AS report (id, partition, "offset")
     WHERE outbox.id = report.id AND outbox.state = 'INIT'
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

_COUNT_KNOWN = text("SELECT count(*) FROM outbox WHERE id = ANY(CAST(:ids AS uuid[]))")

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
     WHERE state = 'PUBLISHED'
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
                   ORDER BY id LIMIT :limit)
""")

_FORGET_EARLIER_TOPICS = text("DELETE FROM readback_positions WHERE topic_id <> :topic_id")

_SHOW = text("""
    SELECT id AS event_id, aggregateid AS order_id, state, topic_id, partition, "offset",
           occurred_at, published_at, completed_at, republished_count, reason
      FROM outbox
     WHERE aggregateid = :order_id
""")


def wake_relay(engine: Engine) -> None:
    """Tell the active relay that there is work; when it does not hear, it polls.

    Called after the order's commit: a NOTIFY inside its transaction would make all commits of the
    database wait for each other.
    """
    try:
        with engine.begin() as connection:
            connection.execute(text(f"NOTIFY {CHANNEL}"))
    except SQLAlchemyError as error:
        log.warning("relay.not_woken", error=type(error).__name__)


def select_init(connection: Connection, *, limit: int) -> list[Outgoing]:
    """Return the oldest events that wait for being published."""
    rows = connection.execute(_SELECT_INIT, {"limit": limit})
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


def count_known(connection: Connection, event_ids: Collection[UUID]) -> int:
    """Return how many of these events are ours."""
    return int(connection.execute(_COUNT_KNOWN, {"ids": list(event_ids)}).scalar_one())


def positions(connection: Connection, *, topic_id: str) -> dict[int, int]:
    """Return the first offset not read, by partition."""
    rows = connection.execute(_POSITIONS, {"topic_id": topic_id})
    return {row.partition: row.next_offset for row in rows}


def select_published(connection: Connection, *, limit: int) -> Sequence[Any]:
    """Return the oldest events that were published and not yet seen in the topic."""
    return connection.execute(_SELECT_PUBLISHED, {"limit": limit}).all()


def republish_lost(
    connection: Connection,
    *,
    topic_id: str,
    published: Sequence[Any],
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


def republish_into_new_topic(connection: Connection, *, topic_id: str, limit: int) -> int:
    """Send back up to `limit` events that were completed in a topic that is no more."""
    if not connection.execute(_HAS_EARLIER_TOPIC, {"topic_id": topic_id}).scalar_one():
        return 0
    moved = connection.execute(_COMPLETED_TO_INIT, {"topic_id": topic_id, "limit": limit}).rowcount
    if moved < limit:
        connection.execute(_FORGET_EARLIER_TOPICS, {"topic_id": topic_id})
    return moved


def show(connection: Connection, order_id: str) -> list[dict[str, Any]]:
    """Return the rows of one order, as an operator sees them."""
    return [dict(row._mapping) for row in connection.execute(_SHOW, {"order_id": order_id})]
