"""What the OpenAPI document says beyond routes and schemas: names, headers, examples, problems."""

from copy import deepcopy
from datetime import UTC, datetime
from http import HTTPStatus
from typing import Any
from uuid import UUID

from flask import Flask, Response, json
from flask_smorest import Api
from werkzeug.http import HTTP_STATUS_CODES

from order_service import errors, idempotency
from order_service.errors import Problem
from order_service.schemas import Cursor, ProblemSchema

Document = dict[str, Any]

PROBLEM = "application/problem+json"
# Bare or in quotes, exactly as idempotency.parse_key takes it: quoted; bare; bare after a quote.
KEY_PATTERN = (
    r'^(?:"[!-~](?:[ -~]{0,253}[!-~])?"|[!#-~](?:[ -~]{0,253}[!-~])?|"(?:[ -~]{0,253}[!#-~])?)$'
)

ORDER_ID = "01936f6e-7c1a-7000-8000-000000000001"
REQUEST = {"email": "minji@example.com", "items": [{"sku": "TEA-GREEN-50", "quantity": 2}]}
ORDER = {
    "id": ORDER_ID,
    "userId": "minji",
    "email": "minji@example.com",
    "locale": "ko",
    "currency": "KRW",
    "amount": "24000",
    "orderedAt": "2026-11-21T09:00:00.123456Z",
    "items": [
        {"sku": "TEA-GREEN-50", "name": "보성 녹차 50g", "quantity": 2, "unitPrice": "12000"}
    ],
}
TRACKED_ORDER = {**ORDER, "event": {"state": "COMPLETED", "partition": 1, "offset": 4711}}
NEXT_CURSOR = Cursor.of(datetime(2026, 11, 21, 9, 0, 0, 123456, tzinfo=UTC), UUID(ORDER_ID))
PRODUCT = {
    "sku": "TEA-GREEN-50",
    "names": {"ko": "보성 녹차 50g", "en": "Boseong green tea 50 g"},
    "unitPrice": "12000",
    "currency": "KRW",
}


def problem(
    status: HTTPStatus, kind: str, detail: str, faults: tuple[tuple[str, str], ...] = ()
) -> Document:
    """Return a problem as it goes over the wire."""
    told = {"type": kind, "title": HTTP_STATUS_CODES[status], "status": int(status)}
    errors = [
        {"pointer" if where.startswith("/") else "parameter": where, "detail": what}
        for where, what in faults
    ]
    return {**told, "detail": detail} | ({"errors": errors} if errors else {})


def _ours(kind: type[Problem], detail: str, *faults: tuple[str, str]) -> tuple[str, Document]:
    value = problem(kind.status, f"urn:order-service:problem:{kind.slug}", detail, faults)
    return kind.slug, {"summary": kind.__doc__, "value": value}


def _plain(
    name: str, status: HTTPStatus, summary: str, detail: str, *faults: tuple[str, str]
) -> tuple[str, Document]:
    return name, {"summary": summary, "value": problem(status, "about:blank", detail, faults)}


PROBLEMS: dict[str, Document] = dict(
    [
        _ours(errors.NotAuthenticated, "A bearer token is needed."),
        _ours(errors.NotAllowed, "The token lacks the scope orders:write."),
        _ours(errors.OrderNotFound, "There is no such order."),
        _ours(
            errors.IdempotencyKeyRejected,
            "Send an Idempotency-Key header of 1 to 255 printable ASCII characters.",
        ),
        _ours(errors.RequestInFlight, "A request with this Idempotency-Key is being worked on."),
        _ours(
            errors.IdempotencyKeyReused, "This Idempotency-Key came before with another payload."
        ),
        _ours(errors.PriceChanged, "The order comes to 24000 KRW, not to the expected amount."),
        _ours(
            errors.ProductUnknown,
            "An item names a product that is not for sale.",
            ("/items/0/sku", "TEA-BLUE-50 is not for sale."),
        ),
        _ours(errors.TooManyOrders, "Too many orders in a minute."),
        _ours(
            errors.TemporarilyUnavailable,
            "The database did not answer in time. With the same Idempotency-Key it is safe to "
            "send the order again.",
        ),
        _plain(
            "body-not-json",
            HTTPStatus.BAD_REQUEST,
            "The body is not JSON in UTF-8, or nested too deep.",
            "The body is not JSON.",
        ),
        _plain(
            "not-an-id",
            HTTPStatus.NOT_FOUND,
            "The address does not end in a UUID.",
            "The requested URL was not found on the server. If you entered the URL manually please "
            "check your spelling and try again.",
        ),
        _plain(
            "body-too-large",
            HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
            "The body is larger than 64 KiB.",
            "The data value transmitted exceeds the capacity limit.",
        ),
        _plain(
            "not-application-json",
            HTTPStatus.UNSUPPORTED_MEDIA_TYPE,
            "The body is something else than application/json.",
            "Send application/json in UTF-8, uncompressed.",
        ),
        _plain(
            "body-not-as-described",
            HTTPStatus.UNPROCESSABLE_ENTITY,
            "Members are missing, unknown or not as described; the key is not used up.",
            "The request is not as described.",
            ("/email", "Not a valid email address."),
            (
                "/items/0/quantity",
                "Must be greater than or equal to 1 and less than or equal to 999.",
            ),
        ),
        _plain(
            "query-not-as-described",
            HTTPStatus.UNPROCESSABLE_ENTITY,
            "A parameter of the query is not as described.",
            "The request is not as described.",
            (
                "limit",
                "Must be greater than or equal to 1 and less than or equal to 100.",
            ),
        ),
        _plain(
            "internal-error",
            HTTPStatus.INTERNAL_SERVER_ERROR,
            "A fault of ours; with the same Idempotency-Key it is safe to send an order again.",
            "The server encountered an internal error and was unable to complete your request. "
            "Either the server is overloaded or there is an error in the application.",
        ),
    ]
)

