"""What people decide about mails: the arrows of the ledger that no replica takes.

    DEAD, HELD ─retry─▶ RETRY               no row ─replay, resend, dead letter read─▶ RETRY
    UNKNOWN that waits, HELD ─settle─▶ SENT, RETRY, DEAD       any, no row ─erase─▶ ERASED

They change rows; the replicas send. Each is one transaction, and only one is made at a time, so
that a campaign's limit is exact and nothing is made due again while it is being erased.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Any

from sqlalchemy import Connection, Engine, RowMapping, text

from mail_service import events
from mail_service.events import UnreadableRecord
from mail_service.ledger import FROM_EVENTS, KIND, NewMail
from mail_service.models import columns

OPEN = ("SENDING", "RETRY", "UNKNOWN", "HELD", "DEAD")
STATES = (*OPEN, "SENT", "ERASED")
RELEASED = ("DEAD", "HELD")
SETTLED = ("UNKNOWN", "HELD")
SETTLED_BY = "settled"
LOCK_KEYS = {"first": 0x6D61, "second": 0x6465}

_ONE_AT_A_TIME = text("""
    SELECT pg_advisory_xact_lock(:first, :second), set_config('statement_timeout', '0', true)
""")

# A mail that is UNKNOWN and due is resent by a replica: nobody needs to decide.
_CHOSEN = """
           kind = :kind AND state = ANY(CAST(:states AS text[]))
       AND (CAST(:order_ids AS text[]) IS NULL OR order_id = ANY(CAST(:order_ids AS text[])))
       AND (CAST(:campaign AS text) IS NULL OR campaign = :campaign)
       AND (CAST(:reason AS text) IS NULL OR strpos(reason, :reason) > 0)
       AND (CAST(:since AS timestamptz) IS NULL OR event_at >= :since)
       AND (CAST(:until AS timestamptz) IS NULL OR event_at < :until)
       AND (state <> 'UNKNOWN' OR due_at IS NULL OR NOT :is_waiting)
"""

_LIST = text(f"""
    SELECT deliveries.*, coalesce(replicas.name, deliveries.owner::text) AS replica
      FROM deliveries LEFT JOIN replicas ON replicas.id = deliveries.owner
     WHERE {_CHOSEN}
     ORDER BY event_at, order_id, campaign
     LIMIT :limit
""")  # noqa: S608 - the one condition of all choices

_STOPPED_TO_RETRY = text("""
    UPDATE deliveries
       SET state = 'RETRY', due_at = now(), attempts = 0, suspected_at = NULL,
           give_up_at = now() + :patience, reason = 'released'
     WHERE id = ANY(CAST(:ids AS bigint[])) AND state IN ('DEAD', 'HELD')
    RETURNING id
""")

_WAITING_TO_SENT = text("""
    UPDATE deliveries
       SET state = 'SENT', event = NULL, due_at = NULL, reason = NULL, sent_at = now(),
           sent_by = :settled_by, reply = :reason
     WHERE id = ANY(CAST(:ids AS bigint[]))
       AND (state = 'HELD' OR state = 'UNKNOWN' AND due_at IS NULL)
    RETURNING id
""")

# What may have been sent stays counted: a further lost answer waits for a person again.
_WAITING_TO_RETRY = text("""
    UPDATE deliveries
       SET state = 'RETRY', due_at = now(), give_up_at = now() + :patience, reason = :reason
     WHERE id = ANY(CAST(:ids AS bigint[]))
       AND (state = 'HELD' OR state = 'UNKNOWN' AND due_at IS NULL)
    RETURNING id
""")

_WAITING_TO_DEAD = text("""
    UPDATE deliveries
       SET state = 'DEAD', due_at = NULL, reason = :reason
     WHERE id = ANY(CAST(:ids AS bigint[]))
       AND (state = 'HELD' OR state = 'UNKNOWN' AND due_at IS NULL)
    RETURNING id
""")

_DUE_TO_HELD = text("""
    UPDATE deliveries
       SET state = 'HELD', owner = NULL, due_at = NULL, reason = 'held by a rewind'
     WHERE state IN ('SENDING', 'RETRY', 'UNKNOWN')
""")

_MAKE_DUE = text("""
    INSERT INTO deliveries
           (kind, order_id, campaign, message_id, event, event_at, topic_id, partition,
            "offset", give_up_at, state, due_at, reason)
    SELECT :kind, order_id, :campaign, message_id, event, event_at, topic_id, partition,
           "offset", now() + :patience, 'RETRY', now(), :reason
      FROM unnest(CAST(:order_ids AS text[]), CAST(:message_ids AS text[]),
                  CAST(:events AS bytea[]), CAST(:event_ats AS timestamptz[]),
                  CAST(:topic_ids AS text[]), CAST(:partitions AS integer[]),
                  CAST(:offsets AS bigint[]))
           AS mail (order_id, message_id, event, event_at, topic_id, partition, "offset")
     WHERE NOT EXISTS (SELECT FROM deliveries AS known
                        WHERE known.kind = :kind AND known.order_id = mail.order_id
                          AND (known.campaign = :campaign OR known.state = 'ERASED'))
     ORDER BY event_at, order_id
     LIMIT :limit
    ON CONFLICT (kind, order_id, campaign) DO NOTHING
    RETURNING order_id
""")

_NAME_CAMPAIGN = text("""
    INSERT INTO campaigns (name, reason) VALUES (:name, :reason) ON CONFLICT (name) DO NOTHING
""")
_COUNT_CAMPAIGN = text("""
    SELECT count(*) FROM deliveries WHERE kind = :kind AND campaign = :campaign
