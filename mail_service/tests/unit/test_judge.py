"""A reply → sent, retry, unknown, dead."""

from datetime import UTC, datetime, timedelta

import pytest

from mail_service.judge import (
    SUSPECT_DELAY_SECONDS,
    Dead,
    Judge,
    Retry,
    Sent,
    Unknown,
    Verdict,
)
from mail_service.replies import Answer, Stage
from mail_service.settings import TIMING

NOW = datetime(2026, 11, 21, 9, tzinfo=UTC)
CONNECT, MAIL, RCPT, DATA, FINAL_DOT = Stage


def verdict_of(
    answer: Answer,
    *,
    attempts: int = 1,
    unknown_count: int = 0,
    give_up_at: datetime = NOW + timedelta(days=1),
    jitter: float = 0.5,
    resends_unknown: bool = True,
) -> Verdict:
    """Judge with everything usual but what a test names."""
    return Judge(TIMING, resends_unknown=resends_unknown).judge(
        answer,
        attempts=attempts,
        unknown_count=unknown_count,
        give_up_at=give_up_at,
        now=NOW,
        jitter=jitter,
    )


VERDICTS = [
    # accepted
    (FINAL_DOT, 250, "2.0.0 queued", Sent),
    (FINAL_DOT, 250, "", Sent),
    (FINAL_DOT, 252, "will try", Sent),
    # the answer was lost
    (FINAL_DOT, None, "SMTPServerDisconnected", Unknown),
    # nothing was finished
    (CONNECT, None, "ConnectionRefusedError", Retry),
    (MAIL, None, "TimeoutError", Retry),
    (RCPT, None, "ConnectionResetError", Retry),
    (DATA, None, "the lease had ended", Retry),
    # not now
    (CONNECT, 421, "4.3.2 not now", Retry),
    (MAIL, 421, "4.7.0 too many", Retry),
    (MAIL, 451, "4.3.0 local error", Retry),
    (RCPT, 450, "4.2.0 greylisted", Retry),
    (RCPT, 451, "4.7.1 later", Retry),
    (RCPT, 452, "4.2.2 over quota", Retry),
    (DATA, 451, "", Retry),
    (DATA, 250, "no 354", Retry),
    (FINAL_DOT, 421, "4.3.2 shutting down", Retry),
    (FINAL_DOT, 451, "4.3.0 no space", Retry),
    # a 4xx stays temporary whatever its text says
    (RCPT, 450, "5.1.1 no such user", Retry),
    # the relay's own trouble, or ours with it: no mail dies of it
    (CONNECT, 554, "5.7.1 no service here", Retry),
    (CONNECT, 535, "5.7.8 bad credentials", Retry),
    (CONNECT, 530, "5.7.0 authenticate first", Retry),
    (MAIL, 550, "5.1.1 what", Retry),
    (MAIL, 550, "5.1.8 bad sender", Retry),
    (MAIL, 554, "5.7.1 denied", Retry),
    (RCPT, 550, "5.7.1 relaying denied", Retry),
    (RCPT, 552, "5.2.2 over quota", Retry),
    (RCPT, 550, "", Retry),
    (RCPT, 550, "5.1.8 bad sender", Retry),
    (RCPT, 550, "no such user", Retry),
    (DATA, 554, "5.6.0 content", Retry),
    (FINAL_DOT, 554, "5.7.1 spam", Retry),
    (FINAL_DOT, 550, "5.1.1 what", Retry),
    # the address does not exist
    (RCPT, 550, "5.1.1 no such user", Dead),
    (RCPT, 550, "5.1.2 no such domain", Dead),
    (RCPT, 501, "5.1.3 bad syntax", Dead),
    (RCPT, 551, "5.1.6 moved", Dead),
    (RCPT, 556, "5.1.10 null MX", Dead),
    (RCPT, 550, "<x@example.com>: 5.1.1 no such user", Dead),
    # a code that only looks like it
    (RCPT, 550, "5.1.100 what", Retry),
    (RCPT, 550, "15.1.1 what", Retry),
    (RCPT, 550, "5.1.11 what", Retry),
    # too large
    (DATA, 552, "too large", Dead),
    (DATA, 554, "5.3.4 too large", Dead),
    (FINAL_DOT, 552, "5.3.4 too large", Dead),
    (FINAL_DOT, 554, "5.3.4 too large", Dead),
]