HEADERS: dict[str, Document] = {
    "X-Request-ID": {
        "description": "What our log calls this request: yours, if it was sent and is 1 to 128 "
        "letters, digits, dots, underscores or hyphens, else one of ours.",
        "schema": {"type": "string"},
    },
    "Location": {
        "description": "Where the order is.",
        "required": True,
        "schema": {"type": "string", "format": "uri-reference"},
        "example": f"/v1/orders/{ORDER_ID}",
    },
    "Idempotent-Replayed": {
        "description": "There when the key came before: the order is the one placed then.",
        "schema": {"type": "string", "const": "true"},
    },
    "ETag": {
        "description": "Changes with the state of the event.",
        "schema": {"type": "string"},
        "example": '"5f3c0f0a3c1b1a0f5d9f3f2c7d4b6a8e9c0d1e2f"',
    },
    "Link": {
        "description": "The next page (RFC 8288); absent on the last one.",
        "schema": {"type": "string"},
        "example": f'</v1/orders?limit=20&cursor={NEXT_CURSOR}>; rel="next"',
    },
    "Retry-After": {
        "description": "In how many seconds it may go better.",
        "schema": {"type": "integer", "minimum": 1},
    },
    "WWW-Authenticate": {
        "description": "RFC 6750: what is wrong with the token, or which scope it lacks.",
        "required": True,
        "schema": {"type": "string"},
        "example": 'Bearer realm="order-service", error="invalid_token"',
    },
}

HEADERS_OF_PROBLEMS = {
    HTTPStatus.UNAUTHORIZED: "WWW-Authenticate",
    HTTPStatus.FORBIDDEN: "WWW-Authenticate",
    HTTPStatus.CONFLICT: "Retry-After",
    HTTPStatus.TOO_MANY_REQUESTS: "Retry-After",
    HTTPStatus.SERVICE_UNAVAILABLE: "Retry-After",
}

IDEMPOTENCY_KEY = {
    "name": "Idempotency-Key",
    "in": "header",
    "required": True,
    "description": "Makes it safe to send the order again: the same key, the same order. 1 to 255 "
    "printable ASCII characters, bare or in double quotes; best a fresh UUID for every order. It "
    "counts for this user and this operation, is used up when an order is placed, and is kept "
    f"{idempotency.KEPT_HOURS} hours from then on. Within them the same body is answered with the "
    "same 201 and `Idempotent-Replayed: true`, another body with 422; while the first request is "
    "under way the answer is 409.",
    "schema": {"type": "string", "minLength": 1, "maxLength": 257, "pattern": KEY_PATTERN},
    "example": "8e03978e-40d5-43e8-bc93-6894a57f9324",
}


def _operation(
    name: str,
    *,
    tag: str,
    scope: str | None,
    answers: dict[int, Document],
    problems: tuple[str, ...],
) -> Document:
    """Return what smorest cannot know of an operation: its names, headers, examples, problems."""
    token = ("not-authenticated", "not-allowed") if scope else ()
    refused: dict[int, Document] = {}
    for slug in (*token, *problems, "internal-error", "temporarily-unavailable"):
        example = PROBLEMS[slug]
        status = example["value"]["status"]
        extra = [HEADERS_OF_PROBLEMS[status]] if status in HEADERS_OF_PROBLEMS else []
        response = refused.setdefault(
            status, {"description": "", "headers": _headers(*extra), "content": {}}
        )
        response["description"] = f"{response['description']} {example['summary']}".strip()
        media = response["content"].setdefault(PROBLEM, {"schema": ProblemSchema, "examples": {}})
        media["examples"][slug] = {"$ref": f"#/components/examples/{slug}"}
    security = {"security": [{"bearerAuth": [scope]}]} if scope else {}
    return {"operationId": name, "tags": [tag], **security, "responses": answers | refused}


