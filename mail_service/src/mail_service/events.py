"""order-created as this service reads it.

The reader is tolerant: ids and amounts as string or integer, unknown fields and headers ignored,
no key needed, a record without `ce_` headers taken for order.created.v1. Nothing in a record ever
names a class.
"""

import json
import re
from collections.abc import Mapping, Sequence
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
AMOUNT = validate.Regexp(r"[0-9]{1,15}(\.[0-9]{1,4})?\Z")
# One plain addr-spec: nothing that a header or an SMTP command could take for more than one.
ADDRESS = validate.Regexp(
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


class _Amount(_StringOrInteger):
    """An exact decimal: a float is refused, it has lost digits on the way."""

    def _deserialize(self, value: Any, *args: Any, **kwargs: Any) -> Decimal:  # type: ignore[override]
        text = super()._deserialize(value, *args, **kwargs)
        AMOUNT(text)
        return Decimal(text)


class _ItemSchema(Schema):
    class Meta:
        unknown = EXCLUDE

    sku = fields.String(required=True, validate=validate.Length(1, 64))
    name = fields.String(required=True, validate=validate.Length(1, 200))
    quantity = fields.Integer(required=True, strict=True, validate=validate.Range(min=1))
    unit_price = _Amount(required=True, data_key="unitPrice")

    @post_load
    def make(self, data: dict[str, Any], **_: Any) -> Item:
        return Item(**data)


class _OrderCreatedSchema(Schema):
    class Meta:
        unknown = EXCLUDE

    order_id = _StringOrInteger(required=True, data_key="orderId", validate=ORDER_ID)
    user_id = _StringOrInteger(required=True, data_key="userId", validate=validate.Length(1, 255))
    amount = _Amount(required=True)
    email = fields.String(required=True, validate=[validate.Length(3, 254), ADDRESS])
    currency = fields.String(load_default=None, validate=validate.Regexp(r"[A-Z]{3}\Z"))
    locale = fields.String(load_default=None, validate=validate.Length(2, 35))
    ordered_at = fields.AwareDateTime(
        load_default=None, data_key="orderedAt", format="iso", default_timezone=UTC
    )
    items = fields.List(fields.Nested(_ItemSchema), load_default=())

    @post_load
    def make(self, data: dict[str, Any], **_: Any) -> OrderCreated:
        del data["user_id"]
        return OrderCreated(**data)


_SCHEMA = _OrderCreatedSchema()


def read(record: Record) -> OrderCreated | None:
    """Return the record's event; None for a record that is not for us.

    Raises UnreadableRecord with the reason, which holds no value of the record.
    """
    if record.value is None or not _is_for_us(_attributes(record)):
        return None
    event = parse(record.value)
    if record.key and record.key != event.order_id.encode():
        raise UnreadableRecord("the key contradicts orderId")
    return event


def parse(value: bytes) -> OrderCreated:
    """Return the event in a record's value; raise UnreadableRecord with the reason."""
    try:
        data = json.loads(value.decode("utf-8"), parse_constant=_refuse_constant)
        event: OrderCreated = _SCHEMA.load(data)
    except ValidationError as error:
        names = ", ".join(sorted(str(name) for name in error.normalized_messages()))
        raise UnreadableRecord(f"not an OrderCreatedEvent: {names}") from error
    except (ValueError, RecursionError) as error:
        raise UnreadableRecord(f"not JSON: {type(error).__name__}") from error
    return event


def occurred_at(record: Record) -> datetime:
    """Return when the event happened: `ce_time`, else the record's own timestamp."""
    try:
        at = datetime.fromisoformat(_attributes(record).get("ce_time", ""))
        # Without a zone it says nothing; far offsets and years PostgreSQL or Python cannot carry.
        moment = at.astimezone(UTC) if at.tzinfo else record.at
    except (ValueError, OverflowError):
        return record.at
    return moment if FIRST_YEAR <= moment.year < LAST_YEAR else record.at


def _attributes(record: Record) -> Mapping[str, str]:
    return {
        name: value.decode("utf-8", errors="replace")
        for name, value in record.headers
        if name.startswith("ce_")
    }


def _is_for_us(attributes: Mapping[str, str]) -> bool:
    kind = attributes.get("ce_type", TYPE)
    if kind != TYPE and TYPE_OF_ANY_VERSION.fullmatch(kind):
        raise UnreadableRecord("a major version this release does not know")
    return kind == TYPE


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(name)
