"""The ledger: a row for each mail, and a statement for each arrow.

    take in ─▶ SENDING ─250─▶ SENT            RETRY ─due─▶ SENDING
    take in ─after a rewind─▶ HELD            take in ─too old─▶ DEAD
               SENDING ─not now─▶ RETRY       SENDING ─refused for good, expired─▶ DEAD
               SENDING ─lease ended, answer lost─▶ UNKNOWN ─due─▶ SENDING (once)
               SENDING ─not for this environment─▶ HELD

The arrows that people take are in `decisions.py`. A row is claimed before the SMTP dialogue and
SENT right after the 250. A 250 is a fact: it is written whatever became of the claim. Open rows
keep the event's bytes; SENT holds no address.
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from importlib.metadata import version
from typing import Any
from uuid import UUID

from sqlalchemy import Connection, text

from mail_service import positions
from mail_service.models import columns
from mail_service.positions import Move, PositionMoved
from mail_service.startup import StartUpRefused

KIND = "order-confirmation"
FROM_EVENTS = ""
RELEASE = version("mail-service")

# One statement, so one transaction and one round trip: positions, rows, dead letters, or nothing.
# An order that comes twice in a batch is the mail of its first record.
_TAKE_IN = text(f"""
    WITH {positions.MOVE}, letters AS (
        INSERT INTO dead_letters
               (topic_id, partition, "offset", key, value, value_sha256, headers, reason)
        SELECT topic_id, partition, "offset", key, value, value_sha256, CAST(headers AS json),
               reason
          FROM unnest(CAST(:letter_topic_ids AS text[]), CAST(:letter_partitions AS integer[]),
                      CAST(:letter_offsets AS bigint[]), CAST(:letter_keys AS bytea[]),
                      CAST(:letter_values AS bytea[]), CAST(:letter_value_sha256s AS text[]),
                      CAST(:letter_headerss AS text[]), CAST(:letter_reasons AS text[]))
               AS letter (topic_id, partition, "offset", key, value, value_sha256, headers, reason),
               may
         WHERE may.move
        ON CONFLICT (topic_id, partition, "offset") DO NOTHING
    ), new AS (
        SELECT mail.*,
               CASE WHEN is_held THEN 'HELD'
                    WHEN give_up_at > now() THEN 'SENDING'
                    ELSE 'DEAD' END AS state
          FROM unnest(CAST(:order_ids AS text[]), CAST(:message_ids AS text[]),
                      CAST(:events AS bytea[]), CAST(:event_ats AS timestamptz[]),
                      CAST(:give_up_ats AS timestamptz[]), CAST(:topic_ids AS text[]),
                      CAST(:partitions AS integer[]), CAST(:offsets AS bigint[]),
                      CAST(:is_helds AS boolean[])) WITH ORDINALITY
               AS mail (order_id, message_id, event, event_at, give_up_at, topic_id, partition,
                        "offset", is_held, number),
               may
         WHERE may.move
    ), written AS (
        INSERT INTO deliveries
               (kind, order_id, campaign, message_id, event, event_at, topic_id, partition,
                "offset", give_up_at, state, owner, attempts, reason)
        SELECT :kind, order_id, :campaign, message_id, event, event_at, topic_id, partition,
               "offset", give_up_at, state,
               CASE state WHEN 'SENDING' THEN CAST(:replica_id AS uuid) END,
               CASE state WHEN 'SENDING' THEN 1 ELSE 0 END,
               CASE state WHEN 'HELD' THEN 'taken in after a rewind' WHEN 'DEAD' THEN 'expired' END
          FROM new
         ORDER BY order_id, number
        ON CONFLICT (kind, order_id, campaign) DO NOTHING
        RETURNING id, order_id, state
    )
    SELECT may.move, written.id, written.order_id, written.state
      FROM may LEFT JOIN written ON true
