"""A reply → sent, retry, unknown, dead, held: where a mail is given up on; pure.

A refusal is the message's, the recipient's or the system's. The system's own trouble opens the
breaker, burns no attempt and kills no mail. A 5xx that may be either is suspect.
"""

from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import Enum, auto

from mail_service.replies import CLOSING, Answer, Bearing, Stage
from mail_service.settings import Timing

SUSPECT_DELAY_SECONDS = 15 * 60
# RFC 3463: the mailbox or its address does not exist, whoever asks.
NO_SUCH_ADDRESS = frozenset({"5.1.1", "5.1.2", "5.1.3", "5.1.6", "5.1.10"})
# Our own address as the sender is what it takes offence at.
SENDER_REFUSED = frozenset({"5.1.7", "5.1.8"})
TOO_LARGE = "5.3.4"
NO_SMTPUTF8 = "5.6.7"
AUTHENTICATE_FIRST = 530
BAD_CREDENTIALS = 535
SYSTEM_CODES = frozenset({CLOSING, AUTHENTICATE_FIRST, BAD_CREDENTIALS})
MAILBOX_OVER_QUOTA = 552


class Cause(Enum):
    """Why a mail is to be tried again."""

    TEMPORARY = auto()
    SUSPECT = auto()
    LINK = auto()
    SYSTEM = auto()
    STOPPED = auto()

    @property
    def is_attempt(self) -> bool:
        """Whether the mail itself was put to the test."""
        return self not in (Cause.SYSTEM, Cause.STOPPED)


_BEARINGS = {
    Cause.TEMPORARY: Bearing.SERVES,
    Cause.SUSPECT: Bearing.SERVES,
    Cause.LINK: Bearing.BROKEN_LINK,
    Cause.SYSTEM: Bearing.TROUBLE,
    Cause.STOPPED: Bearing.NOTHING,
}


@dataclass(frozen=True, slots=True)
class Sent:
    """The relay has it."""

    reply: str


@dataclass(frozen=True, slots=True)
class Retry:
    """Not now."""

    reason: str
    delay_seconds: float
    cause: Cause = Cause.TEMPORARY


@dataclass(frozen=True, slots=True)
class Unknown:
    """The final dot went out and no answer came; `delay_seconds` None waits for a person."""

    reason: str
    delay_seconds: float | None


@dataclass(frozen=True, slots=True)
class Dead:
    """Never."""

    reason: str


@dataclass(frozen=True, slots=True)
class Held:
    """Not from this environment; it waits for a person."""

    reason: str


Verdict = Sent | Retry | Unknown | Dead | Held


@dataclass(frozen=True, slots=True)
class History:
    """What is known of a mail before this answer, and when the relay last accepted any mail."""

    attempts: int
    unknown_count: int
    give_up_at: datetime
    suspected_at: datetime | None = None
    relay_accepted_at: datetime | None = None


@dataclass(frozen=True, slots=True)
class Judge:
    """The rules; `resends_unknown` is the policy for lost answers."""

    timing: Timing
    resends_unknown: bool

    def judge(self, answer: Answer, history: History, *, now: datetime, jitter: float) -> Verdict:
        """Decide what becomes of a mail; `jitter` is in [0, 1)."""
        if answer.stage is Stage.FINAL_DOT and answer.code is None:
            is_resent = self.resends_unknown and history.unknown_count == 0
            return Unknown(str(answer), self.timing.unknown_delay_seconds if is_resent else None)
        if answer.stage is Stage.FINAL_DOT and answer.code is not None and answer.code < 300:
            return Sent(f"{answer.code} {answer.text}")
        if _is_refused_for_good(answer):
            return Dead(str(answer))
        cause = _cause(answer)
        if cause is Cause.SUSPECT and _is_confirmed(history):
            return Dead(f"refused again by a relay that accepts others; {answer}")
        delay_seconds = self._delay_seconds(cause, history.attempts, jitter)
        if now + timedelta(seconds=delay_seconds) > history.give_up_at:
            return Dead(f"expired; {answer}")
        return Retry(str(answer), delay_seconds, cause)

    def _delay_seconds(self, cause: Cause, attempts: int, jitter: float) -> float:
        match cause:
            case Cause.SUSPECT:
                return SUSPECT_DELAY_SECONDS
            case Cause.SYSTEM:
                # The breaker decides when the relay is tried again, not the mail.
                return self.timing.probe_seconds * jitter
            case Cause.STOPPED:
                return 0.0
        doubled = self.timing.retry_base_seconds * 2.0 ** min(attempts - 1, 30)
        return min(doubled, self.timing.retry_cap_seconds) * jitter


def bearing(answer: Answer) -> Bearing:
    """Say what an answer means for all mails; one lost after the final dot is trouble as well."""
    if answer.stage is Stage.CONNECT and answer.code == CLOSING:
        return Bearing.CROWDED
    if answer.stage is Stage.FINAL_DOT and answer.code is None:
        return Bearing.TROUBLE
    return Bearing.SERVES if _is_refused_for_good(answer) else _BEARINGS[_cause(answer)]


def _is_refused_for_good(answer: Answer) -> bool:
    if answer.code is None or answer.code < 500:
        return False
    if answer.enhanced_code in (TOO_LARGE, NO_SMTPUTF8) and answer.stage is not Stage.CONNECT:
        return True
    if answer.stage is Stage.RCPT:
        return answer.enhanced_code in NO_SUCH_ADDRESS
    # RFC 5321 §4.5.3.1.10: at RCPT a 552 means what a 452 does.
    return answer.code == MAILBOX_OVER_QUOTA and answer.stage is not Stage.CONNECT


def _cause(answer: Answer) -> Cause:
    if answer.stage is Stage.STOPPED:
        return Cause.STOPPED
    if answer.stage in (Stage.CONNECT, Stage.MAIL):
        return Cause.SYSTEM
    if answer.code is None:
        return Cause.LINK
    is_sender_refused = answer.code >= 500 and answer.enhanced_code in SENDER_REFUSED
    if is_sender_refused or answer.code in SYSTEM_CODES:
        return Cause.SYSTEM
    is_full = answer.stage is Stage.RCPT and answer.code == MAILBOX_OVER_QUOTA
    return Cause.TEMPORARY if answer.code < 500 or is_full else Cause.SUSPECT


def _is_confirmed(history: History) -> bool:
    """Say whether the relay refused this mail before, and accepted another in between."""
    return (
        history.suspected_at is not None
        and history.relay_accepted_at is not None
        and history.relay_accepted_at > history.suspected_at
    )
