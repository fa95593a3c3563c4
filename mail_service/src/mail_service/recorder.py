"""The ledger's one writer of outcomes: a thread that writes together what has gathered."""

import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import assert_never

from sqlalchemy import Engine
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from mail_service import ledger
from mail_service.judge import Cause, Dead, Held, Retry, Sent, Unknown, Verdict
from mail_service.lease import Lease
from mail_service.ledger import Mail, NotSent
from mail_service.models import at_once
from mail_service.telemetry import lines, log, verdicts

RETRY_SECONDS = 0.5
# Where mails end in quick succession others are waited for: a commit costs as much for one.
GATHERING_SECONDS = 0.004


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
        self,
        engine: Engine,
        lease: Lease,
        *,
        template_digest: str,
        on_recorded: Callable[[Sequence[Outcome]], None],
    ) -> None:
        self._at_once = at_once(engine)
        self._lease = lease
        self._template_digest = template_digest
        self._on_recorded = on_recorded
        self._outcomes: queue.SimpleQueue[Outcome | None] = queue.SimpleQueue()
        self._are_many = False
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
        # It need not sit out its wait for another outcome.
        self._outcomes.put(None)
        self._thread.join(timeout_seconds)

    def _run(self) -> None:
        waiting: list[Outcome] = []
        while not self._stop.is_set() or waiting or not self._outcomes.empty():
            waiting += self._gather()
            if not waiting and not self._lease.is_due():
                continue
            waiting = self._write_all(waiting)
            if waiting:
                time.sleep(RETRY_SECONDS)
        try:
            with self._at_once.connect() as connection:
                ledger.end_lease(connection, self._lease.replica_id)
        except DBAPIError as error:
            log.warning("lease.not_ended", error=type(error).__name__)

    def _write_all(self, outcomes: list[Outcome]) -> list[Outcome]:
        """Write these together; return those that could not be written."""
        try:
            self._write(outcomes)
        except PoolTimeout as error:
            log.warning("outcomes.not_recorded", count=len(outcomes), error=type(error).__name__)
            return outcomes
        except DBAPIError as error:
            log.warning("outcomes.not_recorded", count=len(outcomes), error=type(error).__name__)
            if error.connection_invalidated or len(outcomes) < 2:
                return outcomes
            # One that the database refuses must not keep the others from being known.
            return [left for outcome in outcomes for left in self._write_all([outcome])]
        return []

    def _gather(self) -> list[Outcome]:
        """Wait for one outcome, then take all there are: one commit for them together."""
        gathered: list[Outcome] = []
        try:
            outcome = self._outcomes.get(timeout=RETRY_SECONDS)
            if self._are_many:
                time.sleep(GATHERING_SECONDS)
            while True:
                if outcome is not None:
                    gathered.append(outcome)
                outcome = self._outcomes.get_nowait()
        except queue.Empty:
            self._are_many = len(gathered) > 1
            return gathered

    def _write(self, outcomes: Sequence[Outcome]) -> None:
        accepted, ended = [], []
        for outcome in outcomes:
            if isinstance(outcome.verdict, Sent):
                accepted.append((outcome.mail, outcome.verdict.reply))
            else:
                ended.append(self._not_sent(outcome.mail, outcome.verdict))
        with self._at_once.connect() as connection:
            if self._lease.is_due():
                started_at = self._lease.now()
                self._lease.renewed(started_at, self._lease.renew(connection))
            if ended:
                ledger.record_open(connection, ended, replica_id=self._lease.replica_id)
            if accepted:
                ledger.record_sent(
                    connection,
                    accepted,
                    sent_by=self._lease.name,
                    template_digest=self._template_digest,
                )
        # The slots first: nobody waits for a line.
        self._on_recorded(outcomes)
        with lines.together():
            for outcome in outcomes:
                _log(outcome)

    def _not_sent(self, mail: Mail, verdict: Retry | Unknown | Dead | Held) -> NotSent:
        state, due_seconds = _as_row(verdict)
        cause = verdict.cause if isinstance(verdict, Retry) else None
        return NotSent(
            id=mail.id,
            attempts=mail.attempts,
            state=state,
            reason=verdict.reason,
            due_seconds=due_seconds,
            is_attempt=cause is None or cause.is_attempt,
            suspected_at=self._lease.ledger_now() if cause is Cause.SUSPECT else None,
        )


def _as_row(verdict: Retry | Unknown | Dead | Held) -> tuple[str, float | None]:
    match verdict:
        case Retry():
            return "RETRY", verdict.delay_seconds
        case Unknown():
            return "UNKNOWN", verdict.delay_seconds
        case Dead():
            return "DEAD", None
        case Held():
            return "HELD", None
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
