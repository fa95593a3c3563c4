"""When the next mail may go, by a clock of the test's own."""

import pytest

from mail_service.pace import GROWTH_SECONDS, MOST_BROKEN_LINKS, Pace
from mail_service.replies import Bearing

SERVES, TROUBLE, CROWDED, BROKEN_LINK, NOTHING = Bearing
SLOTS, PROBE_SECONDS = 8, 10.0


@pytest.fixture
def pace() -> Pace:
    """Return the pace of a replica that has just begun."""
    return Pace(most=SLOTS, probe_seconds=PROBE_SECONDS)


def test_a_relay_that_serves_gets_all_slots(pace: Pace) -> None:
    """Nothing is held back from a relay nobody has anything against."""
    assert [pace.allowance(under_way=count, now=0) for count in (0, 3, 8)] == [8, 5, 0]


@pytest.mark.parametrize(
    ("bearings", "is_open"),
    [
        ([TROUBLE], True),
        ([SERVES, TROUBLE], True),
        ([BROKEN_LINK] * (MOST_BROKEN_LINKS - 1), False),
        ([BROKEN_LINK] * MOST_BROKEN_LINKS, True),
        ([BROKEN_LINK, SERVES] * MOST_BROKEN_LINKS, False),
        ([BROKEN_LINK, NOTHING] * MOST_BROKEN_LINKS, True),
        ([NOTHING] * 100, False),
        ([SERVES] * 100, False),
        ([TROUBLE, SERVES], False),
        ([TROUBLE, NOTHING], True),
        ([TROUBLE, BROKEN_LINK], True),
        ([CROWDED], True),
        ([SERVES, CROWDED], True),
    ],
)
def test_trouble_opens_the_breaker_and_an_answer_closes_it(
    pace: Pace, bearings: list[Bearing], *, is_open: bool
) -> None:
    """One broken link may be a mail's fault; some in a row are not."""
    for bearing in bearings:
        pace.note(bearing, under_way=1, now=0)
    assert pace.is_open is is_open


def test_an_open_breaker_lets_one_probe_through_at_its_time(pace: Pace) -> None:
    """Whatever was under way, a relay in trouble sees one mail in ten seconds."""
    pace.note(TROUBLE, under_way=1, now=100)
    assert pace.allowance(under_way=0, now=100 + PROBE_SECONDS - 0.001) == 0
    assert pace.allowance(under_way=5, now=100 + PROBE_SECONDS) == 1
    pace.began(0, now=100 + PROBE_SECONDS)
    assert pace.allowance(under_way=5, now=100 + PROBE_SECONDS) == 1
    pace.began(1, now=100 + PROBE_SECONDS)
    assert pace.allowance(under_way=6, now=100 + PROBE_SECONDS) == 0
    assert pace.allowance(under_way=6, now=100 + 2 * PROBE_SECONDS) == 1


def test_a_probe_that_fails_is_not_followed_at_once(pace: Pace) -> None:
    """The next one waits from the failure on, not from the probe's start."""
    pace.note(TROUBLE, under_way=1, now=0)
    pace.began(1, now=PROBE_SECONDS)
    pace.note(TROUBLE, under_way=1, now=PROBE_SECONDS + 7)
    assert pace.allowance(under_way=0, now=2 * PROBE_SECONDS + 6) == 0
    assert pace.allowance(under_way=0, now=2 * PROBE_SECONDS + 7) == 1


def test_after_a_probe_the_slots_come_back_in_doubles(pace: Pace) -> None:
    """A relay that is just back is not met by everything that waited."""
    pace.note(TROUBLE, under_way=1, now=0)
    pace.note(SERVES, under_way=1, now=10)
    pace.note(SERVES, under_way=1, now=12)
    assert [
        pace.allowance(under_way=0, now=10 + second) for second in (0, 0.9, 1, 2, 3, 4, 99)
    ] == [
        1,
        1,
        2,
        4,
        8,
        8,
        8,
    ]


def test_a_mail_that_hangs_does_not_hold_up_the_ramp(pace: Pace) -> None:
    """What was begun before the trouble and still waits is load, but others follow."""
    pace.note(TROUBLE, under_way=1, now=0)
    pace.note(SERVES, under_way=1, now=10)
    assert [pace.allowance(under_way=1, now=10 + second) for second in (0, 1, 2)] == [0, 1, 3]


def test_trouble_in_the_ramp_begins_it_anew(pace: Pace) -> None:
    """A relay that cannot yet carry all is given time again."""
    pace.note(TROUBLE, under_way=1, now=0)
    pace.note(SERVES, under_way=1, now=10)
    pace.note(TROUBLE, under_way=1, now=12)
    pace.note(SERVES, under_way=1, now=30)
    assert pace.allowance(under_way=0, now=30) == 1


def test_a_relay_that_turns_some_away_gets_fewer_at_once(pace: Pace) -> None:
    """As many as it serves; then one more now and then, until it turns that one away."""
    pace.note(SERVES, under_way=8, now=0)
    for _ in range(5):
        pace.note(CROWDED, under_way=8, now=1)
    assert not pace.is_open
    later = (1, 1 + GROWTH_SECONDS, 1 + 2 * GROWTH_SECONDS, 10_000)
    assert [pace.allowance(under_way=0, now=now) for now in later] == [3, 4, 5, 8]
    pace.note(SERVES, under_way=4, now=1 + GROWTH_SECONDS)
    pace.note(CROWDED, under_way=4, now=1 + GROWTH_SECONDS)
    assert pace.allowance(under_way=0, now=1 + GROWTH_SECONDS) == 3


@pytest.mark.parametrize(("under_way", "served_at"), [(1, 0), (8, -PROBE_SECONDS)])
def test_a_relay_that_turns_the_last_one_away_is_left_alone(
    pace: Pace, under_way: int, served_at: float
) -> None:
    """Who serves nobody, or has served nobody for long, is not merely crowded."""
    pace.note(SERVES, under_way=8, now=served_at)
    pace.note(CROWDED, under_way=under_way, now=0)
    assert pace.is_open


@pytest.mark.parametrize(
    ("bearings", "recalls"),
    [
        ([SERVES] * 10, 0),
        ([TROUBLE], 1),
        ([TROUBLE, SERVES], 1),
        ([BROKEN_LINK] * MOST_BROKEN_LINKS, 1),
        ([SERVES, CROWDED], 1),
    ],
)
def test_what_is_not_begun_is_recalled_in_trouble(
    pace: Pace, bearings: list[Bearing], recalls: int
) -> None:
    """A relay in trouble, or with too many connections, does not meet what was claimed."""
    for bearing in bearings:
        pace.note(bearing, under_way=SLOTS, now=0)
    assert pace.recalls == recalls
