"""One statement for each arrow of the outbox, on real rows."""

from collections.abc import Callable, Sequence
from typing import Any
from uuid import UUID

import pytest
from sqlalchemy import Connection
from uuid_utils.compat import uuid7

from order_service import outbox
from order_service.kafka import Coordinates

OURS, EARLIER = "topic-of-now", "topic-of-before"
STATES = ("INIT", "PUBLISHED", "COMPLETED", "FAILED")
POSITION, END = 10, 20

AddEvent = Callable[..., UUID]
RowOf = Callable[[UUID], Any]
Query = Callable[..., Any]


@pytest.fixture
def read_up_to(autocommit: Connection) -> Callable[..., None]:
    """Give a function that notes how far a topic's first partition was read."""

    def note(position: int, *, topic_id: str = OURS) -> None:
        outbox.complete(autocommit, topic_id=topic_id, seen={}, next_offsets={0: position})

    return note


def find_lost(connection: Connection, *, end: int = END) -> Sequence[UUID]:
    """Decide on all published rows as the sweep does; return the events sent back."""
    published = outbox.select_published(connection, after=None, limit=100)
    lost = outbox.republish_lost(
        connection, topic_id=OURS, published=published, end_offsets={0: end}
    )
    return list(lost)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("INIT", "PUBLISHED"),
        ("PUBLISHED", "PUBLISHED"),
        ("COMPLETED", "COMPLETED"),
        ("FAILED", "FAILED"),
    ],
)
def test_a_delivery_report_publishes_only_what_waits(
    autocommit: Connection, add_event: AddEvent, row_of: RowOf, before: str, after: str
) -> None:
    """INIT becomes PUBLISHED; every other state keeps what it has."""
    event_id = add_event(state=before, offset=1)
    outbox.mark_published(autocommit, topic_id=OURS, reports={event_id: Coordinates(0, 7)})
    row = row_of(event_id)
    assert (row.state, row.offset) == (after, 7 if before == "INIT" else 1)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("INIT", "FAILED"),
        ("PUBLISHED", "PUBLISHED"),
        ("COMPLETED", "COMPLETED"),
        ("FAILED", "FAILED"),
    ],
)
def test_a_refusal_fails_only_what_waits(
    autocommit: Connection, add_event: AddEvent, row_of: RowOf, before: str, after: str
) -> None:
    """INIT becomes FAILED; what is in the topic cannot be refused any more."""
    event_id = add_event(state=before)
    outbox.mark_failed(autocommit, event_id, reason="too large")
    assert row_of(event_id).state == after


@pytest.mark.parametrize("before", STATES)
def test_seen_is_seen(
    autocommit: Connection, add_event: AddEvent, row_of: RowOf, before: str
) -> None:
    """Whatever a row's state, an event seen in the topic is COMPLETED."""
    event_id = add_event(state=before)
    outbox.complete(
        autocommit, topic_id=OURS, seen={event_id: Coordinates(0, 7)}, next_offsets={0: 8}
    )
    assert row_of(event_id).state == "COMPLETED"


def test_a_report_without_an_offset_is_kept_without_one(
    autocommit: Connection, add_event: AddEvent, row_of: RowOf
) -> None:
    """A delivery report may name no offset: the read-back will."""
    event_id = add_event()
    outbox.mark_published(autocommit, topic_id=OURS, reports={event_id: Coordinates(0, None)})
    row = row_of(event_id)
    assert (row.state, row.topic_id, row.partition, row.offset) == ("PUBLISHED", OURS, 0, None)


def test_only_what_is_due_is_selected(autocommit: Connection, add_event: AddEvent) -> None:
    """An event sent back waits for its time."""
    waiting = add_event()
    add_event(due_at="2999-01-01T00:00:00Z")
    assert [record.id for record in outbox.select_init(autocommit, after=None, limit=10)] == [
        waiting
    ]