""")
_OF_CAMPAIGN = text("""
    SELECT order_id FROM deliveries WHERE kind = :kind AND campaign = :campaign
""")

_ANY_TO_ERASED = text("""
    UPDATE deliveries
       SET state = 'ERASED', event = NULL, owner = NULL, due_at = NULL, reason = NULL, reply = NULL
     WHERE kind = :kind AND order_id = ANY(CAST(:order_ids AS text[])) AND state <> 'ERASED'
    RETURNING id
""")

_UNKNOWN_ORDER_TO_ERASED = text("""
    INSERT INTO deliveries (kind, order_id, campaign, message_id, event_at, give_up_at, state)
    SELECT :kind, order_id, :campaign, '', now(), now(), 'ERASED'
      FROM unnest(CAST(:order_ids AS text[])) AS erased (order_id)
     ORDER BY order_id
    ON CONFLICT (kind, order_id, campaign) DO NOTHING
    RETURNING id
""")


class Settlement(StrEnum):
    """What a person found out about a mail that waits."""

    SENT = "sent"
    SEND = "send"
    DEAD = "dead"


_SETTLE = {
    Settlement.SENT: _WAITING_TO_SENT,
    Settlement.SEND: _WAITING_TO_RETRY,
    Settlement.DEAD: _WAITING_TO_DEAD,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """Which mails; what is None restricts nothing. Instants are those of the event.

    `is_waiting` leaves out what is UNKNOWN and will be resent without anybody.
    """

    states: Sequence[str]
    order_ids: Sequence[str] | None = None
    campaign: str | None = None
    reason: str | None = None
    since: datetime | None = None
    until: datetime | None = None
    is_waiting: bool = False


@dataclass(frozen=True, slots=True)
class Campaign:
    """A deliberate sending of mails that were sent before; `limit` holds however often it runs."""

    name: str
    reason: str
    limit: int | None


@contextmanager
def deciding(engine: Engine) -> Iterator[Connection]:
    """Open the transaction of one decision."""
    with engine.begin() as connection:
        connection.execute(_ONE_AT_A_TIME, LOCK_KEYS)
        yield connection


def choose(connection: Connection, choice: Choice, *, limit: int | None = None) -> list[RowMapping]:
    """Return the rows of a choice by the event's time, whole."""
    which = asdict(choice) | {"states": list(choice.states), "kind": KIND, "limit": limit}
    return list(connection.execute(_LIST, which).mappings())


def recipient(row: RowMapping) -> str | None:
    """Return whom an open mail goes to; a closed one holds no address."""
    if row["event"] is None:
        return None
    try:
        return events.parse(bytes(row["event"])).email
    except UnreadableRecord:
        return None


def retry(connection: Connection, ids: Sequence[int], *, patience: timedelta) -> list[int]:
    """Release what is DEAD or HELD; return the rows that were."""
    return _ids(connection, _STOPPED_TO_RETRY, ids=list(ids), patience=patience)


def settle(
    connection: Connection,
    ids: Sequence[int],
    settlement: Settlement,
    *,
    reason: str,
    patience: timedelta,
) -> list[int]:
    """Write what a person found out; return the rows that waited for it."""
    reason = f"settled: {reason}"
    values = {"reason": reason, "patience": patience, "settled_by": SETTLED_BY}
    return _ids(connection, _SETTLE[settlement], ids=list(ids), **values)


def hold_due(connection: Connection) -> int:
    """Hold what may have been sent by a ledger that is no more; return how many."""
    return connection.execute(_DUE_TO_HELD).rowcount


def make_due(
    connection: Connection,
    mails: Sequence[NewMail],
    *,
    patience: timedelta,
    reason: str,
    campaign: Campaign | None = None,
) -> list[str]:
    """Write rows for mails that the ledger, or this campaign, does not know; return their orders.

    What was erased stays so.
    """
    limit = None
    if campaign is not None:
        connection.execute(_NAME_CAMPAIGN, {"name": campaign.name, "reason": campaign.reason})
        if campaign.limit is not None:
            limit = max(0, campaign.limit - count(connection, campaign.name))
    made = connection.execute(
        _MAKE_DUE,
        {
            **columns(mails, NewMail),
            "kind": KIND,
            "campaign": campaign.name if campaign else FROM_EVENTS,
            "patience": patience,
            "reason": reason,
            "limit": limit,
        },
    )
    return list(made.scalars())


def count(connection: Connection, campaign: str) -> int:
    """Return how many mails a campaign has."""
    return int(connection.execute(_COUNT_CAMPAIGN, _of(campaign)).scalar_one())


def orders_of(connection: Connection, campaign: str) -> set[str]:
    """Return the orders that a campaign has."""
    return set(connection.execute(_OF_CAMPAIGN, _of(campaign)).scalars())


def erase(connection: Connection, order_ids: Sequence[str]) -> tuple[int, int]:
    """Forget whom mails went or go to; return how many rows were erased and how many are new.

    An order that is not known yet gets a row too: its record finds it ERASED.
    """
    which = {"kind": KIND, "campaign": FROM_EVENTS, "order_ids": list(order_ids)}
    erased = len(list(connection.execute(_ANY_TO_ERASED, which)))
    return erased, len(list(connection.execute(_UNKNOWN_ORDER_TO_ERASED, which)))


def _of(campaign: str) -> dict[str, str]:
    return {"kind": KIND, "campaign": campaign}


def _ids(connection: Connection, statement: Any, **values: Any) -> list[int]:
    return list(connection.execute(statement, values).scalars())
