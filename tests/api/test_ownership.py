"""User A against every route, verb and id of user B: as if B had nothing (OWASP API1)."""

import uuid
from collections.abc import Mapping

import httpx
import pytest

from tests.api.service import Api, place

UNKNOWN = "01a1fdbb-703e-730a-bb1c-2fb8b1cd7eee"
VERBS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "PURGE")
# What differs from one answer to the next, whoever asks.
OWN = {"date", "x-request-id", "traceparent"}
CONDITIONS: tuple[Mapping[str, str], ...] = (
    {},
    {"If-None-Match": "*"},
    {"If-Match": "*"},
    {"If-Modified-Since": "Thu, 01 Jan 2099 00:00:00 GMT"},
    {"Range": "bytes=0-10"},
    {"X-HTTP-Method-Override": "DELETE"},
    {"X-User-Id": "bob"},
    {"Accept": "text/html"},
)
MATRIX = [(verb, condition) for verb in VERBS for condition in CONDITIONS]


@pytest.fixture(scope="module")
def ids(api: Api, bob: httpx.Client) -> list[str]:
    """Give every id that stands for something of Bob's."""
    order_id = place(bob).json()["id"]
    events = api.sql("SELECT id FROM outbox WHERE aggregateid = %s", order_id)
    return [order_id, order_id.upper(), str(events[0][0])]


@pytest.fixture(scope="module")
def routes(api: Api) -> list[str]:
    """Give the routes that take an id, as the API itself describes them."""
    paths = httpx.get(f"{api.pair.api_url}/openapi.json").json()["paths"]
    found = [path for path in paths if "{" in path]
    assert "/v1/orders/{order_id}" in found
    return found


def shown(reply: httpx.Response) -> tuple[int, dict[str, str], bytes]:
    """Return all of an answer that could tell two of them apart."""
    headers = {name: value for name, value in reply.headers.items() if name not in OWN}
    return reply.status_code, headers, reply.content


def fill(route: str, value: str) -> str:
    return route[: route.index("{")] + value + route[route.index("}") + 1 :]


@pytest.mark.parametrize(("verb", "condition"), MATRIX, ids=str)
def test_what_is_bobs_is_unknown_to_alice(
    alice: httpx.Client,
    routes: list[str],
    ids: list[str],
    verb: str,
    condition: Mapping[str, str],
) -> None:
    """The answer is 404, or 405 where nobody has that verb, and equals that for an unknown id."""
    for route in routes:
        unknown = alice.request(verb, fill(route, UNKNOWN), headers=condition)
        assert unknown.status_code == 404 or verb not in {"GET", "HEAD"}
        assert unknown.status_code in {200, 404, 405}
        assert verb == "OPTIONS" or unknown.status_code != 200
        for value in ids:
            foreign = alice.request(verb, fill(route, value), headers=condition)
            assert shown(foreign) == shown(unknown)


def test_bob_himself_is_shown_his_order(bob: httpx.Client, ids: list[str]) -> None:
    """The order is there: what hides it from Alice is that she is not Bob."""
    assert bob.get(f"/v1/orders/{ids[0]}").status_code == 200
    assert bob.get(f"/v1/orders/{ids[1]}").status_code == 200


def test_bobs_etag_tells_alice_nothing(
    alice: httpx.Client, bob: httpx.Client, ids: list[str]
) -> None:
    """Bob hears 304 for it; Alice hears the 404 of an unknown id."""
    etag = {"If-None-Match": bob.get(f"/v1/orders/{ids[0]}").headers["ETag"]}
    assert bob.get(f"/v1/orders/{ids[0]}", headers=etag).status_code == 304
    unknown = alice.get(f"/v1/orders/{UNKNOWN}", headers=etag)
    assert shown(alice.get(f"/v1/orders/{ids[0]}", headers=etag)) == shown(unknown)
    assert unknown.status_code == 404


def test_a_list_is_ones_own(alice: httpx.Client, bob: httpx.Client, ids: list[str]) -> None:
    """Neither a filter nor Bob's cursor brings one of Bob's orders into Alice's list."""
    for _ in range(2):
        place(alice)
        place(bob)
    page = bob.get("/v1/orders", params={"limit": 1})
    cursor = page.json()["nextCursor"]
    assert 'rel="next"' in page.headers["Link"]
    queries = (
        {},
        {"cursor": cursor},
        {"userId": "bob"},
        {"user_id": "bob"},
        {"user": "bob"},
        {"id": ids[0]},
        {"limit": "100"},
    )
    for query in queries:
        reply = alice.get("/v1/orders", params=query)
        assert reply.status_code in {200, 422}
        if reply.status_code == 200:
            assert {order["userId"] for order in reply.json()["items"]} <= {"alice"}


def test_bobs_key_is_not_alices(api: Api, alice: httpx.Client, bob: httpx.Client) -> None:
    """Under one key each has an order of their own, and neither is a replay."""
    key = str(uuid.uuid4())
    replies = [place(client, key) for client in (bob, alice)]
    assert [reply.status_code for reply in replies] == [201, 201]
    assert [reply.json()["userId"] for reply in replies] == ["bob", "alice"]
    assert not any("Idempotent-Replayed" in reply.headers for reply in replies)
    assert len(api.sql("SELECT order_id FROM idempotency_keys WHERE key = %s", key)) == 2


def test_bobs_key_with_another_body_is_no_oracle(alice: httpx.Client, bob: httpx.Client) -> None:
    """A key that Bob used for something else is free for Alice: no 422 tells of it."""
    key = str(uuid.uuid4())
    assert place(bob, key).status_code == 201
    assert place(alice, key, locale="en").status_code == 201