def test_the_oldest_are_selected_first(autocommit: Connection, add_event: AddEvent) -> None:
    """Whatever their order of arrival, events go out by id, as many as asked for."""
    first, second, third = uuid7(), uuid7(), uuid7()
    for event_id in (third, first, second):
        add_event(id=event_id)
    assert [record.id for record in outbox.select_init(autocommit, after=None, limit=2)] == [
        first,
        second,
    ]


@pytest.mark.parametrize(
    ("topic_id", "offset", "after"),
    [
        pytest.param(OURS, POSITION - 1, "INIT", id="read past and not seen"),
        pytest.param(OURS, END, "INIT", id="at the end"),
        pytest.param(OURS, END + 5, "INIT", id="beyond the end"),
        pytest.param(EARLIER, 15, "INIT", id="in another topic"),
        pytest.param(EARLIER, None, "INIT", id="in another topic, no offset"),
        pytest.param(OURS, POSITION, "PUBLISHED", id="next to be read"),
        pytest.param(OURS, END - 1, "PUBLISHED", id="last in the log"),
        pytest.param(OURS, None, "PUBLISHED", id="no offset"),
    ],
)
def test_lost_is_what_is_proven_lost(
    autocommit: Connection,
    add_event: AddEvent,
    row_of: RowOf,
    read_up_to: Callable[..., None],
    topic_id: str,
    offset: int | None,
    after: str,
) -> None:
    """With 10 the next to be read and 20 the end, all between is lag, and lag waits."""
    read_up_to(POSITION)
    event_id = add_event(state="PUBLISHED", topic_id=topic_id, partition=0, offset=offset)
    find_lost(autocommit)
    assert row_of(event_id).state == after


def test_nothing_read_proves_nothing(
    autocommit: Connection, add_event: AddEvent, row_of: RowOf
) -> None:
    """Without a position an event below the end is lag."""
    event_id = add_event(state="PUBLISHED", topic_id=OURS, partition=0, offset=5)
    find_lost(autocommit)
    assert row_of(event_id).state == "PUBLISHED"


def test_the_position_of_another_topic_proves_nothing(
    autocommit: Connection, add_event: AddEvent, row_of: RowOf, read_up_to: Callable[..., None]
) -> None:
    """A position belongs to its topic id."""
    read_up_to(POSITION, topic_id=EARLIER)
    event_id = add_event(state="PUBLISHED", topic_id=OURS, partition=0, offset=5)
    find_lost(autocommit)
    assert row_of(event_id).state == "PUBLISHED"


@pytest.mark.fault("F-O14")
@pytest.mark.parametrize("before", ["INIT", "COMPLETED", "FAILED"])
def test_only_what_is_published_can_be_lost(
    autocommit: Connection, add_event: AddEvent, row_of: RowOf, before: str
) -> None:
    """A row that became something else after it was read is left alone."""
    event_id = add_event(state="PUBLISHED", topic_id=OURS, partition=0, offset=END)
    published = outbox.select_published(autocommit, after=None, limit=10)
    autocommit.exec_driver_sql("UPDATE outbox SET state = %s WHERE id = %s", (before, event_id))
    outbox.republish_lost(autocommit, topic_id=OURS, published=published, end_offsets={0: END})
    row = row_of(event_id)
    assert (row.state, row.republished_count) == (before, 0)


@pytest.mark.fault("F-O14")
@pytest.mark.parametrize(
    "changed",
    ['"offset" = 15', '"offset" = NULL', "partition = 1", f"topic_id = '{EARLIER}'"],
)
def test_an_event_published_anew_in_between_is_left_alone(
    autocommit: Connection, add_event: AddEvent, row_of: RowOf, changed: str
) -> None:
    """The row must still be what was read when the broker was asked."""
    event_id = add_event(state="PUBLISHED", topic_id=OURS, partition=0, offset=END)
    published = outbox.select_published(autocommit, after=None, limit=10)
    autocommit.exec_driver_sql(f"UPDATE outbox SET {changed}")
    outbox.republish_lost(autocommit, topic_id=OURS, published=published, end_offsets={0: END})
    assert row_of(event_id).state == "PUBLISHED"


