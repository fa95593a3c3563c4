"""The ledger: a row for each mail, and a statement for each arrow.

    take in ─▶ SENDING ─250─▶ SENT            RETRY ─due─▶ SENDING
               SENDING ─not now─▶ RETRY       SENDING ─refused for good, expired─▶ DEAD
               SENDING ─lease ended, answer lost─▶ UNKNOWN ─due─▶ SENDING (once)

A row is claimed before the SMTP dialogue and SENT right after the 250. A 250 is a fact: it is
written whatever became of the claim. Open rows keep the event's bytes; SENT holds no address.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy import Connection, text

KIND = "order-confirmation"
FROM_EVENTS = ""

_TAKE_IN = text("""
    INSERT INTO deliveries
           (kind, order_id, campaign, message_id, event, event_at, topic_id, partition,
            "offset", give_up_at, state, owner, attempts, reason)
    SELECT :kind, order_id, :campaign, message_id, event, event_at, topic_id, partition,
           "offset", give_up_at,
           CASE WHEN give_up_at > now() THEN 'SENDING' ELSE 'DEAD' END,
           CASE WHEN give_up_at > now() THEN CAST(:replica_id AS uuid) END,
           CASE WHEN give_up_at > now() THEN 1 ELSE 0 END,
           CASE WHEN give_up_at > now() THEN NULL ELSE 'expired' END
      FROM unnest(CAST(:order_ids AS text[]), CAST(:message_ids AS text[]),
                  CAST(:events AS bytea[]), CAST(:event_ats AS timestamptz[]),
                  CAST(:topic_ids AS text[]), CAST(:partitions AS integer[]),
                  CAST(:offsets AS bigint[]), CAST(:give_up_ats AS timestamptz[]))
           AS mail (order_id, message_id, event, event_at, topic_id, partition, "offset",
                    give_up_at)
     ORDER BY order_id
    ON CONFLICT (kind, order_id, campaign) DO NOTHING
    RETURNING id, order_id, message_id, event, event_at, give_up_at, attempts, unknown_count
""")

_INSERT_DEAD_LETTERS = text("""
    INSERT INTO dead_letters
           (topic_id, partition, "offset", key, value, value_sha256, headers, reason)
    VALUES (:topic_id, :partition, :offset, :key, :value, :value_sha256, CAST(:headers AS json),
            :reason)
    ON CONFLICT (topic_id, partition, "offset") DO NOTHING
""")

# Forward only, and only from where this take-in began: a position that was set back in between,
# by a restore or an operator, must be read from anew, not jumped over.
_MOVE_POSITIONS = text("""
    UPDATE positions
       SET next_offset = greatest(positions.next_offset, moved.next_offset)
      FROM unnest(CAST(:topic_ids AS text[]), CAST(:partitions AS integer[]),
                  CAST(:epochs AS integer[]), CAST(:began_ats AS bigint[]),
                  CAST(:next_offsets AS bigint[]))
           AS moved (topic_id, partition, epoch, began_at, next_offset)
     WHERE positions.topic_id = moved.topic_id AND positions.partition = moved.partition
       AND positions.epoch = moved.epoch AND positions.next_offset >= moved.began_at
""")

_POSITION = text("""
    SELECT next_offset, epoch FROM positions WHERE topic_id = :topic_id AND partition = :partition
""")

_OPEN_POSITION = text("""
    INSERT INTO positions (cluster_id, topic_id, partition, next_offset)
    VALUES (:cluster_id, :topic_id, :partition, :next_offset)
    ON CONFLICT (topic_id, partition) DO NOTHING
""")

_CLAIM_DUE = text("""
    UPDATE deliveries
       SET state = 'SENDING', owner = :replica_id, attempts = attempts + 1, due_at = NULL
     WHERE id IN (SELECT id FROM deliveries
                   WHERE state IN ('RETRY', 'UNKNOWN') AND due_at <= now() AND give_up_at > now()
                   ORDER BY due_at
                   LIMIT :limit
                   FOR UPDATE SKIP LOCKED)
    RETURNING id, order_id, message_id, event, event_at, give_up_at, attempts, unknown_count
""")

# What may have been sent stays UNKNOWN, for a person to settle.
_DUE_TO_EXPIRED = text("""
    UPDATE deliveries
       SET state = CASE state WHEN 'RETRY' THEN 'DEAD' ELSE state END,
           due_at = NULL, reason = 'expired'
     WHERE state IN ('RETRY', 'UNKNOWN') AND due_at <= now() AND give_up_at <= now()
