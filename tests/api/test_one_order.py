"""One key, one order: in parallel, over both workers, across a restart, after refusals."""

import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from threading import Barrier, Event

import httpx
import pytest

from tests.api.hostile.case import GOOD_BODY, with_, with_item
from tests.api.service import Api, place, statuses
from tests.api.verdicts import PROBLEM

PARALLEL = 50
ROUNDS = 5
WORKERS = 2
BACK_SECONDS = 30.0
# How long clients go on repeating themselves when the API is back.
AFTERWARDS_SECONDS = 0.5


@pytest.fixture
def clients(api: Api) -> Iterator[list[httpx.Client]]:
    """Give clients of one user, half of them connected to each worker."""
    with ExitStack() as opened:
        clients = [opened.enter_context(api.client("carol")) for _ in range(PARALLEL)]
        for number, other in enumerate(api.workers):
            other.suspend()
            try:
                for client in clients[number::WORKERS]:
                    client.get("/v1/products")
            finally:
                other.resume()
        yield clients


def at_once(clients: list[httpx.Client], key: str) -> list[httpx.Response]:
    """Let every client send the same order in the same moment."""
    barrier = Barrier(len(clients))

    def send(client: httpx.Client) -> httpx.Response:
        barrier.wait()
        return place(client, key)

    with ThreadPoolExecutor(len(clients)) as pool:
        return list(pool.map(send, clients))


def orders_of(api: Api, key: str) -> list[str]:
    rows = api.sql("SELECT order_id FROM idempotency_keys WHERE key = %s", key)
    return [str(order_id) for (order_id,) in rows]


def assert_one_order(api: Api, key: str, replies: list[httpx.Response]) -> None:
    """Check that all replies are the same 201, or a 409 that says when to ask again."""
    assert statuses(replies) <= {201, 409}
    taken = [reply for reply in replies if reply.status_code == 201]
    assert len({reply.content for reply in taken}) == 1
    assert len({reply.headers["Location"] for reply in taken}) == 1
    assert {reply.headers.get("Idempotent-Replayed", "true") for reply in taken} == {"true"}
    for busy in (reply for reply in replies if reply.status_code == 409):
        assert busy.headers["Content-Type"] == PROBLEM
        assert int(busy.headers["Retry-After"]) >= 1
        assert busy.json()["type"] == "urn:order-service:problem:request-in-flight"
    order_id = taken[0].json()["id"]
    assert orders_of(api, key) == [order_id]
    rows = api.sql("SELECT count(*) FROM outbox WHERE aggregateid = %s", order_id)
    assert rows == [(1,)]


@pytest.mark.fault("F-H4")
def test_fifty_at_once_are_one_order(api: Api, clients: list[httpx.Client]) -> None:
    """In every round one places it, the others hear the same 201 or 409; both workers took part."""
    before = api.sql("SELECT count(*) FROM orders")[0][0]
    workers = api.workers
    assert len(workers) == WORKERS
    worked = {worker.pid: worker.cpu_times().user for worker in workers}
    for _ in range(ROUNDS):
        key = str(uuid.uuid4())
        replies = at_once(clients, key)
        assert_one_order(api, key, replies)
        first = [reply for reply in replies if "Idempotent-Replayed" not in reply.headers]
        assert [reply.status_code for reply in first].count(201) == 1
    assert api.sql("SELECT count(*) FROM orders")[0][0] == before + ROUNDS
    assert all(worker.cpu_times().user > worked[worker.pid] for worker in workers)


@pytest.mark.parametrize("end", ["killed", "stopped"])
def test_fifty_at_once_are_one_order_across_a_restart(
    api: Api, clients: list[httpx.Client], end: str
) -> None:
    """Clients that repeat themselves while the API goes and comes back get one order."""
    key = str(uuid.uuid4())
    is_back = Event()
    before = at_once(clients[:10], key)
    pid = api.stack.part("order-api").pid

    def repeat(client: httpx.Client) -> list[httpx.Response]:
        heard = []
        while not is_back.is_set():
            heard.append(_try(lambda: place(client, key)))
            time.sleep(0.02)
        return [reply for reply in heard if reply is not None]

    with ThreadPoolExecutor(PARALLEL) as pool:
        repeating = [pool.submit(repeat, client) for client in clients]
        try:
            _restart(api, end)
            time.sleep(AFTERWARDS_SECONDS)
        finally:
            is_back.set()
        during = [reply for future in repeating for reply in future.result()]
    after = at_once(clients, key)
    assert_one_order(api, key, [*before, *during, *after])
    assert 201 in statuses(after)
    assert api.stack.part("order-api").pid != pid


def test_a_key_first_used_while_the_api_is_killed_is_one_order(
    api: Api, clients: list[httpx.Client]
) -> None:
    """Whatever the kill cut off, the next answer is the one order, placed before or after it."""
    keys = [str(uuid.uuid4()) for _ in range(PARALLEL)]
    with ThreadPoolExecutor(PARALLEL) as pool:
        cut = [
            pool.submit(_try, lambda client=client, key=key: place(client, key))
            for client, key in zip(clients, keys, strict=True)
        ]
        api.stack.kill("order-api")
        early = [future.result() for future in cut]
    api.stack.wait_ready("order-api", BACK_SECONDS)
    for client, key, reply in zip(clients, keys, early, strict=True):
        again = place(client, key)
        assert_one_order(api, key, [again] if reply is None else [reply, again])


@pytest.mark.parametrize(
    ("refused", "body", "headers"),
    [
        (400, b"{", {}),
        (400, b'{"email": NaN}', {}),
        (415, GOOD_BODY, {"Content-Type": "text/plain"}),
        (413, GOOD_BODY.ljust(70_000), {}),
        (422, with_(email="nobody"), {}),
        (422, with_item(sku="NOT-FOR-SALE"), {}),
        (409, with_(expectedAmount="1"), {}),
        (401, GOOD_BODY, {"Authorization": "Bearer forged"}),
    ],
    ids=[
        "no JSON",
        "NaN",
        "no JSON by its type",
        "too large",
        "no address",
        "not for sale",
        "price changed",
        "forged token",
    ],
)
def test_a_refusal_does_not_burn_the_key(
    api: Api,
    client: httpx.Client,
    refused: int,
    body: bytes,
    headers: dict[str, str],
) -> None:
    """The corrected order goes through under the key of the refused one."""
    key = str(uuid.uuid4())
    sent = {"Content-Type": "application/json", "Idempotency-Key": key} | headers
    reply = client.post("/v1/orders", headers=sent, content=body)
    assert (reply.status_code, orders_of(api, key)) == (refused, [])
    corrected = place(client, key)
    assert corrected.status_code == 201
    assert "Idempotent-Replayed" not in corrected.headers


def _try(send: Callable[[], httpx.Response]) -> httpx.Response | None:
    """Return the reply, or None when the connection broke."""
    try:
        return send()
    except httpx.TransportError:
        return None


def _restart(api: Api, end: str) -> None:
    if end == "killed":
        api.stack.kill("order-api")
        api.stack.wait_ready("order-api", BACK_SECONDS)
    else:
        api.stack.stop("order-api")
        api.stack.start("order-api")
