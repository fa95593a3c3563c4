"""Parts stop and processes are killed; every accepted order still becomes a mail."""

import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from deploy.embedded.part import Command, Part
from tests.support.sink import Rule
from tests.support.world import REPLICAS, World, eventually, place

ORDERS = 500
CLIENTS = 8
RECOVERY_SECONDS = 60


def test_without_read_back_mails_still_go(world: World, alice: httpx.Client) -> None:
    """The publisher alone brings an event to PUBLISHED, and that is enough for its mail."""
    world.stack.stop("order-relay")
    alone = _publisher_alone(world)
    alone.start()
    try:
        order_id = place(alice).json()["id"]
        eventually(lambda: world.mails([order_id]), within_seconds=15)
        # The mail may be there before the publisher has written where its event is.
        eventually(lambda: world.outbox(order_id)["state"] == "PUBLISHED", within_seconds=15)
    finally:
        alone.stop()
        world.stack.start("order-relay")
    eventually(lambda: world.outbox(order_id)["state"] == "COMPLETED", within_seconds=15)


def test_with_the_mail_service_stopped_events_are_completed(
    world: World, alice: httpx.Client
) -> None:
    """COMPLETED says nothing about the mail; the mail comes when the service is back."""
    for name in REPLICAS:
        world.stack.stop(name)
    try:
        order_id = place(alice).json()["id"]
        eventually(lambda: world.outbox(order_id)["state"] == "COMPLETED", within_seconds=15)
        assert world.mails([order_id]) == []
    finally:
        world.stack.start(*REPLICAS)
    eventually(lambda: world.mails([order_id]), within_seconds=RECOVERY_SECONDS)


def test_with_the_broker_stopped_orders_are_taken(world: World, alice: httpx.Client) -> None:
    """The API answers 201 without Kafka; the mail comes when Kafka is back."""
    world.stack.stop("kafka")
    try:
        response = place(alice)
        assert response.status_code == 201
        order_id = response.json()["id"]
        assert world.outbox(order_id)["state"] == "INIT"
    finally:
        world.stack.start("kafka")
    eventually(lambda: world.mails([order_id]), within_seconds=RECOVERY_SECONDS)
    eventually(lambda: world.outbox(order_id)["state"] == "COMPLETED", within_seconds=15)


def test_with_smtp_stopped_the_mail_waits(world: World, alice: httpx.Client) -> None:
    """A relay that is away costs time, not a mail."""
    world.sink.stop()
    try:
        order_id = place(alice).json()["id"]
        state = "SELECT state FROM deliveries WHERE order_id = %s"
        eventually(lambda: world.mail_sql(state, order_id) == [("RETRY",)], within_seconds=15)
    finally:
        world.sink.start()
    eventually(lambda: world.mails([order_id]), within_seconds=RECOVERY_SECONDS)
    assert len(world.mails([order_id])) == 1


@pytest.mark.fault("F-C2")
@pytest.mark.timeout(300)
def test_kills_in_the_middle_lose_nothing(world: World) -> None:
    """SIGKILL of relay and replica: a mail for every order, a second one only where explained.

    Explained is a mail that the relay had accepted and the ledger, read at the kill, had not as
    SENT.
    """
    placed: list[str] = []
    # Slow answers keep many mails between the dot and the recorded 250, where a kill hurts.
    world.sink.script(Rule("dot", "delay:0.3"))
    with ThreadPoolExecutor(1) as background:
        placing = background.submit(_place_many, world, placed)
        eventually(lambda: len(placed) > ORDERS // 4, within_seconds=60)
        world.stack.kill("order-relay")
        eventually(lambda: len(placed) > ORDERS // 2, within_seconds=60)
        explained = _kill_replica(world, "mail-1")
        placing.result(timeout=120)
    assert len(placed) == ORDERS
    assert explained, "the kill met no mail in flight"
    eventually(
        lambda: len({mail.order_id for mail in world.mails(placed)}) == ORDERS,
        within_seconds=RECOVERY_SECONDS,
    )
    eventually(lambda: _open_rows(world) == 0, within_seconds=RECOVERY_SECONDS)
    copies = Counter(mail.order_id for mail in world.mails(placed))
    world.sink.script()
    doubled = {order_id for order_id, count in copies.items() if count > 1}
    assert doubled <= explained
    assert max(copies.values()) <= 2
    states = world.order_sql(
        "SELECT DISTINCT state FROM outbox WHERE aggregateid = ANY(%s)", placed
    )
    assert states == [("COMPLETED",)]


def _place_many(world: World, placed: list[str]) -> None:
    """Place the orders from several clients; a reply that is not 201 ends the test."""
    left = threading.BoundedSemaphore(ORDERS)

    def place_some(client: httpx.Client) -> None:
        while left.acquire(blocking=False):
            response = place(client)
            assert response.status_code == 201, response.text
            placed.append(response.json()["id"])

    with world.client("carol") as client, ThreadPoolExecutor(CLIENTS) as pool:
        for future in [pool.submit(place_some, client) for _ in range(CLIENTS)]:
            future.result()


def _kill_replica(world: World, name: str) -> set[str]:
    """Kill a replica while it sends; return the orders it may have mailed without saying so."""
    pid = world.stack.part(name).pid

    def claimed() -> list[str]:
        rows = world.mail_sql(
            """
            SELECT order_id FROM deliveries JOIN replicas ON replicas.id = deliveries.owner
             WHERE state = 'SENDING' AND replicas.name LIKE %s
            """,
            f"%-{pid}",
        )
        return [order_id for (order_id,) in rows]

    eventually(lambda: world.mails(claimed()), within_seconds=20)
    world.stack.kill(name)
    in_hand = claimed()
    # What had left the replica reaches the journal now; nobody else sends these before the lease
    # has ended.
    time.sleep(1)
    return {mail.order_id or "" for mail in world.mails(in_hand)}


def _open_rows(world: World) -> int:
    ((count,),) = world.mail_sql(
        "SELECT count(*) FROM deliveries WHERE state NOT IN ('SENT', 'ERASED')"
    )
    return int(count)


def _publisher_alone(world: World) -> Part:
    state = world.stack.state
    program = "tests/support/publisher_alone.py"
    return Part(
        name="publisher-alone",
        command=Command(
            argv=[".venv/order/bin/python", program],
            env=world.pair.order_environment,
            log_path=state.log("publisher-alone"),
        ),
        pid_path=state.pid("publisher-alone"),
        is_ready=lambda: True,
    )
