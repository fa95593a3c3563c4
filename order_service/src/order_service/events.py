"""An order as key, value and headers of order-created, encoded once.

CloudEvents 1.0, Kafka protocol binding, binary mode: the value is plain JSON, the attributes
travel as `ce_` headers. Field names and forms are those of shared_schemas/.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal
from uuid import UUID

AGGREGATE_TYPE = "order"
TYPE = "order.created.v1"
SOURCE = "/order-service"
DATA_SCHEMA = "urn:order-created:v1"


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


def order_created(order: PlacedOrder, *, event_id: UUID) -> Event:
    """Encode the fact that `order` was accepted."""
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
    encoded = json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()
    return Event(event_id, str(order.id), encoded, headers, order.ordered_at)
