"""The slots: render, send and judge, so many at once in one thread."""

import random
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import Engine

from mail_service import events
from mail_service.confirmation import CannotRender, ComposedMail, Confirmation
from mail_service.dialogues import Dialogues, Steps
from mail_service.events import OrderCreated, UnreadableRecord
from mail_service.judge import (
    Cause,
    Dead,
    Held,
    History,
    Judge,
    Retry,
    Sent,
    Verdict,
    bearing,
)
from mail_service.lease import Lease
from mail_service.ledger import Mail
from mail_service.pace import Pace
from mail_service.recorder import Outcome, Recorder
from mail_service.replies import Answer
from mail_service.settings import Recipients
from mail_service.smtp import CannotAddress, SmtpConnection
from mail_service.telemetry import breaker_is_open, log, slots_busy

DRAIN_SECONDS = 30.0
# Of which this is kept for writing what became of the last mails.
RECORDING_SECONDS = 5.0
GOODBYE_SECONDS = 1.0
GATHERING_SECONDS = 0.02
# How often the wait looks whether it is to end: a signal's handler must not take a lock.
HURRY_SECONDS = 0.1
NONE_KNOWN: Mapping[str, OrderCreated] = {}


@dataclass(frozen=True, slots=True)
class Term:
    """When a claim was begun: in which term of the lease, after how many recalls of the pace."""

    of_lease: int
    recalls: int


@dataclass(frozen=True, slots=True)
class Claim:
    """A mail for a slot, and when it was claimed."""

    mail: Mail
    term: Term


