"""An order as key, value and headers of order-created, encoded once.

CloudEvents 1.0, Kafka protocol binding, binary mode: the value is plain JSON, the attributes
travel as `ce_` headers. Field names and forms are those of shared_schemas/.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any
from uuid import UUID

AGGREGATE_TYPE = "order"
TYPE = "order.created.v1"
SOURCE = "/order-service"
DATA_SCHEMA = "urn:order-created:v1"
MASKED_CHARACTERS = 500
# Stands where an address was; no mail can reach it (RFC 2606, RFC 6761).
ERASED_ADDRESS = "erased@erased.invalid"


@dataclass(frozen=True, slots=True)
class Item:
    """One item of an order."""

    sku: str
    name: str
    quantity: int
    unit_price: Decimal


@dataclass(frozen=True, slots=True)
class PlacedOrder:
    """An accepted order, whole."""

    id: UUID
    user_id: str
    email: str
    locale: str
    currency: str
    amount: Decimal
    ordered_at: datetime
    items: Sequence[Item]


@dataclass(frozen=True, slots=True)
class Event:
    """What an outbox row keeps; `key` is the order id, `value` UTF-8 JSON."""

    id: UUID
    key: str
    value: bytes
    headers: dict[str, str]
    occurred_at: datetime


def instant(moment: datetime) -> str:
    """Write a moment as RFC 3339 in UTC, with microseconds."""
    return moment.astimezone(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")


def order_created(order: PlacedOrder, *, event_id: UUID, traceparent: str | None = None) -> Event:
    """Encode the fact that `order` was accepted; a trace goes on with its event (W3C)."""
    ordered_at = instant(order.ordered_at)
    value = {
        "orderId": str(order.id),
        "userId": order.user_id,
        "amount": f"{order.amount:f}",
        "email": order.email,
        "currency": order.currency,
        "locale": order.locale,
        "orderedAt": ordered_at,
        "items": [
            {
                "sku": item.sku,
                "name": item.name,
                "quantity": item.quantity,
                "unitPrice": f"{item.unit_price:f}",
            }
            for item in order.items
        ],
    }
    headers = {
        "ce_specversion": "1.0",
        "ce_id": str(event_id),
        "ce_source": SOURCE,
        "ce_type": TYPE,
        "ce_time": ordered_at,
        "ce_subject": str(order.id),
        "ce_dataschema": DATA_SCHEMA,
        "content-type": "application/json",
    }
    if traceparent is not None:
        headers["traceparent"] = traceparent
    return Event(event_id, str(order.id), _encoded(value), headers, order.ordered_at)


def erased(value: bytes) -> bytes:
    """Return an event's value as it would be had the order come with the erased address."""
    return _encoded(json.loads(value) | {"email": ERASED_ADDRESS})


def _encoded(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()


def id_in(headers: Mapping[str, str]) -> UUID | None:
    """Return the id of the event a record carries, or None when it is not one of ours."""
    return _uuid_in(headers, "ce_id")


def order_id_in(headers: Mapping[str, str]) -> UUID | None:
    """Return the order whose event a record carries, or None when it is not one of ours."""
    return _uuid_in(headers, "ce_subject")


def _uuid_in(headers: Mapping[str, str], name: str) -> UUID | None:
    if headers.get("ce_source") != SOURCE:
        return None
    try:
        return UUID(headers.get(name, ""))
    except ValueError:
        return None


def masked(value: bytes | None) -> str:
    """Return a record's value for people to look at, without its address; at most 500 characters.

    What is not JSON is told of by its length only.
    """
    if value is None:
        return "null"
    try:
        parsed = json.loads(value)
    except (ValueError, RecursionError):
        return f"{len(value)} bytes that are not JSON"
    if isinstance(parsed, dict) and isinstance(parsed.get("email"), str):
        parsed["email"] = masked_address(parsed["email"])
    text = json.dumps(parsed, ensure_ascii=False, separators=(",", ":"))[:MASKED_CHARACTERS]
    # JSON can name halves of characters, which no terminal takes.
    return text.encode(errors="replace").decode()


def masked_address(address: str) -> str:
    """Return what people may see of an address: how its two parts begin."""
    local, _, domain = address.partition("@")
    return f"{local[:1]}***@{domain[:1]}***"
