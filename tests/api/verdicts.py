"""What holds for every refusal, whatever was refused."""

import time
from collections.abc import Callable
from typing import Any

from tests.api.service import counts
from tests.api.wire import CLOSED, Reply

MOST_SECONDS = 0.2
TRIES = 10
BETWEEN_SECONDS = 0.2
PROBLEM = "application/problem+json"
MEMBERS = {"type", "title", "status", "detail"}
# What a stack trace, a query or a driver's message would show.
OURS_ALONE = (b"Traceback", b'File "', b".py", b"psycopg", b"sqlalchemy", b"SELECT ", b"INSERT ")


def assert_refused(
    cursor: Any, send: Callable[[], Reply], statuses: Callable[[int], bool]
) -> Reply:
    """Send a request: it is refused with such a status, promptly, and nothing is stored.

    An input that makes us slow is slow each time; a machine that is busy is not. So the fastest of
    some counts, and there is a second only after a slow first.
    """
    before = counts(cursor)
    reply = send()
    assert statuses(reply.status), f"{reply.status}: {reply.body[:500]!r}"
    assert not any(trace in reply.body for trace in OURS_ALONE), reply.body
    assert counts(cursor) == before
    seconds = [reply.seconds]
    while min(seconds) >= MOST_SECONDS and len(seconds) < TRIES:
        time.sleep(BETWEEN_SECONDS)
        seconds.append(send().seconds)
    assert min(seconds) < MOST_SECONDS, f"took {min(seconds):.3f} s"
    return reply


def assert_problem(reply: Reply) -> None:
    """Check that a refusal says what is wrong as RFC 9457 has it."""
    assert reply.media_type == PROBLEM
    problem = reply.json()
    assert problem.keys() >= MEMBERS
    assert problem.keys() <= MEMBERS | {"errors"}
    assert problem["status"] == reply.status
    assert problem["type"] == "about:blank" or problem["type"].startswith("urn:order-service:")
    assert problem["title"]
    assert problem["detail"]
    for fault in problem.get("errors", ()):
        assert fault.keys() in ({"pointer", "detail"}, {"parameter", "detail"})
        assert fault.get("pointer", "") == "" or fault["pointer"].startswith("/")


def is_client_error_or_closed(status: int) -> bool:
    """Say whether a status is none of ours: 4xx, or a connection closed without an answer."""
    return status == CLOSED or 400 <= status < 500
