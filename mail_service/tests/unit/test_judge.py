"""A reply → sent, retry, unknown, dead."""

from datetime import UTC, datetime, timedelta

import pytest

from mail_service.judge import (
    SUSPECT_DELAY_SECONDS,
    Cause,
    Dead,
    History,
    Judge,
    Retry,
    Sent,
    Unknown,
    Verdict,
    bearing,
)
from mail_service.replies import Answer, Bearing, Stage
from mail_service.settings import TIMING

NOW = datetime(2026, 11, 21, 9, tzinfo=UTC)
CONNECT, MAIL, RCPT, DATA, STOPPED, FINAL_DOT = Stage
SERVES, TROUBLE, CROWDED, BROKEN_LINK, NOTHING = Bearing


def verdict_of(
    answer: Answer,
    *,
    attempts: int = 1,
    unknown_count: int = 0,
    give_up_at: datetime = NOW + timedelta(days=1),
    suspected_at: datetime | None = None,
    relay_accepted_at: datetime | None = None,
    jitter: float = 0.5,
    resends_unknown: bool = True,
) -> Verdict:
    """Judge with everything usual but what a test names."""
    return Judge(TIMING, resends_unknown=resends_unknown).judge(
        answer,
        History(attempts, unknown_count, give_up_at, suspected_at, relay_accepted_at),
        now=NOW,
        jitter=jitter,
    )


VERDICTS = [
    # accepted
    (FINAL_DOT, 250, "2.0.0 queued", Sent, SERVES),
    (FINAL_DOT, 250, "", Sent, SERVES),
    (FINAL_DOT, 252, "will try", Sent, SERVES),
    # the answer was lost
    (FINAL_DOT, None, "SMTPServerDisconnected", Unknown, TROUBLE),
    # our own doing
    (STOPPED, None, "before the final dot", Cause.STOPPED, NOTHING),
    # the dialogue broke off over this mail, or over any
    (RCPT, None, "ConnectionResetError", Cause.LINK, BROKEN_LINK),
    (DATA, None, "TimeoutError", Cause.LINK, BROKEN_LINK),
    # not now
    (RCPT, 450, "4.2.0 greylisted", Cause.TEMPORARY, SERVES),
    (RCPT, 451, "4.7.1 later", Cause.TEMPORARY, SERVES),
    (RCPT, 452, "4.2.2 over quota", Cause.TEMPORARY, SERVES),
    (DATA, 451, "", Cause.TEMPORARY, SERVES),
    (DATA, 250, "no 354", Cause.TEMPORARY, SERVES),
    (FINAL_DOT, 451, "4.3.0 no space", Cause.TEMPORARY, SERVES),
    # a 4xx stays temporary whatever its text says
    (RCPT, 450, "5.1.1 no such user", Cause.TEMPORARY, SERVES),
    # RFC 5321 §4.5.3.1.10
    (RCPT, 552, "5.2.2 over quota", Cause.TEMPORARY, SERVES),
    # the relay's own trouble, or ours with it: no mail dies of it
    (CONNECT, None, "ConnectionRefusedError", Cause.SYSTEM, TROUBLE),
    (CONNECT, 421, "4.3.2 not now", Cause.SYSTEM, CROWDED),
    (CONNECT, 554, "5.7.1 no service here", Cause.SYSTEM, TROUBLE),
    (CONNECT, 535, "5.7.8 bad credentials", Cause.SYSTEM, TROUBLE),
    (CONNECT, 530, "5.7.0 authenticate first", Cause.SYSTEM, TROUBLE),
    (CONNECT, 552, "5.3.4 what", Cause.SYSTEM, TROUBLE),
    (MAIL, None, "TimeoutError", Cause.SYSTEM, TROUBLE),
    (MAIL, 421, "4.7.0 too many", Cause.SYSTEM, TROUBLE),
    (MAIL, 451, "4.3.0 local error", Cause.SYSTEM, TROUBLE),
    (MAIL, 550, "5.1.1 what", Cause.SYSTEM, TROUBLE),
    (MAIL, 550, "5.1.8 bad sender", Cause.SYSTEM, TROUBLE),
    (MAIL, 554, "5.7.1 denied", Cause.SYSTEM, TROUBLE),
    (RCPT, 421, "4.3.2 shutting down", Cause.SYSTEM, TROUBLE),
    (RCPT, 530, "5.7.0 authenticate first", Cause.SYSTEM, TROUBLE),
    (RCPT, 550, "5.1.8 bad sender", Cause.SYSTEM, TROUBLE),
    (RCPT, 553, "5.1.7 bad sender syntax", Cause.SYSTEM, TROUBLE),
    (DATA, 535, "", Cause.SYSTEM, TROUBLE),
    (FINAL_DOT, 421, "4.3.2 shutting down", Cause.SYSTEM, TROUBLE),
    (FINAL_DOT, 550, "5.1.8 bad sender", Cause.SYSTEM, TROUBLE),
    # a refusal that may be the mail's or the relay's
    (RCPT, 550, "5.7.1 relaying denied", Cause.SUSPECT, SERVES),
    (RCPT, 550, "", Cause.SUSPECT, SERVES),
    (RCPT, 550, "no such user", Cause.SUSPECT, SERVES),
    (DATA, 554, "5.6.0 content", Cause.SUSPECT, SERVES),
    (FINAL_DOT, 554, "5.7.1 spam", Cause.SUSPECT, SERVES),
    (FINAL_DOT, 550, "5.1.1 what", Cause.SUSPECT, SERVES),
    # a code that only looks like it
    (RCPT, 550, "5.1.100 what", Cause.SUSPECT, SERVES),
    (RCPT, 550, "15.1.1 what", Cause.SUSPECT, SERVES),
    (RCPT, 550, "5.1.11 what", Cause.SUSPECT, SERVES),
    # the address does not exist
    (RCPT, 550, "5.1.1 no such user", Dead, SERVES),
    (RCPT, 550, "5.1.2 no such domain", Dead, SERVES),
    (RCPT, 501, "5.1.3 bad syntax", Dead, SERVES),
    (RCPT, 551, "5.1.6 moved", Dead, SERVES),
    (RCPT, 556, "5.1.10 null MX", Dead, SERVES),
    (RCPT, 550, "<x@example.com>: 5.1.1 no such user", Dead, SERVES),
    # too large
    (MAIL, 552, "size", Dead, SERVES),
    (MAIL, 552, "5.3.4 size", Dead, SERVES),
    (RCPT, 554, "5.3.4 too large", Dead, SERVES),
    (DATA, 552, "too large", Dead, SERVES),
    (DATA, 554, "5.3.4 too large", Dead, SERVES),
    (FINAL_DOT, 552, "5.3.4 too large", Dead, SERVES),
    (FINAL_DOT, 554, "5.3.4 too large", Dead, SERVES),
    # no way to say this address
    (MAIL, 553, "5.6.7 SMTPUTF8 is needed", Dead, SERVES),
    (RCPT, 553, "5.6.7 SMTPUTF8 is needed", Dead, SERVES),
]


