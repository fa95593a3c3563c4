"""Forged tokens and headers that carry none: 401 each, alike, and nothing stored."""

import select
import socket
import uuid
from collections.abc import Iterator, Mapping
from typing import Any

import httpx
import pytest

from tests.api.hostile.case import Case
from tests.api.service import Api, place
from tests.api.verdicts import assert_problem, assert_refused
from tests.api.wire import Reply, exchange

INVALID = 'Bearer realm="order-service", error="invalid_token"'
# Longer than the server lets a header be: it answers before the application.
TOO_LONG = {"1 MB"}
AUTHORIZATIONS: dict[str, str | bytes | None] = {
    "no header": None,
    "an empty header": "",
    "a scheme and nothing": "Bearer",
    "a scheme and a space": "Bearer ",
    "a token and no scheme": "{token}",
    "a scheme too long": "BearerX {token}",
    "no space": "Bearer{token}",
    "a comma": "Bearer,{token}",
    "a colon": "Bearer:{token}",
    "another scheme": "Basic dTpw",
    "the token by another scheme": "Token {token}",
    "digest": 'Digest username="alice"',
    "negotiate": "Negotiate YII=",
    "two schemes": "Basic dTpw, Bearer {token}",
    "Latin-1": b"Bearer \xe9",
    "bytes that are no text": b"\xff\xfe {token}",
}


@pytest.fixture(scope="module")
def listener() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server


@pytest.fixture(scope="module")
def forged(api: Api, listener: socket.socket) -> Mapping[str, str]:
    port = listener.getsockname()[1]
    return api.forged_tokens(f"http://127.0.0.1:{port}/jwks.json")


def post(api: Api, authorization: str | bytes | None) -> Reply:
    case = Case(name="", status=401, headers={"Authorization": authorization})
    return exchange(api.address, case.pieces("", str(uuid.uuid4())))


def test_a_forged_token_proves_nothing(api: Api, cursor: Any, forged: Mapping[str, str]) -> None:
    """Every one of them is answered 401 `invalid_token`, in the same words."""
    assert len(forged) >= 25
    wrong = {}
    bodies = set()
    for name, token in forged.items():
        reply = assert_refused(
            cursor, lambda token=token: post(api, f"Bearer {token}"), lambda status: status < 500
        )
        if name in TOO_LONG:
            assert reply.status in {400, 401, 431}
        elif (reply.status, reply.headers.get("www-authenticate")) != (401, INVALID):
            wrong[name] = (reply.status, reply.headers.get("www-authenticate"))
        else:
            assert_problem(reply)
            bodies.add(reply.body)
    assert not wrong
    assert len(bodies) == 1


def test_nobody_follows_an_address_in_a_token(
    forged: Mapping[str, str], listener: socket.socket
) -> None:
    """`jku` and `x5u` are ignored: no connection has come in."""
    assert {"jku to somewhere", "x5u to somewhere"} <= forged.keys()
    assert select.select([listener], [], [], 0.2)[0] == []


@pytest.mark.parametrize("name", AUTHORIZATIONS)
def test_what_is_no_bearer_token_is_401(api: Api, token: str, cursor: Any, name: str) -> None:
    """A good token in the wrong dress is none."""
    value = AUTHORIZATIONS[name]
    if isinstance(value, str):
        value = value.replace("{token}", token)
    elif value is not None:
        value = value.replace(b"{token}", token.encode())
    reply = assert_refused(cursor, lambda: post(api, value), lambda status: status == 401)
    assert_problem(reply)
    assert reply.headers["www-authenticate"].startswith("Bearer ")


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/v1/orders"),
        ("GET", "/v1/orders"),
        ("GET", "/v1/orders/00000000-0000-0000-0000-000000000000"),
    ],
)
def test_a_token_in_the_address_is_none(api: Api, token: str, method: str, path: str) -> None:
    """Addresses end up in logs: a token is taken from its header alone (RFC 6750 §2.3)."""
    url = f"{api.pair.api_url}{path}"
    reply = httpx.request(method, url, params={"access_token": token}, json={})
    assert reply.status_code == 401


def test_the_user_is_who_the_token_says(client: httpx.Client) -> None:
    """Headers by which a proxy might name a user name nobody."""
    names = ("X-User-Id", "X-Forwarded-User", "X-Remote-User", "Remote-User", "X-Original-User")
    reply = client.get("/v1/orders", headers=dict.fromkeys(names, "alice"))
    own = place(client).json()
    assert reply.status_code == 200
    assert {order["userId"] for order in reply.json()["items"]} <= {own["userId"]}