""")

# Whoever owns no lease may have died between the dot and the 250: nobody knows, so it is said.
# Due only after a delay, so that a late 250 can arrive first; a second time it waits for a person.
_SENDING_TO_UNKNOWN = text("""
    UPDATE deliveries
       SET state = 'UNKNOWN', owner = NULL, unknown_count = unknown_count + 1,
           due_at = CASE WHEN :is_resent AND unknown_count = 0
                         THEN now() + :delay_seconds * interval '1 second' END,
           reason = 'lease ended'
     WHERE state = 'SENDING'
       AND NOT EXISTS (SELECT FROM replicas
                        WHERE replicas.id = deliveries.owner AND replicas.lease_until > now())
""")

# Claimed by a commit whose answer never came back: nothing was said to the relay about these.
_STRAY_TO_RETRY = text("""
    UPDATE deliveries
       SET state = 'RETRY', owner = NULL, attempts = attempts - 1, due_at = now(),
           reason = 'claim not confirmed'
     WHERE state = 'SENDING' AND owner = :replica_id AND id <> ALL(CAST(:in_slots AS bigint[]))
""")

_ANY_TO_SENT = text("""
    UPDATE deliveries
       SET state = 'SENT', event = NULL, owner = NULL, due_at = NULL, reason = NULL,
           sent_at = clock_timestamp(), sent_by = :sent_by, reply = sent.reply
      FROM unnest(CAST(:ids AS bigint[]), CAST(:replies AS text[])) AS sent (id, reply)
     WHERE deliveries.id = sent.id AND deliveries.state NOT IN ('SENT', 'ERASED')
""")

_SENDING_TO_OPEN = text("""
    UPDATE deliveries
       SET state = :state, owner = NULL, reason = :reason,
           due_at = now() + :due_seconds * interval '1 second',
           unknown_count = unknown_count + CASE WHEN :state = 'UNKNOWN' THEN 1 ELSE 0 END
     WHERE id = :id AND state = 'SENDING' AND owner = :replica_id AND attempts = :attempts
""")

_RENEW_LEASE = text("""
    INSERT INTO replicas (id, name, lease_until)
    VALUES (:id, :name, now() + :lease_seconds * interval '1 second')
    ON CONFLICT (id) DO UPDATE SET lease_until = excluded.lease_until
""")

_END_LEASE = text("DELETE FROM replicas WHERE id = :id")

_FORGET_REPLICAS = text("""
    DELETE FROM replicas WHERE lease_until < now() - interval '1 day'
""")

_SHOW = text("""
    SELECT deliveries.order_id, campaign, state, attempts, message_id, topic_id, partition,
           "offset", taken_in_at, due_at, give_up_at, reason, sent_at, sent_by, reply,
           coalesce(replicas.name, deliveries.owner::text) AS owner
      FROM deliveries LEFT JOIN replicas ON replicas.id = deliveries.owner
     WHERE order_id = :order_id
     ORDER BY campaign