@pytest.mark.parametrize(("stage", "code", "text", "expected", "meaning"), VERDICTS)
def test_an_answer_has_one_verdict_and_one_meaning_for_the_relay(
    stage: Stage, code: int | None, text: str, expected: type[Verdict] | Cause, meaning: Bearing
) -> None:
    """Stage, code and enhanced code decide alone, on a first attempt with time left."""
    answer = Answer(stage, code, text)
    verdict = verdict_of(answer)

    assert (verdict.cause if isinstance(verdict, Retry) else type(verdict)) is expected
    assert bearing(answer) is meaning


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
    verdict = verdict_of(Answer(RCPT, 451, "later"), attempts=3, jitter=jitter)

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
    ("suspected_minutes_ago", "accepted_minutes_ago", "is_dead"),
    [(15, 5, True), (15, 16, False), (15, 15, False), (15, None, False), (None, 5, False)],
)
def test_a_suspect_dies_when_the_relay_accepted_another_mail_in_between(
    suspected_minutes_ago: int | None, accepted_minutes_ago: int | None, *, is_dead: bool
) -> None:
    """A relay that refuses everybody says nothing of this mail."""

    def at(minutes_ago: int | None) -> datetime | None:
        return None if minutes_ago is None else NOW - timedelta(minutes=minutes_ago)

    verdict = verdict_of(
        Answer(FINAL_DOT, 554, "5.7.1 spam"),
        suspected_at=at(suspected_minutes_ago),
        relay_accepted_at=at(accepted_minutes_ago),
    )

    assert isinstance(verdict, Dead) is is_dead


def test_a_relay_in_trouble_is_tried_again_with_the_next_probes() -> None:
    """How long it takes is the breaker's to say: the mail waits no longer than a probe does."""
    verdict = verdict_of(Answer(CONNECT, None, "refused"), attempts=9, jitter=0.5)

    assert verdict == Retry("connect: no reply refused", TIMING.probe_seconds / 2, Cause.SYSTEM)


@pytest.mark.parametrize("cause", Cause)
def test_only_what_tested_the_mail_is_an_attempt(cause: Cause) -> None:
    """A relay that is down, and our own stop, cost a mail nothing."""
    assert cause.is_attempt is (cause not in (Cause.SYSTEM, Cause.STOPPED))


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