@pytest.mark.parametrize(("stage", "code", "text", "kind"), VERDICTS)
def test_an_answer_has_one_verdict(
    stage: Stage, code: int | None, text: str, kind: type[Verdict]
) -> None:
    """Stage, code and enhanced code decide alone, on a first attempt with time left."""
    assert type(verdict_of(Answer(stage, code, text))) is kind


@pytest.mark.parametrize(
    ("attempts", "seconds"), [(1, 60), (2, 120), (3, 240), (6, 1920), (7, 3600), (500, 3600)]
)
def test_the_wait_doubles_up_to_an_hour(attempts: int, seconds: float) -> None:
    """However many attempts there were, the next is at most an hour away."""
    verdict = verdict_of(Answer(RCPT, 451, "later"), attempts=attempts, jitter=0.5)

    assert verdict == Retry("RCPT: 451 later", seconds * 0.5)


@pytest.mark.parametrize("jitter", [0.0, 0.25, 0.999])
def test_the_wait_is_spread_over_its_whole_length(jitter: float) -> None:
    """Mails that failed together do not come back together."""
    verdict = verdict_of(Answer(CONNECT, None, "refused"), attempts=3, jitter=jitter)

    assert isinstance(verdict, Retry)
    assert verdict.delay_seconds == pytest.approx(240 * jitter)


@pytest.mark.parametrize("stage", [RCPT, DATA, FINAL_DOT])
@pytest.mark.parametrize("attempts", [1, 9])
def test_a_suspect_refusal_is_tried_again_after_a_quarter_of_an_hour(
    stage: Stage, attempts: int
) -> None:
    """A 5xx that does not name the address may be the relay's fault, and that takes a while."""
    verdict = verdict_of(Answer(stage, 554, "5.7.1 no"), attempts=attempts, jitter=0.1)

    assert isinstance(verdict, Retry)
    assert verdict.delay_seconds == SUSPECT_DELAY_SECONDS == 900


@pytest.mark.parametrize(
    ("seconds_left", "verdict"),
    [
        (29, Dead("expired; RCPT: 451 later")),
        (30, Retry("RCPT: 451 later", 30)),
        (31, Retry("RCPT: 451 later", 30)),
        (-1, Dead("expired; RCPT: 451 later")),
    ],
)
def test_no_attempt_is_planned_after_the_time_to_give_up(
    seconds_left: int, verdict: Verdict
) -> None:
    """A mail that would come too late is given up on now, with the reply that made it late."""
    give_up_at = NOW + timedelta(seconds=seconds_left)

    assert verdict_of(Answer(RCPT, 451, "later"), give_up_at=give_up_at) == verdict


@pytest.mark.parametrize(
    ("unknown_count", "resends_unknown", "delay_seconds"),
    [(0, True, 60), (1, True, None), (2, True, None), (0, False, None), (1, False, None)],
)
def test_a_lost_answer_is_resent_once_and_then_held(
    unknown_count: int, *, resends_unknown: bool, delay_seconds: float | None
) -> None:
    """A third copy needs a person; under the policy `hold` a second one does."""
    verdict = verdict_of(
        Answer(FINAL_DOT, None, "no answer"),
        unknown_count=unknown_count,
        resends_unknown=resends_unknown,
    )

    assert verdict == Unknown("final dot: no reply no answer", delay_seconds)


def test_a_lost_answer_is_never_called_dead() -> None:
    """The relay may have the mail: time running out does not make that untrue."""
    past = NOW - timedelta(hours=1)

    assert isinstance(verdict_of(Answer(FINAL_DOT, None, ""), give_up_at=past), Unknown)


def test_an_accepted_mail_is_sent_however_late() -> None:
    """A 250 is a fact."""
    past = NOW - timedelta(hours=1)

    assert verdict_of(Answer(FINAL_DOT, 250, "ok"), give_up_at=past) == Sent("250 ok")


def test_the_reason_holds_stage_code_and_text() -> None:
    """An operator reads what the relay said and when."""
    verdict = verdict_of(Answer(RCPT, 550, "5.1.1 no such user"))

    assert verdict == Dead("RCPT: 550 5.1.1 no such user")