""")  # noqa: S608 - both texts are ours

_CLAIM_DUE = text("""
    UPDATE deliveries
       SET state = 'SENDING', owner = :replica_id, attempts = attempts + 1, due_at = NULL
     WHERE id IN (SELECT id FROM deliveries
                   WHERE state IN ('RETRY', 'UNKNOWN') AND due_at <= now() AND give_up_at > now()
                     AND EXISTS (SELECT FROM replicas
                                  WHERE id = :replica_id AND lease_until >= :lease_until)
                     AND id <> ALL(CAST(:in_hand AS bigint[]))
                     AND NOT (SELECT is_paused FROM control)
                   ORDER BY due_at
                   LIMIT :limit
                   FOR UPDATE SKIP LOCKED)
    RETURNING id, order_id, message_id, event, event_at, give_up_at, attempts, unknown_count,
              suspected_at
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
     WHERE state = 'SENDING' AND id <> ALL(CAST(:in_hand AS bigint[]))
       AND NOT EXISTS (SELECT FROM replicas
                        WHERE replicas.id = deliveries.owner AND replicas.lease_until > now())
""")

# Claimed by a commit whose answer never came back: nothing was said to the relay about these.
_STRAY_TO_RETRY = text("""
    UPDATE deliveries
       SET state = 'RETRY', owner = NULL, attempts = attempts - 1, due_at = now(),
           reason = 'claim not confirmed'
     WHERE state = 'SENDING' AND owner = :replica_id AND id <> ALL(CAST(:in_hand AS bigint[]))
""")

# What was erased meanwhile stays so; that it was accepted is a fact all the same. A ledger that was
# restored gives ids out again: the Message-ID says whether this is still that mail.
_ANY_TO_SENT = text("""
    UPDATE deliveries
       SET state = CASE state WHEN 'ERASED' THEN 'ERASED' ELSE 'SENT' END,
           event = NULL, owner = NULL, due_at = NULL, reason = NULL,
           sent_at = clock_timestamp(), sent_by = :sent_by, reply = sent.reply,
           release = :release, template_digest = :template_digest
      FROM unnest(CAST(:ids AS bigint[]), CAST(:message_ids AS text[]), CAST(:replies AS text[]))
           AS sent (id, message_id, reply)
     WHERE deliveries.id = sent.id AND deliveries.message_id = sent.message_id
       AND deliveries.sent_at IS NULL
""")

_SENDING_TO_OPEN = text("""
    UPDATE deliveries
       SET state = ended.state, owner = NULL, reason = ended.reason,
           due_at = now() + ended.due_seconds * interval '1 second',
           attempts = deliveries.attempts - CASE WHEN ended.is_attempt THEN 0 ELSE 1 END,
           suspected_at = coalesce(ended.suspected_at, deliveries.suspected_at),
           unknown_count = unknown_count + CASE WHEN ended.state = 'UNKNOWN' THEN 1 ELSE 0 END
      FROM unnest(CAST(:ids AS bigint[]), CAST(:attemptss AS integer[]), CAST(:states AS text[]),
                  CAST(:reasons AS text[]), CAST(:due_secondss AS double precision[]),
                  CAST(:is_attempts AS boolean[]), CAST(:suspected_ats AS timestamptz[]))
           AS ended (id, attempts, state, reason, due_seconds, is_attempt, suspected_at)
     WHERE deliveries.id = ended.id AND deliveries.state = 'SENDING'
       AND deliveries.owner = :replica_id AND deliveries.attempts = ended.attempts
""")

# A lease that is there already was taken by a commit whose answer never came back.
_TAKE_LEASE = text("""
    INSERT INTO replicas (id, name, lease_until)
    VALUES (:id, :name, now() + :lease_seconds * interval '1 second')
    ON CONFLICT (id) DO UPDATE SET lease_until = excluded.lease_until
    RETURNING clock_timestamp() AS at, lease_until AS until
