"""Several relays at once: one publishes, the others inherit (faults.toml, F-O*)."""

import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from tests.support import backlog
from tests.support.network import Link, link_fault
from tests.support.order_side import FORWARD, OrderSide, order_ids
from tests.support.service import Service

ORDERS = 50
STANDBY_SECONDS = 1.0
TAKEOVER_SECONDS = 5.0
# The server asks after a silent client: 5 s idle, then 3 times 2 s.
VANISHED_SECONDS = 20.0

BATCH_ROWS = 500
BURSTS = 20
BURST_ROWS = 1_000
BURST_SECONDS = 0.5
BURSTS_BY_KILL = 4
LEAST_KILLS = 5
# A batch of 500 is on its way for some tens of milliseconds.
LATEST_KILL_SECONDS = 0.1
ALL_SECONDS = 60.0
TOO_LARGE = 2_000_000
SEED = 20_261_121

Moves = Callable[[], Counter[tuple[str, str]]]


@pytest.fixture
def moves(side: OrderSide) -> Iterator[Moves]:
    """Give the ways that states went."""
    with side.moves() as counted:
        yield counted


@pytest.mark.fault("F-O1", "F-O2", "F-O3", "F-O10")
def test_the_active_relay_dies_every_two_seconds(side: OrderSide, moves: Moves) -> None:
    """20,000 events, one of them too large, one committed late: none is lost or stuck.

    Twice in the topic is only what waited in the batch of a relay at the moment of its death.
    """
    dice = random.Random(SEED)
    placed: list[str] = []
    in_flight: list[set[str]] = []
    kills = Counter[str]()
    with three_relays(side) as relays, side.session() as slow:
        wait_for_active(side, relays)
        late = backlog.insert(slow, 1)
        (too_large,) = side.add_orders(1, padding_bytes=TOO_LARGE)
        due_at = time.monotonic()
        for burst in range(1, BURSTS + 1):
            due_at += BURST_SECONDS
            time.sleep(max(0.0, due_at - time.monotonic()))
            is_fatal = burst % BURSTS_BY_KILL == 0
            active = wait_for_active(side, relays) if is_fatal else None
            placed += side.add_orders(BURST_ROWS)
            side.sql("NOTIFY order_outbox")
            if active:
                time.sleep(dice.uniform(0, LATEST_KILL_SECONDS))
                in_flight.append(kill_and_start_again(side, relays[active]))
                kills[active] += 1
            if burst == BURSTS // 2:
                slow.commit()
        side.wait_for(
            lambda: side.states() == {"COMPLETED": len(placed + late), "FAILED": 1},
            seconds=ALL_SECONDS,
        )
    assert kills.total() >= LEAST_KILLS
    assert any(in_flight)
    assert set(moves()) <= {("INIT", "FAILED"), *FORWARD}
    assert side.sql("SELECT aggregateid FROM outbox WHERE state = 'FAILED'") == [(too_large,)]
    records = side.records()
    copies = order_ids(records)
    assert set(copies) == {*placed, *late}
    assert len({(record.order_id, record.event_id) for record in records}) == len(copies)
    deaths = Counter(order_id for batch in in_flight for order_id in batch)
    unexplained = {each: count for each, count in copies.items() if count > 1 + deaths[each]}
    assert unexplained == {}
    assert len(records) - len(copies) <= kills.total() * BATCH_ROWS
    note("kills", kills.total())
    note("rows in flight at the kills", sum(map(len, in_flight)))
    note("second events", len(records) - len(copies))


@pytest.mark.fault("F-O10", "F-O1")
def test_of_three_relays_one_publishes_and_two_inherit(side: OrderSide, moves: Moves) -> None:
    """One holds the lock; it is killed, and within 5 s another does: each event is there once."""
    with three_relays(side) as relays:
        first = wait_for_active(side, relays)
        placed = side.add_orders(ORDERS)
        side.wait_until_completed()
        actives = {name: relay.metric("order_relay_is_active") for name, relay in relays.items()}
        assert actives == {name: float(name == first) for name in relays}
        killed_at = time.monotonic()
        relays.pop(first).kill()
        side.wait_for(lambda: side.active_relay() in relays, seconds=TAKEOVER_SECONDS)
        note("take-over after SIGKILL", time.monotonic() - killed_at)
        placed += side.add_orders(ORDERS)
        side.wait_until_completed()
        end_at_once(*relays.values())
    assert set(moves()) <= FORWARD
    assert order_ids(side.records()) == dict.fromkeys(placed, 1)


