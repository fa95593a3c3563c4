"""The slots: render, send, judge; one recorder that group-commits."""

import queue
import random
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import assert_never

from sqlalchemy import Connection, Engine
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from mail_service import events, ledger
from mail_service.confirmation import CannotRender, Confirmation
from mail_service.events import UnreadableRecord
from mail_service.judge import Dead, Judge, Retry, Sent, Unknown, Verdict
from mail_service.lease import Lease
from mail_service.ledger import Mail
from mail_service.smtp import SmtpConnection
from mail_service.telemetry import log, slots_busy, verdicts

RETRY_SECONDS = 0.5
DRAIN_SECONDS = 30.0
# Of which this is kept for writing what became of the last mails.
RECORDING_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one attempt."""

    mail: Mail
    verdict: Verdict


class Recorder:
    """The ledger's one writer of outcomes; it also renews the lease.

    What it could not write yet it keeps and writes later: a 250 is not forgotten because the
    database was away.
    """

    def __init__(
        self, engine: Engine, lease: Lease, on_recorded: Callable[[Sequence[Outcome]], None]
    ) -> None:
        self._engine = engine
        self._lease = lease
        self._on_recorded = on_recorded
        self._outcomes: queue.SimpleQueue[Outcome] = queue.SimpleQueue()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="recorder", daemon=True)

    def start(self) -> None:
        """Take the lease, then record in a thread."""
        self._write([])
        self._thread.start()

    def record(self, outcome: Outcome) -> None:
        """Have an outcome written."""
        self._outcomes.put(outcome)

    def stop(self, timeout_seconds: float) -> None:
        """Write what is left, end the lease and return, after a while in any case."""
        self._stop.set()
        self._thread.join(timeout_seconds)

    def _run(self) -> None:
        waiting: list[Outcome] = []
        while not self._stop.is_set() or waiting or not self._outcomes.empty():
            waiting += self._gather()
            if not waiting and not self._lease.is_due():
                continue
            try:
                self._write(waiting)
                waiting = []
            except (DBAPIError, PoolTimeout) as error:
                log.warning("outcomes.not_recorded", count=len(waiting), error=type(error).__name__)
                time.sleep(RETRY_SECONDS)
        try:
            with self._engine.begin() as connection:
                ledger.end_lease(connection, self._lease.replica_id)
        except DBAPIError as error:
            log.warning("lease.not_ended", error=type(error).__name__)

    def _gather(self) -> list[Outcome]:
        """Wait for one outcome, then take all there are: one commit for them together."""
        gathered: list[Outcome] = []
        try:
            gathered.append(self._outcomes.get(timeout=RETRY_SECONDS))
            while True:
                gathered.append(self._outcomes.get_nowait())
        except queue.Empty:
            return gathered

    def _write(self, outcomes: Sequence[Outcome]) -> None:
        started_at = self._lease.now()
        is_renewed = self._lease.is_due()
        with self._engine.begin() as connection:
            if is_renewed:
                self._lease.renew(connection)
            replies = {}
            for outcome in outcomes:
                if isinstance(outcome.verdict, Sent):
                    replies[outcome.mail.id] = outcome.verdict.reply
                else:
                    self._write_open(connection, outcome.mail, outcome.verdict)
            if replies:
                ledger.record_sent(connection, replies, sent_by=self._lease.name)
        if is_renewed:
            self._lease.renewed(started_at)
        for outcome in outcomes:
            _log(outcome)
        self._on_recorded(outcomes)

    def _write_open(
        self, connection: Connection, mail: Mail, verdict: Retry | Unknown | Dead
    ) -> None:
        state, due_seconds = _as_row(verdict)
        ledger.record_open(
            connection,
            mail=mail,
            replica_id=self._lease.replica_id,
            state=state,
            reason=verdict.reason,
            due_seconds=due_seconds,
        )


class Senders:
    """`count` slots, each a thread with one kept connection, taking mails as they are free."""

    def __init__(
        self,
        *,
        count: int,
        engine: Engine,
        lease: Lease,
        connect: Callable[[], SmtpConnection],
        confirmation: Confirmation,
        judge: Judge,
    ) -> None:
        self._lease = lease
        self._connect = connect
        self._confirmation = confirmation
        self._judge = judge
        self._mails: queue.SimpleQueue[tuple[Mail, int] | None] = queue.SimpleQueue()
        self._in_slots: set[int] = set()
        self._changed = threading.Condition()
        self._count = count
        self._recorder = Recorder(engine, lease, self._release)
        self._threads = [
            threading.Thread(target=self._run_slot, name=f"slot-{number}", daemon=True)
            for number in range(count)
        ]

    def start(self) -> None:
        """Take the lease and open the slots."""
        self._recorder.start()
        for thread in self._threads:
            thread.start()

    def wait_for_free(self, timeout_seconds: float) -> int:
        """Return how many slots are free, waiting for one for a while."""
        with self._changed:
            self._changed.wait_for(lambda: self._free() > 0, timeout_seconds)
            return self._free()

    @property
    def term(self) -> int:
        """The lease's term: read before a claim, it says later whether the claim still stands."""
        return self._lease.term

    def mail_ids(self) -> list[int]:
        """Return the rows that are in a slot, or whose outcome is not yet written."""
        with self._changed:
            return list(self._in_slots)

    def hand_out(self, mails: Sequence[Mail], *, term: int) -> None:
        """Give mails to slots, claimed in this term of the lease; there must be as many free."""
        with self._changed:
            self._in_slots |= {mail.id for mail in mails}
            slots_busy.set(len(self._in_slots))
        for mail in mails:
            self._mails.put((mail, term))

    def drain(self) -> None:
        """Await the answers of what is under way, record them, end the lease.

        What does not end within the drain time stays claimed and becomes UNKNOWN.
        """
        deadline = time.monotonic() + DRAIN_SECONDS
        with self._changed:
            self._changed.wait_for(lambda: not self._in_slots, DRAIN_SECONDS - RECORDING_SECONDS)
        for _ in self._threads:
            self._mails.put(None)
        self._recorder.stop(deadline - time.monotonic())

    def _release(self, outcomes: Sequence[Outcome]) -> None:
        with self._changed:
            self._in_slots -= {outcome.mail.id for outcome in outcomes}
            slots_busy.set(len(self._in_slots))
            self._changed.notify_all()

    def _free(self) -> int:
        return self._count - len(self._in_slots)

    def _run_slot(self) -> None:
        connection = self._connect()
        while (claim := self._mails.get()) is not None:
            mail, term = claim
            self._recorder.record(Outcome(mail, self._attempt(mail, term, connection)))
        connection.close()

    def _attempt(self, mail: Mail, term: int, connection: SmtpConnection) -> Verdict:
        try:
            composed = self._confirmation.compose(
                events.parse(mail.event), event_at=mail.event_at, message_id=mail.message_id
            )
        except (CannotRender, UnreadableRecord) as error:
            return Dead(f"cannot be rendered: {error}")
        answer = connection.deliver(
            composed.content,
            sender=composed.sender,
            recipient=composed.recipient,
            may_finish=lambda: self._lease.is_held(term),
        )
        return self._judge.judge(
            answer,
            attempts=mail.attempts,
            unknown_count=mail.unknown_count,
            give_up_at=mail.give_up_at,
            now=datetime.now(UTC),
            jitter=random.random(),  # noqa: S311 - spreads retries, guards nothing
        )


def _as_row(verdict: Retry | Unknown | Dead) -> tuple[str, float | None]:
    match verdict:
        case Retry():
            return "RETRY", verdict.delay_seconds
        case Unknown():
            return "UNKNOWN", verdict.delay_seconds
        case Dead():
            return "DEAD", None
        case _:
            assert_never(verdict)


def _log(outcome: Outcome) -> None:
    name = type(outcome.verdict).__name__.upper()
    verdicts.labels(name).inc()
    reason = None if isinstance(outcome.verdict, Sent) else outcome.verdict.reason
    log.info(
        "mail.judged",
        order_id=outcome.mail.order_id,
        attempts=outcome.mail.attempts,
        verdict=name,
        reason=reason,
    )
