"""Where the next select of the outbox begins."""

from uuid import UUID

import pytest

from order_service.kafka import Coordinates, Delivery
from order_service.relay import (
    BATCH_ROWS,
    OVERLAP_MS,
    START_SECONDS,
    START_SECONDS_BEHIND,
    Frontier,
)

BEGAN_MS = 1_700_000_000_000


def event_id(milliseconds: int) -> UUID:
    """Return an id made so long after the beginning."""
    return UUID(int=(BEGAN_MS + milliseconds) << 80 | 7)


def delivered(*ids: UUID, postponed: bool = False) -> Delivery:
    """Return what became of a batch of these events."""
    if postponed:
        return Delivery({}, {}, dict.fromkeys(ids, "no broker"))
    return Delivery(dict.fromkeys(ids, Coordinates(0, 0)), {}, {})


def full() -> list[UUID]:
    """Return the ids of a batch that may not have been the last."""
    return [event_id(number) for number in range(BATCH_ROWS)]


@pytest.fixture
def frontier() -> Frontier:
    """Return the frontier of a relay that has just become active."""
    frontier = Frontier()
    assert frontier.after(0) is None
    return frontier


def test_a_row_that_commits_late_with_a_lower_id_is_still_selected(frontier: Frontier) -> None:
    """The next select begins a while before the last one's end."""
    frontier.note(delivered(event_id(60_000)))
    after = frontier.after(0.5)
    assert after is not None
    assert after == event_id(60_000 - OVERLAP_MS)


def test_in_a_backlog_the_next_select_begins_where_the_last_one_ended(frontier: Frontier) -> None:
    """What was just published need not be passed again."""
    frontier.note(delivered(*full()))
    assert frontier.after(0.5) == full()[-1]


@pytest.mark.parametrize(
    ("ids", "seconds"), [([event_id(0)], START_SECONDS), (full(), START_SECONDS_BEHIND)]
)
def test_now_and_then_a_select_begins_at_the_start(
    frontier: Frontier, ids: list[UUID], seconds: float
) -> None:
    """However low an id is, its row is found."""
    frontier.note(delivered(*ids))
    assert frontier.after(seconds) is not None
    assert frontier.after(seconds + 0.01) is None
    assert frontier.after(seconds + 0.02) is not None


def test_what_was_postponed_is_selected_again(frontier: Frontier) -> None:
    """A broker that is away moves no frontier."""
    frontier.note(delivered(*full()))
    frontier.note(delivered(event_id(9_000), postponed=True))
    assert frontier.after(0.5) is None


def test_an_idle_relay_stays_where_it_was(frontier: Frontier) -> None:
    """A select that finds nothing moves nothing."""
    frontier.note(delivered(event_id(60_000)))
    frontier.note(delivered())
    assert frontier.after(0.5) == event_id(60_000 - OVERLAP_MS)