@pytest.mark.fault("F-O11", "F-O10")
def test_a_stopped_relay_keeps_the_lock(side: OrderSide, moves: Moves) -> None:
    """While it stands still nobody takes over; it goes on where it was, or dies and is followed."""
    placed: list[str] = []
    with two_relays(side, "stopped") as (stopped, other):
        for number, heir in ((signal.SIGCONT, "stopped"), (signal.SIGKILL, "other")):
            with standing_still(stopped):
                placed += side.add_orders(ORDERS)
                assert active_ones(side, seconds=2.5 * STANDBY_SECONDS) == {"stopped"}
                assert side.states()["INIT"] == ORDERS
                os.kill(stopped.pid, number)
                side.wait_until_completed()
            assert side.active_relay() == heir
            assert len(other.logged("relay.activated")) == (heir == "other")
        end_at_once(other)
    assert set(moves()) <= FORWARD
    assert order_ids(side.records()) == dict.fromkeys(placed, 1)


@pytest.mark.fault("F-O11")
def test_a_relay_that_wakes_up_without_its_lock(side: OrderSide, moves: Moves) -> None:
    """Stopped with a batch in flight it loses its session; its late mark writes nothing over."""
    placed = side.add_orders(ORDERS)
    # Its read-back holds no rows then: see test_a_row_that_somebody_holds_is_there_twice_at_most.
    held = ("relay.after_ack=stop@1", "rb.after_poll=sleep:3000@1")
    with two_relays(side, "stopped", *held) as (stopped, other):
        side.wait_for(lambda: "relay.after_ack" in {hit.name for hit in stopped.hits})
        with standing_still(stopped):
            lose_lock(side, "stopped")
            side.wait_for(lambda: side.active_relay() == "other", seconds=TAKEOVER_SECONDS)
            side.wait_until_completed()
        # It runs on.
        before = rows(side, placed)
        side.wait_for(lambda: stopped.logged("relay.disconnected"))
        side.wait_for(lambda: stopped.metric("order_relay_is_active") == 0)
        later = side.add_orders(ORDERS)
        side.wait_until_completed()
        assert side.active_relay() == "other"
        assert len(stopped.logged("relay.activated")) == 1
        assert rows(side, placed) == before
        end_at_once(stopped, other)
    assert set(moves()) <= FORWARD
    assert twice(side, of=placed + later) <= set(placed)


@pytest.mark.fault("F-O10")
def test_a_relay_whose_host_vanished(side: OrderSide, moves: Moves) -> None:
    """Every packet between it and the database is dropped: the server ends its session by itself.

    Until then nobody publishes; back in the network it stands by.
    """
    fault = link_fault()
    if fault and os.environ.get("REQUIRE_DOCKER") == "1":
        pytest.fail(f"REQUIRE_DOCKER is set, and {fault}")
    if fault:
        pytest.skip(f"no link can be cut: {fault}")
    port = side.database.target or 0
    link = Link(port, port=side.ports.choose(0))
    url = side.addresses.order_database_url.replace(f":{port}/", f":{link.port}/")
    with link, two_relays(side, "vanished", DATABASE_URL=url) as (vanished, other):
        placed = side.add_orders(ORDERS)
        side.wait_until_completed()
        assert side.active_relay() == "vanished"
        cut_at = time.monotonic()
        link.cut()
        placed += side.add_orders(ORDERS)
        meanwhile: list[Counter[str]] = []

        def has_ended() -> bool:
            # Read before who is active: while that is still the vanished one, nobody publishes.
            states = side.states()
            if side.active_relay() != "vanished":
                return True
            meanwhile.append(states)
            return False

        side.wait_for(has_ended, seconds=VANISHED_SECONDS)
        note("session ended after cut", time.monotonic() - cut_at)
        assert meanwhile
        assert all(each == {"COMPLETED": ORDERS, "INIT": ORDERS} for each in meanwhile)
        side.wait_for(lambda: side.active_relay() == "other", seconds=TAKEOVER_SECONDS)
        note("take-over after cut", time.monotonic() - cut_at)
        side.wait_until_completed()
        assert link.dropped() > 0
        side.wait_for(lambda: vanished.metric("order_relay_is_active") == 0)
        side.wait_for(lambda: vanished.logged("relay.disconnected"))
        link.mend()
        side.wait_for(vanished.is_ready)
        placed += side.add_orders(1)
        side.wait_until_completed()
        assert other.metric("order_relay_is_active") == 1
        assert len(vanished.logged("relay.activated")) == 1
        end_at_once(vanished, other)
    assert set(moves()) <= FORWARD
    assert order_ids(side.records()) == dict.fromkeys(placed, 1)