@pytest.mark.parametrize(("republished", "seconds"), [(0, 5), (1, 10), (2, 20)])
def test_a_lost_event_is_published_again_at_growing_intervals(
    autocommit: Connection, add_event: AddEvent, query: Query, republished: int, seconds: int
) -> None:
    """Three times, after 5, 10 and 20 seconds."""
    add_event(
        state="PUBLISHED",
        topic_id=OURS,
        partition=0,
        offset=END,
        republished_count=republished,
    )
    asked_at = query("SELECT clock_timestamp() AS now")[0].now
    find_lost(autocommit)
    row = query("SELECT state, republished_count, due_at FROM outbox")[0]
    assert (
        row.state,
        row.republished_count,
        seconds <= (row.due_at - asked_at).total_seconds() < 2 * seconds,
    ) == ("INIT", republished + 1, True)


def test_an_event_lost_a_fourth_time_has_failed(
    autocommit: Connection, add_event: AddEvent, row_of: RowOf
) -> None:
    """What does not stay in the topic is for an operator to look at."""
    event_id = add_event(
        state="PUBLISHED", topic_id=OURS, partition=0, offset=END, republished_count=3
    )
    find_lost(autocommit)
    row = row_of(event_id)
    assert (row.state, row.reason) == ("FAILED", "lost")


def test_the_lost_are_named(autocommit: Connection, add_event: AddEvent) -> None:
    """The sweep tells which events it sent back, and no others."""
    lost = add_event(state="PUBLISHED", topic_id=OURS, partition=0, offset=END)
    add_event(state="PUBLISHED", topic_id=OURS, partition=0, offset=END - 1)
    assert find_lost(autocommit) == [lost]


def test_a_recreated_topic_gets_its_events_again(
    autocommit: Connection, add_event: AddEvent, row_of: RowOf, read_up_to: Callable[..., None]
) -> None:
    """What was COMPLETED in a topic that is no more goes back to INIT; the rest stays."""
    read_up_to(POSITION, topic_id=EARLIER)
    old = add_event(state="COMPLETED", topic_id=EARLIER, partition=0, offset=5)
    new = add_event(state="COMPLETED", topic_id=OURS, partition=0, offset=5)
    outbox.republish_into_new_topic(autocommit, topic_id=OURS, after=None, limit=10)
    assert (row_of(old).state, row_of(new).state) == ("INIT", "COMPLETED")


def test_a_recreated_topic_gets_its_events_at_a_bounded_rate(
    autocommit: Connection, add_event: AddEvent, read_up_to: Callable[..., None]
) -> None:
    """Each sweep sends back at most its limit, until none is left."""
    read_up_to(POSITION, topic_id=EARLIER)
    for _ in range(5):
        add_event(state="COMPLETED", topic_id=EARLIER, partition=0, offset=5)
    moved: list[list[UUID]] = []
    for _ in range(4):
        last = moved[-1][-1] if moved else None
        moved.append(
            outbox.republish_into_new_topic(autocommit, topic_id=OURS, after=last, limit=2)
        )
    assert [len(batch) for batch in moved] == [2, 2, 1, 0]


def test_a_topic_that_is_the_same_gets_nothing_again(
    autocommit: Connection, add_event: AddEvent, row_of: RowOf, read_up_to: Callable[..., None]
) -> None:
    """Time alone republishes nothing."""
    read_up_to(POSITION)
    event_id = add_event(state="COMPLETED", topic_id=OURS, partition=0, offset=5)
    outbox.republish_into_new_topic(autocommit, topic_id=OURS, after=None, limit=10)
    assert row_of(event_id).state == "COMPLETED"


def test_positions_are_kept_by_topic(
    autocommit: Connection, read_up_to: Callable[..., None]
) -> None:
    """A topic made anew is read from its start."""
    read_up_to(POSITION, topic_id=EARLIER)
    assert outbox.positions(autocommit, topic_id=OURS) == {}
