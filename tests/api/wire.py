"""Requests to the byte: what an HTTP library would refuse to send, or would put right, is sent."""

import contextlib
import json
import socket
import time
from collections.abc import Iterable
from dataclasses import dataclass
from http.client import BadStatusLine, HTTPException, HTTPResponse
from typing import Any

TIMEOUT_SECONDS = 30.0
CLOSED = 0


@dataclass(frozen=True)
class Reply:
    """What came back; status 0 is a connection closed without an answer."""

    status: int
    headers: dict[str, str]
    body: bytes
    seconds: float

    @property
    def media_type(self) -> str:
        """Return the Content-Type."""
        return self.headers.get("content-type", "")

    def json(self) -> Any:
        """Return the body's value."""
        return json.loads(self.body)


def exchange(
    address: tuple[str, int], pieces: Iterable[bytes], *, method: str = "POST", half: bool = False
) -> Reply:
    """Send the pieces on a connection of their own and read one reply.

    With `half` our side of the connection is closed after the last piece.
    """
    began_at = time.monotonic()
    with socket.create_connection(address, TIMEOUT_SECONDS) as link:
        # Who answers before the end of a request may close while we still send.
        with contextlib.suppress(ConnectionError):
            for piece in pieces:
                link.sendall(piece)
            if half:
                link.shutdown(socket.SHUT_WR)
        response = HTTPResponse(link, method=method)
        try:
            response.begin()
            body = response.read()
        except (BadStatusLine, ConnectionError, HTTPException):
            return Reply(CLOSED, {}, b"", time.monotonic() - began_at)
        headers = {name.lower(): value for name, value in response.getheaders()}
        return Reply(response.status, headers, body, time.monotonic() - began_at)


def chunked(pieces: Iterable[bytes]) -> Iterable[bytes]:
    """Frame pieces as a chunked body."""
    for piece in pieces:
        yield b"%x\r\n%b\r\n" % (len(piece), piece)
    yield b"0\r\n\r\n"
