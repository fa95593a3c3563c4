"""poll → read → take in → commit → hand out."""

import hashlib
import threading
import time
from collections.abc import Sequence
from datetime import timedelta

from sqlalchemy import Engine
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from mail_service import control, events, ledger, startup
from mail_service.confirmation import message_id
from mail_service.events import OrderCreated, UnreadableRecord
from mail_service.kafka import KafkaUnavailable, Member, Record
from mail_service.lease import Lease
from mail_service.ledger import NewDeadLetter, NewMail, TakenIn
from mail_service.models import at_once
from mail_service.places import Places
from mail_service.positions import PositionMoved
from mail_service.senders import Senders
from mail_service.settings import Settings
from mail_service.telemetry import (
    leases_ended,
    log,
    mails_taken_up,
    partitions_waiting,
    records_taken_in,
)

READ_SECONDS = 0.5
TAKE_UP_SECONDS = 0.5
ROOM_SECONDS = 1.0
RETRY_SECONDS = 1.0
NO_TOKENS_SECONDS = 0.02
PURGE_SECONDS = 3600.0
PURGED_ROWS = 1000
# What a dead letter keeps of its value; the digest is of the whole.
DEAD_LETTER_BYTES = 64 * 1024
DEAD_LETTER_KEY_BYTES = 1024
DEAD_LETTER_HEADERS = 64
DEAD_LETTER_HEADER_BYTES = 1024