class Senders:
    """The slots: so many dialogues at once, if the pace allows, on kept connections."""

    def __init__(
        self,
        *,
        count: int,
        engine: Engine,
        lease: Lease,
        connect: Callable[[], SmtpConnection],
        confirmation: Confirmation,
        recipients: Recipients,
        judge: Judge,
        pace: Pace,
    ) -> None:
        self._lease = lease
        # What was used last is used next: of a relay that is not busy few connections are taken.
        self._connections = deque(connect() for _ in range(count))
        self._confirmation = confirmation
        self._recipients = recipients
        self._judge = judge
        self._pace = pace
        self._dialogues = Dialogues()
        self._composed: deque[tuple[Claim, ComposedMail]] = deque()
        self._in_hand: set[int] = set()
        self._recalls = 0
        self._changed = threading.Condition()
        self._count = count
        slots_busy.set_function(lambda: self._busy)
        self._is_draining = False
        self._relay_accepted_at: datetime | None = None
        self._recorder = Recorder(
            engine, lease, template_digest=confirmation.digest, on_recorded=self._release
        )

    def start(self) -> None:
        """Take the lease and open the slots."""
        self._recorder.start()
        self._dialogues.start()

    def wait_for_room(self, timeout_seconds: float) -> int:
        """Return how many mails may be claimed, waiting for the first for a while.

        They are twice as many as there are slots, so that no slot waits for the ledger. Where room
        is made one by one, more is waited for: to claim one mail costs nearly as much as many.
        """
        with self._changed:
            if self._changed.wait_for(lambda: self._room() > 0, timeout_seconds):
                self._changed.wait_for(lambda: self._room() >= self._count, GATHERING_SECONDS)
            self._recalls = self._pace.recalls
            return self._room()

    @property
    def term(self) -> Term:
        """Read before a claim, it says later whether the claim still stands."""
        return Term(self._lease.term, self._recalls)

    def mail_ids(self) -> list[int]:
        """Return the rows that wait for a slot, are in one, or whose outcome is not yet written."""
        with self._changed:
            return list(self._in_hand)

    def hand_out(
        self, mails: Sequence[Mail], *, term: Term, known: Mapping[str, OrderCreated] = NONE_KNOWN
    ) -> None:
        """Give mails to slots, claimed in this term; there must be room for as many.

        `known` has the events, by order, that need not be read from the rows again.
        """
        with self._changed:
            self._in_hand |= {mail.id for mail in mails}
            self._pace.began(len(mails), now=time.monotonic())
        self._dialogues.begin(
            self._begin(Claim(mail, term), known.get(mail.order_id)) for mail in mails
        )

    def recall(self) -> None:
        """Give back what is claimed and has not begun."""
        with self._changed:
            self._pace.recalls += 1
        self._dialogues.begin([self._hold()])

    @property
    def turned_at(self) -> float:
        """When the dialogues' thread last went on, by the monotonic clock."""
        return self._dialogues.turned_at

    def drain(self, hurry: threading.Event) -> None:
        """Send no dot more, await the answers to those that went out, record, end the lease.

        What does not end within the drain time, or before `hurry` is set, stays claimed and
        becomes UNKNOWN.
        """
        deadline = time.monotonic() + DRAIN_SECONDS
        self._is_draining = True
        self._dialogues.begin([self._hold()])
        while not hurry.is_set() and time.monotonic() < deadline - RECORDING_SECONDS:
            with self._changed:
                if self._changed.wait_for(lambda: not self._in_hand, HURRY_SECONDS):
                    break
        self._dialogues.begin([connection.close() for connection in list(self._connections)])
        self._recorder.stop(deadline - time.monotonic())
        self._dialogues.stop(patience_seconds=0.0 if self._in_hand else GOODBYE_SECONDS)

    def _release(self, outcomes: Sequence[Outcome]) -> None:
        with self._changed:
            self._in_hand -= {outcome.mail.id for outcome in outcomes}
            self._changed.notify_all()

    def _room(self) -> int:
        allowance = self._pace.allowance(under_way=len(self._in_hand), now=time.monotonic())
        # Behind an open breaker a probe that waits for a slot would be none.
        most = self._count if self._pace.is_open else self._pace.capacity
        return min(most - len(self._in_hand), allowance)

    def _begin(self, claim: Claim, event: OrderCreated | None) -> Steps[None]:
        """Compose a mail before it has a slot: with one it would keep the relay waiting."""
        if self._is_recalled(claim):
            self._give_back(claim.mail)
        elif isinstance(composed := self._compose(claim.mail, event), ComposedMail):
            self._composed.append((claim, composed))
        else:
            self._recorder.record(Outcome(claim.mail, composed))
        yield from self._hold()

    def _hold(self) -> Steps[None]:
        """Send one mail after the other, while there are some and a slot is free."""
        while self._composed and (self._connections or self._is_recalled(self._composed[0][0])):
            claim, composed = self._composed.popleft()
            if self._is_recalled(claim):
                self._give_back(claim.mail)
                continue
            connection = self._connections.pop()
            verdict = yield from self._attempt(claim, composed, connection)
            if connection.is_open:
                self._connections.append(connection)
            else:
                self._connections.appendleft(connection)
            self._recorder.record(Outcome(claim.mail, verdict))

    def _give_back(self, mail: Mail) -> None:
        self._recorder.record(Outcome(mail, Retry("not begun", 0.0, Cause.STOPPED)))

    def _is_recalled(self, claim: Claim) -> bool:
        return (
            self._is_draining
            or claim.term.recalls != self._pace.recalls
            or claim.term.of_lease != self._lease.term
        )

    @property
    def _busy(self) -> int:
        return self._count - len(self._connections)

    def _compose(self, mail: Mail, event: OrderCreated | None) -> ComposedMail | Dead | Held:
        """Return the mail, or why there is none."""
        try:
            composed = self._confirmation.compose(
                event or events.parse(mail.event),
                event_at=mail.event_at,
                message_id=mail.message_id,
            )
        except (CannotRender, UnreadableRecord) as error:
            return Dead(f"cannot be rendered: {error}")
        if not self._recipients.allow(composed.recipient):
            return Held("MAIL_ONLY_TO does not name the recipient")
        return composed

    def _attempt(
        self, claim: Claim, composed: ComposedMail, connection: SmtpConnection
    ) -> Steps[Verdict]:
        try:
            answer = yield from connection.deliver(
                composed.content,
                sender=composed.sender,
                recipient=composed.recipient,
                may_finish=lambda: (
                    self._lease.is_held(claim.term.of_lease) and not self._is_draining
                ),
            )
        except CannotAddress as error:
            return Dead(f"cannot be addressed: {error}")
        return self._judged(claim.mail, answer)

    def _judged(self, mail: Mail, answer: Answer) -> Verdict:
        now = self._lease.ledger_now()
        history = History(
            attempts=mail.attempts,
            unknown_count=mail.unknown_count,
            give_up_at=mail.give_up_at,
            suspected_at=mail.suspected_at,
            relay_accepted_at=self._relay_accepted_at,
        )
        jitter = random.random()  # noqa: S311 - spreads retries, guards nothing
        verdict = self._judge.judge(answer, history, now=now, jitter=jitter)
        if isinstance(verdict, Sent):
            self._relay_accepted_at = now
        with self._changed:
            was_open = self._pace.is_open
            self._pace.note(bearing(answer), under_way=self._busy, now=time.monotonic())
            if self._pace.is_open != was_open:
                breaker_is_open.set(self._pace.is_open)
                log.warning("breaker.changed", is_open=self._pace.is_open, answer=str(answer))
        return verdict


def most_in_hand(slots: int, *, is_rate_limited: bool) -> int:
    """Return how many mails a replica of so many slots claims at most.

    Behind a rate none ahead: one that waited for a slot would not go when its token was granted.
    """
    return slots if is_rate_limited else 2 * slots
