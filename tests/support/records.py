"""Records of orders, as any producer could write them."""

import json
from datetime import UTC, datetime
from typing import Any

Row = dict[str, Any]


def order(number: int | str, **changes: object) -> Row:
    """Return a record of an order, as the order service writes it but for its headers."""
    order_id = f"order-{number}"
    value = {
        "orderId": order_id,
        "userId": "user-7",
        "amount": "57000",
        "email": f"customer-{number}@example.com",
        **changes,
    }
    return {"key": order_id, "value": json.dumps(value)}


def orders(count: int) -> list[Row]:
    """Return records of so many orders, order-0 and up."""
    return [order(number) for number in range(count)]


def dated(record: Row, moment: datetime) -> Row:
    """Return a record as the order service dates it: by `ce_time` and by its own timestamp."""
    headers = {
        "ce_specversion": "1.0",
        "ce_type": "order.created.v1",
        "ce_time": moment.astimezone(UTC).isoformat(),
    }
    return {**record, "headers": headers, "timestamp": int(moment.timestamp() * 1000)}
