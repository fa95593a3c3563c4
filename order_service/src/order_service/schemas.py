"""What a client may say and will hear."""

import re
import unicodedata
from base64 import urlsafe_b64decode, urlsafe_b64encode
from datetime import UTC, datetime
from decimal import Decimal
from functools import lru_cache
from typing import Any
from uuid import UUID

from email_validator import EmailNotValidError, validate_email
from flask_smorest.error_handler import ErrorSchema
from marshmallow import EXCLUDE, Schema, ValidationError, fields, validate

from order_service.events import ERASED_ADDRESS, instant

MAX_ITEMS = 50
MAX_QUANTITY = 999
MAX_PAGE = 100
MAX_ADDRESS = 254
LOCALES = ("ko", "en")
# What validate_email gives back as it is. Then only the domain is to be judged, and many addresses
# have the same.
PLAIN_LOCAL_PART = re.compile(r"(?=.{1,64}\Z)[a-z0-9]+(?:[._+-][a-z0-9]+)*")
REMEMBERED_DOMAINS = 1_024
# As the names of their letters begin; Latin is among both.
WRITTEN_TOGETHER = (
    frozenset({"LATIN", "HANGUL", "CJK", "IDEOGRAPHIC"}),
    frozenset({"LATIN", "HIRAGANA", "KATAKANA", "KATAKANA-HIRAGANA", "CJK", "IDEOGRAPHIC"}),
)
SKU = validate.Regexp(r"[A-Za-z0-9._-]{1,64}\Z", error="Not a sku.")
AMOUNT = validate.Regexp(r"[0-9]{1,15}(\.[0-9]{1,4})?\Z", error="Not a decimal string.")
# The same for readers of the OpenAPI document, whose regular expressions know no \Z.
SKU_PATTERN = "^[A-Za-z0-9._-]{1,64}$"
AMOUNT_PATTERN = r"^[0-9]{1,15}(\.[0-9]{1,4})?$"
TOTAL = {
    "pattern": r"^[0-9]+(\.[0-9]+)?$",
    "description": "A decimal string with the digits its currency has.",
}
CURRENCY = {"pattern": "^[A-Z]{3}$", "description": "ISO 4217"}


class Email(fields.String):
    """One address, as RFC 5321 has it, normalised."""

    def _deserialize(self, value: Any, *args: Any, **kwargs: Any) -> str:
        text = super()._deserialize(value, *args, **kwargs)
        try:
            local, _, domain = text.partition("@")
            if PLAIN_LOCAL_PART.fullmatch(local) and text.isascii() and len(text) <= MAX_ADDRESS:
                address = f"{local}@{_normalised_domain(domain)}"
            else:
                address = validate_email(text, check_deliverability=False, strict=True).normalized
        except EmailNotValidError as error:
            raise ValidationError("Not a valid email address.") from error
        if not address.isascii() and _mixes_scripts(address.rpartition("@")[2]):
            raise ValidationError("Not a valid email address: its domain mixes scripts.")
        return address


def _mixes_scripts(domain: str) -> bool:
    """Say whether a label is written in letters that no language writes together (UTS 39)."""
    for label in domain.split("."):
        scripts = {
            unicodedata.name(letter, "").partition(" ")[0] for letter in label if letter.isalpha()
        }
        if len(scripts) > 1 and not any(scripts <= together for together in WRITTEN_TOGETHER):
            return True
    return False


@lru_cache(REMEMBERED_DOMAINS)
def _normalised_domain(domain: str) -> str:
    return validate_email(f"a@{domain}", check_deliverability=False, strict=True).domain


class Money(fields.String):
    """A decimal string with the digits its currency has."""

    def _serialize(self, value: Any, *_: Any, **__: Any) -> str | None:
        return None if value is None else f"{value:f}"

    def _deserialize(self, value: Any, *args: Any, **kwargs: Any) -> Decimal:  # type: ignore[override]
        text = super()._deserialize(value, *args, **kwargs)
        AMOUNT(text)
        return Decimal(text)


class Instant(fields.String):
    """A moment in RFC 3339, UTC."""

    def _serialize(self, value: Any, *_: Any, **__: Any) -> str | None:
        return None if value is None else instant(value)


class Answer(Schema):
    """What a client hears: every member is there, and a later release may add some."""

    class Meta:  # noqa: D106 - it opens the documented schema
        unknown = EXCLUDE

    def on_bind_field(self, _: str, field_obj: fields.Field[Any]) -> None:
        """Document the member as one that is always there."""
        field_obj.required = True


class ShortList(fields.List[Any]):
    """A list whose length is looked at before its members are."""

    def _deserialize(self, value: Any, *args: Any, **kwargs: Any) -> list[Any]:
        if isinstance(value, list) and not 1 <= len(value) <= MAX_ITEMS:
            raise ValidationError(f"Length must be between 1 and {MAX_ITEMS}.")
        return super()._deserialize(value, *args, **kwargs)


class RequestedItemSchema(Schema):
    """How many of which product; prices are the shop's to name."""

    sku = fields.String(required=True, validate=SKU, metadata={"pattern": SKU_PATTERN})
    quantity = fields.Integer(
        required=True, strict=True, validate=validate.Range(min=1, max=MAX_QUANTITY)
    )