def _answer(description: str, example: Document, *headers: str) -> Document:
    return {
        "description": description,
        "headers": _headers(*headers),
        "content": {"application/json": {"example": example}},
    }


def _headers(*names: str) -> Document:
    return {name: {"$ref": f"#/components/headers/{name}"} for name in (*names, "X-Request-ID")}


PLACE_ORDER = _operation(
    "placeOrder",
    tag="orders",
    scope="orders:write",
    answers={
        201: _answer("The order, as it was placed.", ORDER, "Location", "Idempotent-Replayed")
    },
    problems=(
        "idempotency-key-rejected",
        "body-not-json",
        "request-in-flight",
        "price-changed",
        "body-too-large",
        "not-application-json",
        "body-not-as-described",
        "product-unknown",
        "idempotency-key-reused",
        "too-many-orders",
    ),
) | {
    "parameters": [IDEMPOTENCY_KEY],
    "requestBody": {
        "content": {
            "application/json": {
                "examples": {
                    "tea": {"summary": "Two packets of green tea", "value": REQUEST},
                    "expected-amount": {
                        "summary": "The same, in English, for 24,000 won or not at all",
                        "value": {**REQUEST, "locale": "en", "expectedAmount": "24000"},
                    },
                }
            }
        }
    },
}
LIST_ORDERS = _operation(
    "listOrders",
    tag="orders",
    scope="orders:read",
    answers={
        200: _answer(
            "A page of my orders.", {"items": [TRACKED_ORDER], "nextCursor": NEXT_CURSOR}, "Link"
        )
    },
    problems=("query-not-as-described",),
)
GET_ORDER = _operation(
    "getOrder",
    tag="orders",
    scope="orders:read",
    answers={
        200: _answer("The order and the state of its event.", TRACKED_ORDER, "ETag"),
        304: {"description": "Nothing has changed.", "headers": _headers("ETag")},
    },
    problems=("order-not-found", "not-an-id"),
)
LIST_PRODUCTS = _operation(
    "listProducts",
    tag="products",
    scope=None,
    answers={200: _answer("The catalogue.", {"items": [PRODUCT]})},
    problems=(),
)

OPTIONS: Document = {
    "info": {
        "description": "Takes orders and tells the topic `order-created` of each.\n\n"
        "Whatever goes wrong is told as `application/problem+json` (RFC 9457); `type` says which "
        "problem it is, `errors` where in the body it lies. Money is a decimal string. Times are "
        "UTC. Answers may gain members: ignore those you do not know.",
        "license": {"name": "MIT", "identifier": "MIT"},
    },
    "tags": [
        {"name": "orders", "description": "Mine; another user's do not exist"},
        {"name": "products", "description": "What can be ordered, open to all"},
    ],
    "components": {
        "securitySchemes": {
            "bearerAuth": {
                "type": "http",
                "scheme": "bearer",
                "bearerFormat": "JWT",
                "description": "A token of the configured issuer whose `scope` has `orders:write` "
                "to order and `orders:read` to look. For development: "
                "`order-service token --user minji`.",
            }
        },
        "headers": HEADERS,
        "examples": PROBLEMS,
    },
}


class DescribedApi(Api):
    """flask-smorest, whose document names every answer an operation has."""

    ERROR_SCHEMA = ProblemSchema
    DEFAULT_ERROR_RESPONSE_NAME = None

    def __init__(self, app: Flask) -> None:
        app.config.update(
            API_TITLE="Order service",
            API_VERSION="v1",
            OPENAPI_VERSION="3.1.0",
            OPENAPI_URL_PREFIX="/",
            OPENAPI_JSON_PATH="openapi.json",
            API_SPEC_OPTIONS=deepcopy(OPTIONS),  # apispec writes into it
        )
        super().__init__(app)

    def document(self) -> str:
        """Return the document as it is served and committed."""
        parts = self.spec.to_dict()
        ordered = {name: parts[name] for name in ("openapi", "info", "tags", "paths", "components")}
        return json.dumps(ordered, indent=2, sort_keys=False, ensure_ascii=False) + "\n"

    def _openapi_json(self) -> Response:
        return Response(self.document(), mimetype="application/json")

    def _register_pagination_header(self) -> None:
        """Leave out smorest's own way of pages."""
