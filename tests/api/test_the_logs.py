"""Nothing secret and no address is in any log; runs after all other tests of this folder."""

import json
import re
import uuid
from pathlib import Path

import httpx
import pytest

from tests.api.hostile.case import Case
from tests.api.service import (
    CANARY_ADDRESS,
    CANARY_PASSWORD,
    CANARY_USER,
    Api,
    place,
)
from tests.api.wire import exchange

TOKEN = re.compile(rb"eyJ[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]{10,}")
CANARY_KEY = "canary-of-an-idempotency-key"
AROUND = 60


@pytest.fixture(scope="module", autouse=True)
def faults(api: Api, client: httpx.Client) -> None:
    """Let the canaries meet every kind of failure that writes a log line."""
    assert place(client, CANARY_KEY).status_code == 201
    with api.database() as cursor:
        # A statement that carries the address fails: its time is over.
        cursor.execute("BEGIN; LOCK TABLE outbox IN ACCESS EXCLUSIVE MODE")
        try:
            assert place(client).status_code == 503
        finally:
            cursor.execute("ROLLBACK")
        # One fails in a way nobody has foreseen: the table is not what it was.
        cursor.execute("ALTER TABLE order_items ADD CONSTRAINT canary CHECK (quantity <> 998)")
        try:
            items = [{"sku": "CUP-WHITE", "quantity": 998}]
            assert place(client, items=items).status_code == 500
        finally:
            cursor.execute("ALTER TABLE order_items DROP CONSTRAINT canary")
    api.stack.stop("order-db")
    try:
        assert place(client).status_code == 503
        assert client.get("/v1/orders").status_code == 503
    finally:
        api.stack.start("order-db")
    assert place(client, CANARY_KEY).status_code == 201
    token = api.token(CANARY_USER)
    broken = Case(name="", status=400, headers={"X Evil": f"{token} {CANARY_ADDRESS}"})
    assert exchange(api.address, broken.pieces(token, str(uuid.uuid4()))).status == 400
    longest = Case(name="", status=414, path=f"/v1/orders?access_token={token * 10}")
    assert exchange(api.address, longest.pieces(token, str(uuid.uuid4()))).status == 414


def lines_with(api: Api, secret: bytes) -> list[str]:
    """Return the lines that hold it, each as the few characters around it."""
    around = re.compile(b".{0,%d}%b.{0,%d}" % (AROUND, re.escape(secret), AROUND))
    return [
        f"{path.name}: …{match[0]!r}…"
        for path in api.logs
        for line in path.read_bytes().splitlines()
        if (match := around.search(line))
    ]


def test_the_logs_are_those_of_the_run(api: Api) -> None:
    """There is a log of each process, and the orders of this run are in it."""
    names = {path.name for path in api.logs}
    assert {"order-api.log", "order-db.log", "order-migrate.log"} <= names
    ((order_id,),) = api.sql("SELECT order_id FROM idempotency_keys WHERE key = %s", CANARY_KEY)
    assert lines_with(api, str(order_id).encode())
    assert lines_with(api, b"database.failed")


@pytest.mark.parametrize(
    "secret", [CANARY_PASSWORD, CANARY_ADDRESS, CANARY_ADDRESS.replace("@", "%40"), CANARY_KEY]
)
def test_no_line_holds_a_canary(api: Api, secret: str) -> None:
    """Neither the database's password nor a customer's address or key is in any log."""
    found = lines_with(api, secret.encode())
    assert not found, "\n".join(found)


def test_no_line_holds_a_token(api: Api) -> None:
    """Neither a token of this run, whole or by its signature, nor anything of a token's form."""
    assert api.tokens
    for token in api.tokens.values():
        assert not lines_with(api, token.rpartition(".")[2].encode())
    found = [
        f"{path.name}: {match[0][:80]!r}"
        for path in api.logs
        for match in TOKEN.finditer(path.read_bytes())
    ]
    assert not found


def test_no_line_holds_the_signing_key(api: Api) -> None:
    """No line of the issuer's private key is in any log."""
    jwks = Path(api.pair.order_environment["AUTH_JWKS"])
    key = jwks.with_name("signing-key.pem").read_bytes().splitlines()
    assert len(key) > 10
    assert not any(lines_with(api, line) for line in key)


def test_every_line_of_the_service_is_one_json_object(api: Api) -> None:
    """A line feed in a request makes no line of its own (log injection)."""
    (path,) = (path for path in api.logs if path.name == "order-api.log")
    for line in path.read_text().splitlines():
        if not line.startswith("["):  # gunicorn's own
            assert isinstance(json.loads(line), dict)
