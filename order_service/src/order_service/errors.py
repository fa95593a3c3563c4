"""The closed list of what can go wrong for a client, each with its HTTP status.

    Problem
    ├── NotAuthenticated         401
    ├── NotAllowed               403
    ├── OrderNotFound            404
    ├── IdempotencyKeyRejected   400
    ├── RequestInFlight          409  Retry-After
    ├── IdempotencyKeyReused     422
    ├── PriceChanged             409
    ├── ProductUnknown           422
    ├── TooManyOrders            429  Retry-After
    └── TemporarilyUnavailable   503  Retry-After

Anything else is a fault of ours: 500, logged.
"""

from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import ClassVar


class Problem(Exception):
    """An outcome the client is told of as application/problem+json (RFC 9457)."""

    status: ClassVar[HTTPStatus]
    slug: ClassVar[str]

    def __init__(
        self,
        detail: str,
        *,
        errors: Sequence[Mapping[str, str]] = (),
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(detail)
        self.detail = detail
        self.errors = errors
        self.headers = headers or {}


class NotAuthenticated(Problem):
    """No bearer token, or one that proves nothing."""

    status, slug = HTTPStatus.UNAUTHORIZED, "not-authenticated"


class NotAllowed(Problem):
    """The token lacks the scope."""

    status, slug = HTTPStatus.FORBIDDEN, "not-allowed"


class OrderNotFound(Problem):
    """No such order, or another user's: the two are not told apart."""

    status, slug = HTTPStatus.NOT_FOUND, "order-not-found"


class IdempotencyKeyRejected(Problem):
    """The Idempotency-Key is missing or not 1 to 255 printable ASCII characters."""

    status, slug = HTTPStatus.BAD_REQUEST, "idempotency-key-rejected"


class RequestInFlight(Problem):
    """Another request with the same key is being worked on."""

    status, slug = HTTPStatus.CONFLICT, "request-in-flight"


class IdempotencyKeyReused(Problem):
    """The key came before, with another payload."""

    status, slug = HTTPStatus.UNPROCESSABLE_ENTITY, "idempotency-key-reused"


class PriceChanged(Problem):
    """The total is not what the client expected."""

    status, slug = HTTPStatus.CONFLICT, "price-changed"


class ProductUnknown(Problem):
    """An item names a product that is not for sale."""

    status, slug = HTTPStatus.UNPROCESSABLE_ENTITY, "product-unknown"


class TooManyOrders(Problem):
    """The user or the recipient has had as many orders as are allowed for now."""

    status, slug = HTTPStatus.TOO_MANY_REQUESTS, "too-many-orders"


class TemporarilyUnavailable(Problem):
    """The database did not answer; with the same key the client may try again."""

    status, slug = HTTPStatus.SERVICE_UNAVAILABLE, "temporarily-unavailable"