""")

# A ledger that knows less of this lease than was confirmed was set back while the replica worked.
# Whoever is long gone is forgotten with it.
_RENEW_LEASE = text("""
    WITH forgotten AS (
        DELETE FROM replicas WHERE lease_until < now() - interval '1 day' AND id <> :id
    )
    UPDATE replicas SET lease_until = now() + :lease_seconds * interval '1 second'
     WHERE id = :id AND lease_until >= :known_until
    RETURNING clock_timestamp() AS at, lease_until AS until
""")

_END_LEASE = text("DELETE FROM replicas WHERE id = :id")

# A closed row is what keeps an order from being mailed again: it must outlive its record.
_PURGE_CLOSED = text("""
    DELETE FROM deliveries
     WHERE id IN (SELECT id
                    FROM deliveries
                    JOIN unnest(CAST(:topic_ids AS text[]), CAST(:partitions AS integer[]),
                                CAST(:starts AS bigint[])) AS log (topic_id, partition, start)
                         ON log.partition = deliveries.partition
                   WHERE state IN ('SENT', 'ERASED')
                     AND taken_in_at < now() - :days * interval '1 day'
                     AND (deliveries.topic_id <> log.topic_id OR "offset" < log.start)
                   LIMIT :limit)
""")


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
    is_held: bool = False


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
    suspected_at: datetime | None


@dataclass(frozen=True, slots=True)
class NotSent:
    """What became of a claimed mail that was not sent, as far as is known.

    No due time means a person. An attempt that put the relay to the test and not the mail is given
    back: it was none.
    """

    id: int
    attempts: int
    state: str
    reason: str
    due_seconds: float | None
    is_attempt: bool = True
    suspected_at: datetime | None = None


@dataclass(frozen=True, slots=True)
class Renewal:
    """The ledger's time, and until when a lease runs by it."""

    at: datetime
    until: datetime


@dataclass(frozen=True, slots=True)
class TakenIn:
    """What became of the mails of a batch; those that are neither were known before."""

    claimed: Sequence[Mail]
    held: int = 0
    expired: int = 0


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


def take_in(
    connection: Connection,
    *,
    replica_id: UUID,
    mails: Sequence[NewMail],
    dead_letters: Sequence[NewDeadLetter],
    moves: Sequence[Move],
) -> TakenIn:
    """Write what a batch of records becomes, and how far was read.

    An order already known is not claimed again, one too old to be mailed is DEAD at once, and one
    that may have been mailed before a rewind is HELD. Raises PositionMoved, with nothing written,
    when a partition is no longer where the batch began.
    """
    rows = connection.execute(
        _TAKE_IN,
        {
            **columns(mails, NewMail),
            **positions.as_moved(moves),
            **columns(dead_letters, NewDeadLetter, prefix="letter_"),
            "letter_headerss": [json.dumps(letter.headers) for letter in dead_letters],
            "kind": KIND,
            "campaign": FROM_EVENTS,
            "replica_id": replica_id,
        },
    ).all()
    if not rows[0].move:
        raise PositionMoved
    first: dict[str, NewMail] = {}
    for mail in mails:
        first.setdefault(mail.order_id, mail)
    claimed = [_claimed(first[row.order_id], row.id) for row in rows if row.state == "SENDING"]
    states = Counter(row.state for row in rows)
    return TakenIn(claimed, held=states["HELD"], expired=states["DEAD"])


def take_up(
    connection: Connection,
    *,
    replica_id: UUID,
    lease_until: datetime,
    in_hand: Sequence[int],
    limit: int,
) -> list[Mail]:
    """Claim the mails that are due, oldest first; those too old to be sent expire.

    None in a ledger that does not know the replica's lease as it was confirmed.

    What is in one of the caller's own slots is under way, whatever the ledger says.
    """
    connection.execute(_DUE_TO_EXPIRED)
    which = {
        "replica_id": replica_id,
        "lease_until": lease_until,
        "in_hand": list(in_hand),
        "limit": limit,
    }
    return [_mail(dict(row._mapping)) for row in connection.execute(_CLAIM_DUE, which)]


