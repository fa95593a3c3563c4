"""Replicas that come and go under load: none is missed, and no mail is lost."""

import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pytest

from tests.support.mail_side import MailSide, once
from tests.support.records import Row, order
from tests.support.scale import IS_LONG, scaled
from tests.support.service import Service
from tests.support.sink import Delay, Rule

CHANGES = scaled(20)
AT_ONCE = 20 if IS_LONG else 5
ORDERS_BY_SECOND = 60
ANSWER_SECONDS = 0.05
CALM_SECONDS = 1.5
DRAINED_SECONDS = 60.0
SEED = 20_261_121


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL], ids=["SIGTERM", "SIGKILL"])
def test_replicas_join_and_leave_under_load(side: MailSide, number: signal.Signals) -> None:
    """Every order is mailed; twice only what a killed one had sent and could not write down."""
    dice = random.Random(SEED)
    killed: list[tuple[float, set[str]]] = []
    side.sink.script(Rule("dot", Delay(ANSWER_SECONDS)))
    with load(side) as sent, ExitStack() as up:
        replicas = [up.enter_context(side.running()) for _ in range(AT_ONCE)]
        for _ in range(CHANGES):
            leaving = replicas.pop(dice.randrange(len(replicas)))
            replicas.append(up.enter_context(side.running()))
            assert end(leaving, number) == (0 if number == signal.SIGTERM else -number)
            if number == signal.SIGKILL:
                killed.append((time.time(), in_the_hands_of(side, leaving)))
            threading.Event().wait(CALM_SECONDS)
    assert len(sent) > CHANGES * ORDERS_BY_SECOND
    with side.running():
        side.wait_until_sent(len(sent), seconds=DRAINED_SECONDS)
    copies = side.copies()
    assert set(copies) == set(once(sent))
    second = copies - once(sent)
    print(f"{number.name}: {len(sent)} orders, {second.total()} second copies")  # noqa: T201
    assert second - accepted_and_open(side, killed) == Counter()
    assert number == signal.SIGKILL or second == Counter()


@contextmanager
def load(side: MailSide) -> Iterator[list[Row]]:
    """Place orders at a steady rate until the block ends; give those placed so far."""
    sent: list[Row] = []
    stop = threading.Event()

    def place() -> None:
        while not stop.wait(1 / ORDERS_BY_SECOND * 10):
            batch = [order(len(sent) + number) for number in range(10)]
            side.send(batch)
            sent.extend(batch)

    thread = threading.Thread(target=place)
    thread.start()
    try:
        yield sent
    finally:
        stop.set()
        thread.join()


def end(replica: Service, number: signal.Signals) -> int:
    """Send a replica a signal and return its exit code."""
    replica.signal(number)
    return replica.wait_for_end(seconds=40)


def in_the_hands_of(side: MailSide, killed: Service) -> set[str]:
    """Return the orders whose mails it had claimed and did not call SENT."""
    rows = side.sql(
        "SELECT order_id FROM deliveries JOIN replicas ON replicas.id = deliveries.owner"
        " WHERE state = 'SENDING' AND replicas.name LIKE %s",
        f"%-{killed.pid}",
    )
    return {row["order_id"] for row in rows}


def accepted_and_open(side: MailSide, killed: list[tuple[float, set[str]]]) -> Counter[str | None]:
    """Return what may come once more: accepted by the relay, and not SENT when its replica died."""
    explained = Counter[str | None]()
    for at, in_hand in killed:
        explained.update({mail.order_id for mail in side.accepted_of(at)} & in_hand)
    return explained
