"""So many orders and no more, over both workers: the order form is no mail cannon (OWASP API6)."""

import uuid
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import cycle, islice

import httpx
import pytest

from tests.api.service import Api, order, place
from tests.api.verdicts import PROBLEM

PER_USER = 7
PER_RECIPIENT = 5
PARALLEL = 24


@pytest.fixture(scope="module")
def strict_url(api: Api) -> Iterator[str]:
    """Give the address of a second API, with limits that a test can reach."""
    limits = {
        "ORDERS_PER_USER_PER_MINUTE": str(PER_USER),
        "ORDERS_PER_RECIPIENT_PER_HOUR": str(PER_RECIPIENT),
    }
    with api.another("order-api-strict", **limits) as url:
        yield url


def place_all(
    api: Api, url: str, users: list[str], addresses: list[str]
) -> list[tuple[str, httpx.Response]]:
    """Place an order for each pair at once, every one with a key of its own."""

    def send(user: str, address: str) -> tuple[str, httpx.Response]:
        with api.client(user, url) as client:
            key = str(uuid.uuid4())
            return key, place(client, key, email=address)

    for user in set(users):
        api.token(user)
    with ThreadPoolExecutor(PARALLEL) as pool:
        return list(pool.map(send, users, addresses))


def assert_too_many(reply: httpx.Response, most_seconds: int) -> None:
    assert reply.status_code == 429
    assert reply.headers["Content-Type"] == PROBLEM
    assert 1 <= int(reply.headers["Retry-After"]) <= most_seconds
    assert reply.json()["type"] == "urn:order-service:problem:too-many-orders"
    assert reply.json().keys() == {"type", "title", "status", "detail"}


def test_a_user_has_so_many_a_minute(api: Api, strict_url: str) -> None:
    """Of many at once exactly the limit is taken; a replay is answered even then."""
    addresses = [f"user.limit.{number}@example.com" for number in range(PARALLEL)]
    replies = place_all(api, strict_url, ["dora"] * PARALLEL, addresses)
    assert Counter(reply.status_code for _, reply in replies) == {
        201: PER_USER,
        429: PARALLEL - PER_USER,
    }
    for _, reply in replies:
        if reply.status_code == 429:
            assert_too_many(reply, most_seconds=60)
    with api.client("dora", strict_url) as client:
        for address, (key, reply) in zip(addresses, replies, strict=True):
            again = place(client, key, email=address)
            if reply.status_code == 429:
                assert_too_many(again, most_seconds=60)
            else:
                assert (again.status_code, again.content) == (201, reply.content)
                assert again.headers["Idempotent-Replayed"] == "true"
    assert api.sql("SELECT count(*) FROM orders WHERE user_id = 'dora'") == [(PER_USER,)]


def test_a_recipient_has_so_many_an_hour(api: Api, strict_url: str) -> None:
    """Several users together, in whatever spelling, bring one address no more than the limit."""
    users = list(islice(cycle(("erin", "finn", "gwen", "hugo")), PARALLEL))
    spellings = ("victim@example.com", "Victim@example.com", "VICTIM@EXAMPLE.COM")
    addresses = list(islice(cycle(spellings), PARALLEL))
    replies = place_all(api, strict_url, users, addresses)
    taken = [reply for _, reply in replies if reply.status_code == 201]
    assert len(taken) == PER_RECIPIENT
    for _, reply in replies:
        if reply.status_code != 201:
            assert_too_many(reply, most_seconds=3600)
    counted = api.sql("SELECT count(*) FROM orders WHERE lower(email) = 'victim@example.com'")
    assert counted == [(PER_RECIPIENT,)]


def test_a_refused_order_counts_for_nothing(api: Api, strict_url: str) -> None:
    """Only what was placed is counted, so mistakes do not lock anybody out."""
    with api.client("iris", strict_url) as client:
        wrong = {"items": [{"sku": "NOT-FOR-SALE", "quantity": 1}]}
        for number in range(PER_USER + 3):
            assert place(client, email=f"iris.{number}@example.com", **wrong).status_code == 422
        body = order(email="iris@example.com")
        headers = {"Idempotency-Key": str(uuid.uuid4())}
        assert client.post("/v1/orders", json=body, headers=headers).status_code == 201