def end_leases(
    connection: Connection, *, in_hand: Sequence[int], is_resent: bool, delay_seconds: float
) -> int:
    """Make UNKNOWN what was in the hands of replicas that are gone; return how many."""
    return connection.execute(
        _SENDING_TO_UNKNOWN,
        {"in_hand": list(in_hand), "is_resent": is_resent, "delay_seconds": delay_seconds},
    ).rowcount


def release_stray(connection: Connection, *, replica_id: UUID, in_hand: Sequence[int]) -> None:
    """Make due what this replica owns and has in no slot."""
    connection.execute(_STRAY_TO_RETRY, {"replica_id": replica_id, "in_hand": list(in_hand)})


def record_sent(
    connection: Connection,
    accepted: Sequence[tuple[Mail, str]],
    *,
    sent_by: str,
    template_digest: str,
) -> None:
    """Write the 250s, each mail with its reply, and of what the mails were made."""
    connection.execute(
        _ANY_TO_SENT,
        {
            "ids": [mail.id for mail, _ in accepted],
            "message_ids": [mail.message_id for mail, _ in accepted],
            "replies": [reply for _, reply in accepted],
            "sent_by": sent_by,
            "release": RELEASE,
            "template_digest": template_digest,
        },
    )


def record_open(connection: Connection, ended: Sequence[NotSent], *, replica_id: UUID) -> None:
    """Write of mails that the replica still holds why they were not sent, and when they are due."""
    connection.execute(_SENDING_TO_OPEN, {**columns(ended, NotSent), "replica_id": replica_id})


def take_lease(
    connection: Connection, *, replica_id: UUID, name: str, lease_seconds: float
) -> Renewal:
    """Own the rows that are claimed from now on for `lease_seconds`."""
    which = {"id": replica_id, "name": name, "lease_seconds": lease_seconds}
    return Renewal(**connection.execute(_TAKE_LEASE, which).one()._mapping)


def renew_lease(
    connection: Connection, *, replica_id: UUID, lease_seconds: float, known_until: datetime
) -> Renewal:
    """Own the claimed rows for `lease_seconds` more.

    Raises StartUpRefused when the ledger does not know the lease up to `known_until`, as it was
    confirmed: it was restored, and would have mails sent again.
    """
    which = {"id": replica_id, "lease_seconds": lease_seconds, "known_until": known_until}
    row = connection.execute(_RENEW_LEASE, which).one_or_none()
    if row is None:
        raise StartUpRefused("the ledger was set back while this replica worked")
    return Renewal(**row._mapping)


def end_lease(connection: Connection, replica_id: UUID) -> None:
    """Let others have at once what this replica could not finish."""
    connection.execute(_END_LEASE, {"id": replica_id})


def purge(
    connection: Connection, log_starts: Mapping[int, tuple[str, int]], *, days: int, limit: int
) -> int:
    """Forget mails that were closed long ago and whose records are gone; return how many.

    `log_starts` has topic id and first offset of each partition to look at.
    """
    which = {
        "topic_ids": [topic_id for topic_id, _ in log_starts.values()],
        "partitions": list(log_starts),
        "starts": [start for _, start in log_starts.values()],
        "days": days,
        "limit": limit,
    }
    return connection.execute(_PURGE_CLOSED, which).rowcount


def _mail(row: Mapping[str, Any]) -> Mail:
    return Mail(**{**row, "event": bytes(row["event"])})


def _claimed(mail: NewMail, row_id: int) -> Mail:
    return Mail(
        id=row_id,
        order_id=mail.order_id,
        message_id=mail.message_id,
        event=mail.event,
        event_at=mail.event_at,
        give_up_at=mail.give_up_at,
        attempts=1,
        unknown_count=0,
        suspected_at=None,
    )