class OrderRequestSchema(Schema):
    """The body of POST /v1/orders."""

    email = Email(
        required=True,
        validate=validate.Length(max=MAX_ADDRESS),
        metadata={"format": "email", "description": "Where the confirmation goes."},
    )
    locale = fields.String(
        load_default="ko",
        validate=validate.OneOf(LOCALES),
        metadata={"description": "The language of names and of the confirmation."},
    )
    items = ShortList(
        fields.Nested(RequestedItemSchema),
        required=True,
        validate=validate.Length(min=1, max=MAX_ITEMS),
    )
    expected_amount = Money(
        data_key="expectedAmount",
        load_default=None,
        metadata={
            "pattern": AMOUNT_PATTERN,
            "description": "The total you expect; when it is another, nothing is ordered.",
        },
    )


class Cursor(fields.String):
    """Where the next page begins, opaque to clients: the last order's moment and id."""

    def _deserialize(self, value: Any, *args: Any, **kwargs: Any) -> tuple[datetime, UUID]:  # type: ignore[override]
        text = super()._deserialize(value, *args, **kwargs)
        try:
            moment, _, order_id = urlsafe_b64decode(text.encode("ascii")).decode().partition(" ")
            return datetime.fromisoformat(moment).astimezone(UTC), UUID(order_id)
        except (ValueError, OverflowError) as error:
            raise ValidationError("Not a cursor of ours.") from error

    @staticmethod
    def of(at: datetime, order_id: UUID) -> str:
        """Return the cursor behind this order."""
        return urlsafe_b64encode(f"{instant(at)} {order_id}".encode()).decode()


class OrderListArgumentsSchema(Schema):
    """The query of GET /v1/orders."""

    limit = fields.Integer(
        load_default=20,
        validate=validate.Range(min=1, max=MAX_PAGE),
        metadata={"description": "How many orders a page has at most."},
    )
    cursor = Cursor(metadata={"description": "The `nextCursor` of the page before."})


class ItemSchema(Answer):
    """A line of an order, as it was when the order was placed."""

    sku = fields.String()
    name = fields.String()
    quantity = fields.Integer()
    unit_price = Money(data_key="unitPrice", metadata=TOTAL)


class OrderSchema(Answer):
    """An order: what never changes of it, but for an address that is erased."""

    id = fields.UUID()
    user_id = fields.String(data_key="userId")
    email = fields.String(
        metadata={
            "format": "email",
            "description": f"Where the confirmation goes; {ERASED_ADDRESS} once it was erased.",
        }
    )
    locale = fields.String(validate=validate.OneOf(LOCALES))
    currency = fields.String(metadata=CURRENCY)
    amount = Money(metadata=TOTAL)
    ordered_at = Instant(data_key="orderedAt", metadata={"format": "date-time"})
    items = fields.List(fields.Nested(ItemSchema))


class EventStateSchema(Answer):
    """How far the order's event is on its way to the topic."""

    state = fields.String(
        validate=validate.OneOf(("INIT", "PUBLISHED", "COMPLETED", "FAILED")),
        metadata={
            "description": "INIT: it waits. PUBLISHED: the broker reported it delivered. "
            "COMPLETED: it was read in the topic. FAILED: it cannot be published."
        },
    )
    partition = fields.Integer(allow_none=True)
    offset = fields.Integer(allow_none=True)


class TrackedOrderSchema(OrderSchema):
    """An order and the state of its event."""

    event = fields.Nested(
        EventStateSchema,
        allow_none=True,
        metadata={"description": "Null when the row was purged, long after it was COMPLETED."},
    )


class OrderListSchema(Answer):
    """A page of my orders, newest first; `nextCursor` is null on the last one."""

    items = fields.List(fields.Nested(TrackedOrderSchema))
    next_cursor = fields.String(data_key="nextCursor", allow_none=True)


class ProductSchema(Answer):
    """What can be ordered, and for how much."""

    sku = fields.String()
    names = fields.Function(
        lambda product: {"ko": product.name_ko, "en": product.name_en},
        metadata={
            "type": "object",
            "properties": {locale: {"type": "string"} for locale in LOCALES},
            "required": list(LOCALES),
        },
    )
    unit_price = Money(data_key="unitPrice", metadata=TOTAL)
    currency = fields.String(metadata=CURRENCY)


class ProductListSchema(Answer):
    """The catalogue."""

    items = fields.List(fields.Nested(ProductSchema))


class FieldErrorSchema(Schema):
    """One fault: of the body, by JSON Pointer (RFC 6901), or of a parameter of the query."""

    class Meta:  # noqa: D106 - it opens the documented schema
        unknown = EXCLUDE

    pointer = fields.String()
    parameter = fields.String()
    detail = fields.String(required=True)


class ProblemSchema(ErrorSchema):
    """application/problem+json (RFC 9457)."""

    class Meta:  # noqa: D106 - flask-smorest's own members are left out
        fields = ("type", "title", "status", "detail", "errors")
        unknown = EXCLUDE

    type = fields.String(required=True, metadata={"format": "uri-reference"})
    title = fields.String(required=True)
    status = fields.Integer(required=True)
    detail = fields.String(required=True)
    errors = fields.List(fields.Nested(FieldErrorSchema))
