"""Hand-listed hostile requests: each refused with its status, promptly, and nothing stored."""

import uuid
from typing import Any

import pytest

from tests.api.hostile import (
    fields,
    headers,
    json_text,
    mail_addresses,
    raw_requests,
    targets,
)
from tests.api.hostile.case import GOOD_BODY, Case, with_
from tests.api.hostile.raw_requests import RawCase
from tests.api.service import Api, counts
from tests.api.verdicts import assert_problem, assert_refused, is_client_error_or_closed
from tests.api.wire import Reply, exchange

CASES = [
    *json_text.CASES,
    *fields.CASES,
    *mail_addresses.CASES,
    *headers.CASES,
    *targets.CASES,
]
# Each of these is what a case above is with its one fault taken away.
HARMLESS = [
    Case(name="the good order", status=201),
    Case(name="in chunks", status=201, is_chunked=True),
    Case(name="of 64 KiB", status=201, body=GOOD_BODY.ljust(64 * 1024)),
    Case(
        name="with a character set",
        status=201,
        headers={"Content-Type": 'application/json; charset="UTF-8"'},
    ),
    Case(name="with capitals", status=201, headers={"Content-Type": "Application/JSON"}),
    Case(name="with a quoted key", status=201, headers={"Idempotency-Key": '"hostile but not"'}),
    Case(
        name="with 50 items",
        status=201,
        body=with_(items=[{"sku": "CUP-WHITE", "quantity": 1}] * 50),
    ),
    Case(name="with the longest key", status=201, headers={"Idempotency-Key": "k" * 255}),
    Case(name="with escapes", status=201, body=GOOD_BODY.replace(b"canary", rb"\u0063anary")),
    Case(name="with the expected amount", status=201, body=with_(expectedAmount="12000")),
    Case(
        name="with the expected amount's zeros", status=201, body=with_(expectedAmount="12000.00")
    ),
]


def send(api: Api, case: Case, token: str) -> Reply:
    pieces = case.pieces(token, key=str(uuid.uuid4()))
    return exchange(api.address, pieces, method=case.method)


def test_there_are_enough_of_them() -> None:
    """At least 300, and no two of one name."""
    names = [case.name for case in (*CASES, *raw_requests.CASES)]
    assert len(names) >= 300
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("case", HARMLESS, ids=lambda case: case.name)
def test_the_harmless_request_is_taken(api: Api, token: str, cursor: Any, case: Case) -> None:
    """What is refused below is refused for its fault, not for the request around it."""
    before = counts(cursor)["orders"]
    reply = send(api, case, token)
    assert reply.status == case.status, reply.body
    assert counts(cursor)["orders"] == before + 1


@pytest.mark.fault("F-H15")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_hostile_request_is_refused(api: Api, token: str, cursor: Any, case: Case) -> None:
    """The exact status, as a problem, within 200 ms; no row is written."""
    reply = assert_refused(
        cursor, lambda: send(api, case, token), lambda status: status in case.statuses
    )
    assert_problem(reply)


@pytest.mark.parametrize("case", raw_requests.CASES, ids=lambda case: case.name)
def test_what_is_hardly_http_is_refused(api: Api, token: str, cursor: Any, case: RawCase) -> None:
    """A 4xx or a closed connection; what the application saw is a problem."""

    def send_raw() -> Reply:
        request = raw_requests.render(case, token=token, key=str(uuid.uuid4()), body=GOOD_BODY)
        return exchange(api.address, [request], half=case.half)

    def is_right(status: int) -> bool:
        return status == 501 if case.is_501 else is_client_error_or_closed(status)

    reply = assert_refused(cursor, send_raw, is_right)
    # gunicorn refuses what it cannot parse by itself, in a page of one sentence.
    if reply.status and not reply.media_type.startswith("text/html"):
        assert_problem(reply)


def test_an_endless_body_is_cut_off(api: Api, token: str, cursor: Any) -> None:
    """A stream of 256 MiB is answered 413 long before its end, and not read to it."""
    sent = 0

    def pieces() -> Any:
        nonlocal sent
        first, *_ = Case(name="endless", status=413, is_chunked=True).pieces(token, "endless")
        yield first
        for _ in range(4096):
            yield b"10000\r\n" + b" " * 0x10000 + b"\r\n"
            sent += 0x10000

    before = counts(cursor)
    reply = exchange(api.address, pieces())
    assert reply.status == 413
    assert sent < 32 * 1024 * 1024
    assert counts(cursor) == before