""")


class PositionMoved(Exception):
    """The position is not where this take-in began: nothing was written; seek anew."""


@dataclass(frozen=True, slots=True)
class NewMail:
    """A mail to be known from now on."""

    order_id: str
    message_id: str
    event: bytes
    event_at: datetime
    give_up_at: datetime
    topic_id: str
    partition: int
    offset: int


@dataclass(frozen=True, slots=True)
class Mail:
    """A row this replica has claimed, until its lease ends."""

    id: int
    order_id: str
    message_id: str
    event: bytes
    event_at: datetime
    give_up_at: datetime
    attempts: int
    unknown_count: int


@dataclass(frozen=True, slots=True)
class NewDeadLetter:
    """A record that cannot be read, as much of it as is kept."""

    topic_id: str
    partition: int
    offset: int
    key: bytes | None
    value: bytes | None
    value_sha256: str
    headers: Sequence[tuple[str, str]]
    reason: str


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
    """Where to read a partition from, and under which epoch."""

    next_offset: int
    epoch: int


def take_in(
    connection: Connection,
    *,
    replica_id: UUID,
    mails: Sequence[NewMail],
    dead_letters: Sequence[NewDeadLetter],
    moves: Sequence[Move],
) -> list[Mail]:
    """Write what a batch of records becomes, and how far was read; return the claimed mails.

    An order already known is not claimed again, one too old to be mailed is DEAD at once. Raises
    PositionMoved when a partition is no longer where the batch began: the caller's transaction must
    then be rolled back.
    """
    moved = connection.execute(_MOVE_POSITIONS, _columns(moves, Move)).rowcount
    if moved != len(moves):
        raise PositionMoved
    for letter in dead_letters:
        connection.execute(
            _INSERT_DEAD_LETTERS,
            {
                **{name: getattr(letter, name) for name in NewDeadLetter.__slots__},
                "headers": json.dumps(letter.headers),
            },
        )
    if not mails:
        return []
    claimed = connection.execute(
        _TAKE_IN,
        {
            **_columns(mails, NewMail),
            "kind": KIND,
            "campaign": FROM_EVENTS,
            "replica_id": replica_id,
        },
    )
    return [mail for row in claimed if (mail := _mail(row)).attempts]


def take_up(connection: Connection, *, replica_id: UUID, limit: int) -> list[Mail]:
    """Claim the mails that are due, oldest first; those too old to be sent expire."""
    connection.execute(_DUE_TO_EXPIRED)
    return [
        _mail(row)
        for row in connection.execute(_CLAIM_DUE, {"replica_id": replica_id, "limit": limit})
    ]


def end_leases(connection: Connection, *, is_resent: bool, delay_seconds: float) -> int:
    """Make UNKNOWN what was in the hands of replicas that are gone; return how many."""
    return connection.execute(
        _SENDING_TO_UNKNOWN, {"is_resent": is_resent, "delay_seconds": delay_seconds}
    ).rowcount


def release_stray(connection: Connection, *, replica_id: UUID, in_slots: Sequence[int]) -> None:
    """Make due what this replica owns and has in no slot."""
    connection.execute(_STRAY_TO_RETRY, {"replica_id": replica_id, "in_slots": list(in_slots)})


def record_sent(connection: Connection, replies: Mapping[int, str], *, sent_by: str) -> None:
    """Write the 250s, by row."""
    connection.execute(
        _ANY_TO_SENT,
        {"ids": list(replies), "replies": list(replies.values()), "sent_by": sent_by},
    )


def record_open(
    connection: Connection,
    *,
    mail: Mail,
    replica_id: UUID,
    state: str,
    reason: str,
    due_seconds: float | None,
) -> None:
    """Write that a claimed mail was not sent, as far as is known; no due time means a person."""
    connection.execute(
        _SENDING_TO_OPEN,
        {
            "id": mail.id,
            "attempts": mail.attempts,
            "replica_id": replica_id,
            "state": state,
            "reason": reason,
            "due_seconds": due_seconds,
        },
    )


def start_of(
    connection: Connection, *, cluster_id: str, topic_id: str, partition: int, log_start: int
) -> Start:
    """Return where a partition is to be read from; one never read is opened at its log's start."""
    where = {"topic_id": topic_id, "partition": partition}
    connection.execute(
        _OPEN_POSITION, {**where, "cluster_id": cluster_id, "next_offset": log_start}
    )
    row = connection.execute(_POSITION, where).one()
    return Start(row.next_offset, row.epoch)


def renew_lease(
    connection: Connection, *, replica_id: UUID, name: str, lease_seconds: float
) -> None:
    """Own the claimed rows for `lease_seconds` more."""
    connection.execute(
        _RENEW_LEASE, {"id": replica_id, "name": name, "lease_seconds": lease_seconds}
    )
    connection.execute(_FORGET_REPLICAS)


def end_lease(connection: Connection, replica_id: UUID) -> None:
    """Let others have at once what this replica could not finish."""
    connection.execute(_END_LEASE, {"id": replica_id})


def show(connection: Connection, order_id: str) -> list[dict[str, Any]]:
    """Return the rows of one order, as an operator sees them."""
    return [dict(row._mapping) for row in connection.execute(_SHOW, {"order_id": order_id})]


def _mail(row: Any) -> Mail:
    values = row._mapping
    return Mail(**{**values, "event": bytes(values["event"])})


def _columns(rows: Sequence[Any], kind: type) -> dict[str, list[Any]]:
    """Turn rows into one list a field, named in the plural, as the statements take them."""
    return {f"{name}s": [getattr(row, name) for row in rows] for name in kind.__slots__}  # type: ignore[attr-defined]
