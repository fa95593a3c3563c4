"""order-created as this service reads it.

The reader is tolerant: ids and amounts as string or integer, unknown fields and headers ignored,
no key needed, a record without `ce_` headers taken for order.created.v1. Nothing in a record ever
names a class.
"""

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any, NoReturn

from marshmallow import EXCLUDE, Schema, ValidationError, fields, post_load, validate

from mail_service.kafka import Record

TYPE = "order.created.v1"
TYPE_OF_ANY_VERSION = re.compile(r"order\.created\.v\d+")
# Time can be added to what is before the last year; Python's ends with 9999.
FIRST_YEAR, LAST_YEAR = 1970, 9000
ORDER_ID = validate.Regexp(r"(?=.{1,64}\Z)[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*\Z")
# Kafka's own default for a record; one that was small when it was compressed may be any size.
MOST_EVENT_BYTES = 1_000_000
AMOUNT = re.compile(r"[0-9]{1,15}(\.[0-9]{1,4})?\Z")
# PostgreSQL's text takes no NUL, and no mail shows one.
SKU = re.compile(r"[^\0]{1,64}\Z")
NAME = re.compile(r"[^\0]{1,200}\Z")
# One plain addr-spec: nothing that a header or an SMTP command could take for more than one.
ADDRESS = validate.Regexp(
    r"(?=.{3,254}\Z)"
    r"[^@\s,;:<>()\[\]\"\\\x00-\x1f\x7f]+@[^@\s,;:<>()\[\]\"\\\x00-\x1f\x7f]+\Z"
)


class UnreadableRecord(Exception):
    """The record can never become a mail: it becomes a dead letter."""


@dataclass(frozen=True, slots=True)
class Item:
    """One line of the order."""

    sku: str
    name: str
    quantity: int
    unit_price: Decimal


@dataclass(frozen=True, slots=True)
class OrderCreated:
    """The fact, as far as the mail needs it; what is None was not said."""

    order_id: str
    email: str
    amount: Decimal
    currency: str | None
    locale: str | None
    ordered_at: datetime | None
    items: Sequence[Item]


class _StringOrInteger(fields.Field[str]):
    """Text, however the producer's language writes a number."""

    def _deserialize(self, value: Any, *_: Any, **__: Any) -> str:
        if isinstance(value, bool) or not isinstance(value, str | int):
            raise ValidationError("Not a string or an integer.")
        return str(value)


class _Amount(fields.Field[Decimal]):
    """An exact decimal."""

    def _deserialize(self, value: Any, *_: Any, **__: Any) -> Decimal:
        return _exact(value)


class _Items(fields.Field[Sequence[Item]]):
    """The order's lines, read by hand: a schema of their own took half of an event's time."""

    def _deserialize(self, value: Any, *_: Any, **__: Any) -> Sequence[Item]:
        if not isinstance(value, list):
            raise ValidationError("Not a list.")
        return [_item(line) for line in value]


class _OrderCreatedSchema(Schema):
    class Meta:
        unknown = EXCLUDE

    order_id = _StringOrInteger(required=True, data_key="orderId", validate=ORDER_ID)
    user_id = _StringOrInteger(required=True, data_key="userId", validate=validate.Length(1, 255))
    amount = _Amount(required=True)
    email = fields.String(required=True, validate=ADDRESS)
    currency = fields.String(load_default=None, validate=validate.Regexp(r"[A-Z]{3}\Z"))
    locale = fields.String(load_default=None, validate=validate.Length(2, 35))
    ordered_at = fields.AwareDateTime(
        load_default=None, data_key="orderedAt", format="iso", default_timezone=UTC
    )
    items = _Items(load_default=())

    @post_load
    def make(self, data: dict[str, Any], **_: Any) -> OrderCreated:
        del data["user_id"]
        return OrderCreated(**data)


_SCHEMA = _OrderCreatedSchema()


def read(record: Record) -> OrderCreated | None:
    """Return the record's event; None for a record that is not for us.

    Raises UnreadableRecord with the reason, which holds no value of the record.
    """
    if record.value is None or not _is_for_us(_attribute(record, "ce_type", TYPE)):
        return None
    event = parse(record.value)
    if record.key and record.key != event.order_id.encode():
        raise UnreadableRecord("the key contradicts orderId")
    return event


def parse(value: bytes) -> OrderCreated:
    """Return the event in a record's value; raise UnreadableRecord with the reason."""
    if len(value) > MOST_EVENT_BYTES:
        raise UnreadableRecord("longer than a megabyte")
    try:
        event: OrderCreated = _SCHEMA.load(_JSON.decode(value.decode("utf-8")))
    except ValidationError as error:
        names = ", ".join(sorted(str(name) for name in error.normalized_messages()))
        raise UnreadableRecord(f"not an OrderCreatedEvent: {names}") from error
    except (ValueError, RecursionError) as error:
        raise UnreadableRecord(f"not JSON: {type(error).__name__}") from error
    return event


def occurred_at(record: Record) -> datetime:
    """Return when the event happened: `ce_time`, else the record's own timestamp."""
    try:
        at = datetime.fromisoformat(_attribute(record, "ce_time", ""))
        # Without a zone it says nothing; far offsets and years PostgreSQL or Python cannot carry.
        moment = at.astimezone(UTC) if at.tzinfo else record.at
    except (ValueError, OverflowError):
        return record.at
    return moment if FIRST_YEAR <= moment.year < LAST_YEAR else record.at


def _item(line: Any) -> Item:
    """Return a line of an order; raise ValidationError."""
    try:
        sku, name, quantity = line["sku"], line["name"], line["quantity"]
        unit_price = _exact(line["unitPrice"])
        is_good = SKU.match(sku) and NAME.match(name) and type(quantity) is int and quantity > 0
    except (KeyError, TypeError) as error:
        raise ValidationError("Not an item.") from error
    if not is_good:
        raise ValidationError("Not an item.")
    return Item(sku, name, quantity, unit_price)


def _exact(value: Any) -> Decimal:
    """Return an amount; raise ValidationError for a float too, which has lost digits on the way."""
    if not isinstance(value, str | int) or not AMOUNT.match(text := str(value)):
        raise ValidationError("Not an exact amount.")
    return Decimal(text)


def _attribute(record: Record, wanted: str, otherwise: str) -> str:
    """Return a header's text, of several the last one's."""
    for name, value in reversed(record.headers):
        if name == wanted:
            return value.decode("utf-8", errors="replace")
    return otherwise


def _is_for_us(kind: str) -> bool:
    if kind != TYPE and TYPE_OF_ANY_VERSION.fullmatch(kind):
        raise UnreadableRecord("a major version this release does not know")
    return kind == TYPE


def _once_each(members: list[tuple[str, Any]]) -> dict[str, Any]:
    """Refuse a member that comes twice: readers differ in which of them counts (RFC 8259 §4)."""
    found = dict(members)
    if len(found) != len(members):
        raise ValueError("a member comes twice")
    return found


def _finite(number: str) -> float:
    value = float(number)
    if not math.isfinite(value):
        raise ValueError(number)
    return value


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(name)


_JSON = json.JSONDecoder(
    object_pairs_hook=_once_each, parse_constant=_refuse_constant, parse_float=_finite
)