class Consumption:
    """The loop: it never stays away from polling for longer than it waits for a free slot."""

    def __init__(
        self,
        *,
        settings: Settings,
        engine: Engine,
        senders: Senders,
        lease: Lease,
        stop: threading.Event,
        hurry: threading.Event,
    ) -> None:
        self._settings = settings
        self._engine = engine
        self._at_once = at_once(engine)
        self._senders = senders
        self._lease = lease
        self._stop = stop
        self._hurry = hurry
        self._taken_up_at = self._purged_at = float("-inf")
        self._is_paused = self._is_more_due = self._is_due_first = False
        self._is_same_past = False
        self._places = Places(engine)
        self.round_at = time.monotonic()
        self._member = Member(
            settings.kafka,
            client_id=lease.name,
            session_timeout_ms=settings.timing.session_timeout_ms,
            place=self._places.place,
        )

    @property
    def reads_all(self) -> bool:
        """Whether every partition the group gave this replica is being read."""
        return self._member.has_joined and self._member.waiting == 0

    def run(self) -> None:
        """Consume until told to stop; then finish what is under way and leave the group."""
        if not self._begin():
            return
        self._member.join()
        try:
            while not self._stop.is_set():
                self.round_at = time.monotonic()
                try:
                    self._round()
                except (DBAPIError, PoolTimeout, PositionMoved) as error:
                    log.warning("round.interrupted", error=type(error).__name__)
                    self._stop.wait(RETRY_SECONDS)
            self._senders.drain(self._hurry)
        finally:
            self._member.leave()

    def _begin(self) -> bool:
        """Take the lease in a ledger that is fit, once it answers; False when told to stop."""
        while not self._stop.is_set():
            self.round_at = time.monotonic()
            try:
                with self._engine.connect() as connection:
                    startup.require(startup.ledger_faults(connection))
                self._senders.start()
            except (DBAPIError, PoolTimeout) as error:
                log.warning("ledger.not_reached", error=type(error).__name__)
                self._stop.wait(RETRY_SECONDS)
            else:
                return True
        return False

    def _round(self) -> None:
        try:
            self._member.place_waiting()
            self._member.commit_again()
            self._purge()
            self._check_past()
        except KafkaUnavailable as error:
            # What the ledger knows, once that can be believed, and partitions that were placed do
            # not wait for it.
            log.warning("partitions.not_placed", error=str(error))
        partitions_waiting.set(self._member.waiting)
        free = room = self._senders.wait_for_room(ROOM_SECONDS)
        # While more is due every other round is for it, and what is fresh has the rest.
        self._is_due_first = not self._is_due_first and self._is_more_due
        is_due = self._is_due_first or time.monotonic() - self._taken_up_at > TAKE_UP_SECONDS
        if is_due and self._is_same_past:
            room -= self._take_up(room)
            self._taken_up_at = time.monotonic()
        if room > 0 and not self._is_paused:
            self._member.resume()
            self._read(room)
        elif free == 0 or self._is_paused:
            # Paused only now: a pause throws away what was fetched ahead.
            self._member.pause()
            strays = self._member.read(limit=1, timeout_seconds=0)
            self._member.place_anew({record.partition for record in strays})
            if self._is_paused:
                self._stop.wait(TAKE_UP_SECONDS)

    def _read(self, room: int) -> None:
        rate = self._settings.mail_rate_per_second
        wait_seconds = 0.0 if self._is_more_due else READ_SECONDS
        if rate is None:
            self._take_in(self._member.read(limit=room, timeout_seconds=wait_seconds))
            return
        with self._engine.begin() as connection:
            granted = control.take_tokens(connection, rate_per_second=rate, wanted=room)
        if not granted:
            self._stop.wait(NO_TOKENS_SECONDS)
            return
        claimed = self._take_in(self._member.read(limit=granted, timeout_seconds=wait_seconds))
        if claimed < granted:
            with self._engine.begin() as connection:
                control.give_back_tokens(connection, unused=granted - claimed)

    def _check_past(self) -> None:
        """Before the first claim: a ledger that was restored would send again what is due in it."""
        if not self._is_same_past:
            for where in self._member.topic.describe():
                self._places.start_of(where)
            self._is_same_past = True

    def _purge(self) -> None:
        """Once an hour forget mails that nothing can bring back, in batches."""
        if not self._member.placed or time.monotonic() - self._purged_at < PURGE_SECONDS:
            return
        # Whatever comes of it: a cluster that is away must not be waited for in every round.
        self._purged_at = time.monotonic()
        log_starts = self._member.log_starts()
        with self._engine.begin() as connection:
            purged = ledger.purge(
                connection, log_starts, days=startup.CLOSED_ROWS_DAYS, limit=PURGED_ROWS
            )
        if purged == PURGED_ROWS:
            self._purged_at = float("-inf")

    def _take_up(self, room: int) -> int:
        """Claim what is due; half of the room at most, so that retries do not starve fresh mail."""
        limit = max(1, room // 2) if room > 0 else 0
        term, in_hand = self._senders.term, self._senders.mail_ids()
        with self._engine.begin() as connection:
            if astray := self._places.astray(connection, self._member.placed):
                # Nothing is claimed before it is known why.
                self._member.place_anew(astray)
                return 0
            self._is_paused = control.is_paused(connection)
            rate = self._settings.mail_rate_per_second
            if limit and rate is not None:
                limit = control.take_tokens(connection, rate_per_second=rate, wanted=limit)
            ledger.release_stray(connection, replica_id=self._lease.replica_id, in_hand=in_hand)
            ended = ledger.end_leases(
                connection,
                in_hand=in_hand,
                is_resent=self._settings.mail_on_unknown == "resend",
                delay_seconds=self._settings.timing.unknown_delay_seconds,
            )
            mails = ledger.take_up(
                connection,
                replica_id=self._lease.replica_id,
                lease_until=self._lease.until,
                in_hand=in_hand,
                limit=limit,
            )
            if limit:
                self._is_more_due = len(mails) == limit
            if rate is not None and len(mails) < limit:
                control.give_back_tokens(connection, unused=limit - len(mails))
        if self._is_paused:
            self._senders.recall()
        if ended:
            leases_ended.inc(ended)
            log.warning("leases.ended", count=ended)
        mails_taken_up.inc(len(mails))
        self._senders.hand_out(mails, term=term)
        return len(mails)

    def _take_in(self, records: Sequence[Record]) -> int:
        """Write what these become; return how many mails were claimed."""
        if not records:
            return 0
        mails, dead_letters, known = self._sort(records)
        moves = self._places.moves(records)
        term = self._senders.term
        try:
            with self._at_once.connect() as connection:
                taken_in = ledger.take_in(
                    connection,
                    replica_id=self._lease.replica_id,
                    mails=mails,
                    dead_letters=dead_letters,
                    moves=moves,
                )
        except (PositionMoved, DBAPIError, PoolTimeout):
            # Read them again, from where the ledger is. Whether the claims were committed is not
            # known either: what is ours and in no slot is released with the next take-up.
            self._member.place_anew({move.partition for move in moves})
            raise
        self._places.note(moves)
        self._member.commit({move.partition: (move.topic_id, move.next_offset) for move in moves})
        _count(records, mails, dead_letters, taken_in)
        self._senders.hand_out(taken_in.claimed, term=term, known=known)
        return len(taken_in.claimed)

    def _sort(
        self, records: Sequence[Record]
    ) -> tuple[list[NewMail], list[NewDeadLetter], dict[str, OrderCreated]]:
        """Tell mails, with their events by order, from dead letters; what is neither is ignored."""
        mails, dead_letters = [], []
        known: dict[str, OrderCreated] = {}
        for record in records:
            try:
                event = events.read(record)
            except UnreadableRecord as error:
                dead_letters.append(_dead_letter(record, str(error)))
                log.error(
                    "record.unreadable",
                    partition=record.partition,
                    offset=record.offset,
                    reason=str(error),
                )
                continue
            if event is not None:
                mails.append(self._new_mail(record, event.order_id))
                # Of two records of an order the ledger takes the first.
                known.setdefault(event.order_id, event)
        return mails, dead_letters, known

    def _new_mail(self, record: Record, order_id: str) -> NewMail:
        event_at = events.occurred_at(record)
        patience = timedelta(hours=self._settings.mail_give_up_hours)
        start = self._places.known(record.partition)
        return NewMail(
            order_id=order_id,
            message_id=message_id(order_id, mail_from=self._settings.mail_from),
            event=record.value or b"",
            event_at=event_at,
            give_up_at=max(event_at, start.released_at or event_at) + patience,
            topic_id=record.topic_id,
            partition=record.partition,
            offset=record.offset,
            is_held=record.offset < start.held_until,
        )


def _count(
    records: Sequence[Record],
    mails: Sequence[NewMail],
    dead_letters: Sequence[NewDeadLetter],
    taken_in: TakenIn,
) -> None:
    claimed, held, expired = len(taken_in.claimed), taken_in.held, taken_in.expired
    records_taken_in.labels("mail").inc(claimed)
    records_taken_in.labels("held").inc(held)
    records_taken_in.labels("expired").inc(expired)
    records_taken_in.labels("duplicate").inc(len(mails) - claimed - held - expired)
    records_taken_in.labels("dead_letter").inc(len(dead_letters))
    records_taken_in.labels("ignored").inc(len(records) - len(mails) - len(dead_letters))


def _dead_letter(record: Record, reason: str) -> NewDeadLetter:
    value = record.value or b""
    return NewDeadLetter(
        topic_id=record.topic_id,
        partition=record.partition,
        offset=record.offset,
        key=record.key and record.key[:DEAD_LETTER_KEY_BYTES],
        value=value[:DEAD_LETTER_BYTES],
        value_sha256=hashlib.sha256(value).hexdigest(),
        headers=[
            (_shown(name.encode()), _shown(content))
            for name, content in record.headers[:DEAD_LETTER_HEADERS]
        ],
        reason=reason,
    )


def _shown(header: bytes) -> str:
    """Return as much of a header as is kept, in letters that PostgreSQL takes."""
    kept = header[:DEAD_LETTER_HEADER_BYTES]
    return kept.decode("utf-8", errors="backslashreplace").replace("\0", "\\0")