def wait_for_active(side: OrderSide, relays: dict[str, Service]) -> str:
    """Wait until one of these relays holds the lock; return its name."""
    deadline = time.monotonic() + ALL_SECONDS
    while (name := side.active_relay()) not in relays:
        assert time.monotonic() < deadline, f"active is {name}"
        time.sleep(0.02)
    return str(name)


def active_ones(side: OrderSide, *, seconds: float) -> set[str | None]:
    """Return who held the lock during this time."""
    deadline = time.monotonic() + seconds
    found: set[str | None] = set()
    while time.monotonic() < deadline:
        found.add(side.active_relay())
        time.sleep(0.05)
    return found


def lose_lock(side: OrderSide, name: str) -> None:
    """End the session with which this relay holds the lock."""
    ended = side.sql(
        "SELECT pg_terminate_backend(pid) FROM pg_locks JOIN pg_stat_activity USING (pid)"
        " WHERE locktype = 'advisory' AND objsubid = 2 AND granted AND application_name = %s",
        name,
    )
    assert ended == [(True,)]


def end_at_once(*relays: Service) -> None:
    """Kill what a test needs no more: a graceful end takes a second or two."""
    for relay in relays:
        relay.kill()


@contextmanager
def three_relays(side: OrderSide) -> Iterator[dict[str, Service]]:
    """Run three, started together."""
    with (
        side.running("relay", is_waited_for=False, PGAPPNAME="one") as one,
        side.running("relay", is_waited_for=False, PGAPPNAME="two") as two,
        side.running("relay", is_waited_for=False, PGAPPNAME="three") as three,
    ):
        relays = {"one": one, "two": two, "three": three}
        for relay in relays.values():
            side.wait_for(relay.is_ready)
        yield relays


@contextmanager
def two_relays(
    side: OrderSide, name: str, *failpoints: str, **environment: str
) -> Iterator[tuple[Service, Service]]:
    """Run one of this name, with what it is to suffer; when it is active, another."""
    with side.running(
        "relay", *failpoints, is_waited_for=False, PGAPPNAME=name, **environment
    ) as first:
        wait_for_active(side, {name: first})
        with side.running("relay", PGAPPNAME="other") as other:
            assert side.active_relay() == name
            yield first, other


@contextmanager
def standing_still(service: Service) -> Iterator[None]:
    """Stop a process; leave none that could not end."""
    os.kill(service.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        if service.part.is_running:
            os.kill(service.pid, signal.SIGCONT)


def kill_and_start_again(side: OrderSide, relay: Service) -> set[str]:
    """End a relay as a crash would; return whose events may have been in its hands."""
    with side.session() as session:
        session.autocommit = True

        def oldest() -> set[str]:
            # What a relay has at a time: it selects no more before these are marked.
            with session.cursor() as cursor:
                cursor.execute(
                    "SELECT aggregateid FROM outbox WHERE state = 'INIT' ORDER BY id LIMIT %s",
                    [BATCH_ROWS],
                )
                return {order_id for (order_id,) in cursor.fetchall()}

        pid = relay.pid
        # Stopped it keeps the lock: no heir marks its rows before they are read here.
        os.kill(pid, signal.SIGSTOP)
        in_flight = oldest()
        os.kill(pid, signal.SIGKILL)
    assert relay.wait_for_end() == -signal.SIGKILL
    relay.part.start()
    assert relay.pid != pid
    return in_flight


def twice(side: OrderSide, *, of: list[str]) -> set[str]:
    """Return who is in the topic twice; nobody is missing, nobody is there more often."""
    counts = order_ids(side.records())
    assert set(counts) == set(of)
    assert max(counts.values()) <= 2
    found = {order_id for order_id, count in counts.items() if count == 2}
    note("twice in the topic", len(found))
    return found


def note(what: str, figure: float) -> None:
    """Print a figure; `pytest -s` shows it."""
    print(f"{what}: {figure:.2f}")  # noqa: T201


def rows(side: OrderSide, order_ids: list[str]) -> list[tuple[Any, ...]]:
    """Return what the outbox says of these orders."""
    return side.sql(
        'SELECT id, state, partition, "offset", published_at, completed_at FROM outbox'
        " WHERE aggregateid = ANY(%s) ORDER BY id",
        order_ids,
    )
