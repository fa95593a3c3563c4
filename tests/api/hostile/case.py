"""One hostile request and what must come of it."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tests.api.service import CANARY_ADDRESS
from tests.api.wire import chunked

ITEM: dict[str, Any] = {"sku": "TEA-GREEN-50", "quantity": 1}
ORDER: dict[str, Any] = {"email": CANARY_ADDRESS, "items": [ITEM]}
GOOD_BODY = json.dumps(ORDER).encode()
PIECE_BYTES = 16 * 1024
LABEL = 60


@dataclass(frozen=True, kw_only=True)
class Case:
    """A request that is good but for one thing.

    `headers` replace the good ones, None leaves one out; `status` is what the issue, the design or
    the RFC demands, several only where HTTP itself leaves the choice.
    """

    name: str
    status: int | Sequence[int]
    body: bytes = GOOD_BODY
    headers: Mapping[str, str | bytes | None] = field(default_factory=dict)
    method: str = "POST"
    path: str = "/v1/orders"
    is_chunked: bool = False

    @property
    def statuses(self) -> Sequence[int]:
        """Return the statuses that are right."""
        return (self.status,) if isinstance(self.status, int) else self.status

    def pieces(self, token: str, key: str) -> Iterable[bytes]:
        """Return the request as it goes over the wire."""
        headers: dict[str, str | bytes | None] = {
            "Host": "orders.example",
            "Connection": "close",
            "Authorization": f"Bearer {token}",
            "Content-Type": "application/json",
            "Idempotency-Key": key,
        }
        headers |= {"Transfer-Encoding": "chunked"} if self.is_chunked else _length(self.body)
        headers |= self.headers
        lines = [f"{self.method} {self.path} HTTP/1.1".encode()]
        lines += [
            b"%b: %b" % (name.encode(), value if isinstance(value, bytes) else value.encode())
            for name, value in headers.items()
            if value is not None
        ]
        yield b"\r\n".join([*lines, b"", b""])
        starts = range(0, len(self.body), PIECE_BYTES)
        pieces = (self.body[start : start + PIECE_BYTES] for start in starts)
        yield from chunked(pieces) if self.is_chunked else pieces


def without(name: str) -> bytes:
    """Return the good body without a member."""
    return json.dumps({key: value for key, value in ORDER.items() if key != name}).encode()


def with_(**changes: Any) -> bytes:
    """Return the good body with other members; lone surrogates become escapes."""
    return json.dumps({**ORDER, **changes}).encode()


def with_item(**changes: Any) -> bytes:
    """Return the good body with another item."""
    return with_(items=[{**ITEM, **changes}])


def raw(member: str) -> bytes:
    """Return the good body with one more member, as written here."""
    return GOOD_BODY.replace(b"{", b"{" + member.encode() + b", ", 1)


def raw_quantity(number: str) -> bytes:
    """Return the good body with the quantity as written here."""
    return GOOD_BODY.replace(b'"quantity": 1', b'"quantity": ' + number.encode())


def label(text: str) -> str:
    """Return a text as a test's name shows it."""
    shown = text if text.isprintable() and text.isascii() else ascii(text)
    return shown if len(shown) <= LABEL else f"{shown[:LABEL]}… {len(text)} characters"


def _length(body: bytes) -> dict[str, str | bytes | None]:
    return {"Content-Length": str(len(body))} if body else {}
