"""A reply → sent, retry, unknown, dead: where a mail is given up on; pure."""

from dataclasses import dataclass
from datetime import datetime, timedelta

from mail_service.replies import Answer, Stage
from mail_service.settings import Timing

SUSPECT_DELAY_SECONDS = 15 * 60
# RFC 3463: the mailbox or its address does not exist, whoever asks.
NO_SUCH_ADDRESS = frozenset({"5.1.1", "5.1.2", "5.1.3", "5.1.6", "5.1.10"})
TOO_LARGE = "5.3.4"
MAILBOX_OVER_QUOTA = 552


@dataclass(frozen=True, slots=True)
class Sent:
    """The relay has it."""

    reply: str


@dataclass(frozen=True, slots=True)
class Retry:
    """Not now."""

    reason: str
    delay_seconds: float


@dataclass(frozen=True, slots=True)
class Unknown:
    """The final dot went out and no answer came; `delay_seconds` None waits for a person."""

    reason: str
    delay_seconds: float | None


@dataclass(frozen=True, slots=True)
class Dead:
    """Never."""

    reason: str


Verdict = Sent | Retry | Unknown | Dead


@dataclass(frozen=True, slots=True)
class Judge:
    """The rules; `resends_unknown` is the policy for lost answers."""

    timing: Timing
    resends_unknown: bool

    def judge(
        self,
        answer: Answer,
        *,
        attempts: int,
        unknown_count: int,
        give_up_at: datetime,
        now: datetime,
        jitter: float,
    ) -> Verdict:
        """Decide what becomes of a mail; `jitter` is in [0, 1)."""
        if answer.stage is Stage.FINAL_DOT and answer.code is None:
            is_resent = self.resends_unknown and unknown_count == 0
            return Unknown(str(answer), self.timing.unknown_delay_seconds if is_resent else None)
        if answer.stage is Stage.FINAL_DOT and answer.code is not None and answer.code < 300:
            return Sent(f"{answer.code} {answer.text}")
        if _is_refused_for_good(answer):
            return Dead(str(answer))
        delay_seconds = self._delay_seconds(answer, attempts=attempts, jitter=jitter)
        if now + timedelta(seconds=delay_seconds) > give_up_at:
            return Dead(f"expired; {answer}")
        return Retry(str(answer), delay_seconds)

    def _delay_seconds(self, answer: Answer, *, attempts: int, jitter: float) -> float:
        if _is_suspect(answer):
            return SUSPECT_DELAY_SECONDS
        doubled = self.timing.retry_base_seconds * 2.0 ** min(attempts - 1, 30)
        return min(doubled, self.timing.retry_cap_seconds) * jitter


def _is_suspect(answer: Answer) -> bool:
    """Say whether a refusal sounds final and may be a fault of the relay's."""
    if answer.code is None or answer.code < 500:
        return False
    if answer.stage is Stage.RCPT:
        # RFC 5321 §4.5.3.1.10: at RCPT a 552 means what a 452 does.
        return answer.code != MAILBOX_OVER_QUOTA
    return answer.stage in (Stage.DATA, Stage.FINAL_DOT)


def _is_refused_for_good(answer: Answer) -> bool:
    if answer.code is None or answer.code < 500:
        return False
    if answer.stage is Stage.RCPT:
        return answer.enhanced_code in NO_SUCH_ADDRESS
    if answer.stage in (Stage.DATA, Stage.FINAL_DOT):
        return answer.code == MAILBOX_OVER_QUOTA or answer.enhanced_code == TOO_LARGE
    return False
