"""poll → read → take in → commit → hand out."""

import hashlib
import threading
import time
from collections.abc import Sequence
from datetime import timedelta
from uuid import UUID

from sqlalchemy import Engine
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from mail_service import events, ledger
from mail_service.confirmation import message_id
from mail_service.events import UnreadableRecord
from mail_service.kafka import KafkaUnavailable, Log, Member, Record
from mail_service.ledger import Mail, Move, NewDeadLetter, NewMail, PositionMoved, Start
from mail_service.senders import Senders
from mail_service.settings import Settings
from mail_service.telemetry import leases_ended, log, mails_taken_up, records_taken_in

READ_SECONDS = 0.5
TAKE_UP_SECONDS = 0.5
FREE_SLOT_SECONDS = 1.0
RETRY_SECONDS = 1.0
# What a dead letter keeps of its value; the digest is of the whole.
DEAD_LETTER_BYTES = 64 * 1024


class Consumption:
    """The loop: it never stays away from polling for longer than it waits for a free slot."""

    def __init__(
        self,
        *,
        settings: Settings,
        engine: Engine,
        senders: Senders,
        replica_id: UUID,
        replica_name: str,
        stop: threading.Event,
    ) -> None:
        self._settings = settings
        self._engine = engine
        self._senders = senders
        self._replica_id = replica_id
        self._stop = stop
        self._starts: dict[int, tuple[str, Start]] = {}
        self._taken_up_at = float("-inf")
        self.round_at = time.monotonic()
        self._member = Member(
            settings.kafka,
            client_id=replica_name,
            session_timeout_ms=settings.timing.session_timeout_ms,
            place=self._place,
        )

    def run(self) -> None:
        """Consume until told to stop; then finish what is under way and leave the group."""
        self._senders.start()
        self._member.join()
        while not self._stop.is_set():
            self.round_at = time.monotonic()
            try:
                self._round()
            except (DBAPIError, PoolTimeout, PositionMoved) as error:
                log.warning("round.interrupted", error=type(error).__name__)
                self._stop.wait(RETRY_SECONDS)
        self._senders.drain()
        self._member.leave()

    def _round(self) -> None:
        try:
            self._member.place_waiting()
        except KafkaUnavailable as error:
            # What the ledger knows, and partitions that were placed, do not wait for it.
            log.warning("partitions.not_placed", error=str(error))
        free = self._senders.wait_for_free(FREE_SLOT_SECONDS)
        if not free:
            # Paused only now: a pause throws away what was fetched ahead.
            self._member.pause()
            strays = self._member.read(limit=1, timeout_seconds=0)
            self._member.place_anew({record.partition for record in strays})
            return
        self._member.resume()
        if time.monotonic() - self._taken_up_at > TAKE_UP_SECONDS:
            # Half of the slots at most, so that retries do not starve fresh mail.
            free -= self._take_up(max(1, free // 2))
            self._taken_up_at = time.monotonic()
        if free:
            self._take_in(self._member.read(limit=free, timeout_seconds=READ_SECONDS))

    def _take_up(self, limit: int) -> int:
        term = self._senders.term
        with self._engine.begin() as connection:
            ledger.release_stray(
                connection, replica_id=self._replica_id, in_slots=self._senders.mail_ids()
            )
            ended = ledger.end_leases(
                connection,
                is_resent=self._settings.mail_on_unknown == "resend",
                delay_seconds=self._settings.timing.unknown_delay_seconds,
            )
            mails = ledger.take_up(connection, replica_id=self._replica_id, limit=limit)
        if ended:
            leases_ended.inc(ended)
            log.warning("leases.ended", count=ended)
        mails_taken_up.inc(len(mails))
        self._senders.hand_out(mails, term=term)
        return len(mails)

    def _take_in(self, records: Sequence[Record]) -> None:
        if not records:
            return
        mails, dead_letters = self._sort(records)
        moves = self._moves(records)
        term = self._senders.term
        try:
            with self._engine.begin() as connection:
                claimed = ledger.take_in(
                    connection,
                    replica_id=self._replica_id,
                    mails=mails,
                    dead_letters=dead_letters,
                    moves=moves,
                )
        except (PositionMoved, DBAPIError, PoolTimeout):
            # Read them again, from where the ledger is. Whether the claims were committed is not
            # known either: what is ours and in no slot is released with the next take-up.
            self._member.place_anew({move.partition for move in moves})
            raise
        for move in moves:
            start = Start(move.next_offset, move.epoch)
            self._starts[move.partition] = (move.topic_id, start)
        self._member.commit({move.partition: move.next_offset for move in moves})
        self._count(records, mails, dead_letters, claimed)
        self._senders.hand_out(claimed, term=term)

    def _sort(self, records: Sequence[Record]) -> tuple[list[NewMail], list[NewDeadLetter]]:
        mails, dead_letters = [], []
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
        return mails, dead_letters

    def _new_mail(self, record: Record, order_id: str) -> NewMail:
        event_at = events.occurred_at(record)
        return NewMail(
            order_id=order_id,
            message_id=message_id(order_id, mail_from=self._settings.mail_from),
            event=record.value or b"",
            event_at=event_at,
            give_up_at=event_at + timedelta(hours=self._settings.mail_give_up_hours),
            topic_id=record.topic_id,
            partition=record.partition,
            offset=record.offset,
        )

    def _moves(self, records: Sequence[Record]) -> list[Move]:
        """Say of each partition where this batch began and ends."""
        ends = {record.partition: record.offset + 1 for record in records}
        return [
            Move(topic_id, partition, start.epoch, start.next_offset, ends[partition])
            for partition, (topic_id, start) in self._starts.items()
            if partition in ends
        ]

    def _place(self, where: Log) -> int:
        with self._engine.begin() as connection:
            start = ledger.start_of(
                connection,
                cluster_id=where.cluster_id,
                topic_id=where.topic_id,
                partition=where.partition,
                log_start=where.log_start,
            )
        self._starts[where.partition] = (where.topic_id, start)
        return start.next_offset

    def _count(
        self,
        records: Sequence[Record],
        mails: Sequence[NewMail],
        dead_letters: Sequence[NewDeadLetter],
        claimed: Sequence[Mail],
    ) -> None:
        records_taken_in.labels("mail").inc(len(claimed))
        records_taken_in.labels("duplicate").inc(len(mails) - len(claimed))
        records_taken_in.labels("dead_letter").inc(len(dead_letters))
        records_taken_in.labels("ignored").inc(len(records) - len(mails) - len(dead_letters))


def _dead_letter(record: Record, reason: str) -> NewDeadLetter:
    value = record.value or b""
    return NewDeadLetter(
        topic_id=record.topic_id,
        partition=record.partition,
        offset=record.offset,
        key=record.key,
        value=value[:DEAD_LETTER_BYTES],
        value_sha256=hashlib.sha256(value).hexdigest(),
        headers=[
            (name, content.decode("utf-8", errors="backslashreplace").replace("\0", "\\0"))
            for name, content in record.headers
        ],
        reason=reason,
    )
