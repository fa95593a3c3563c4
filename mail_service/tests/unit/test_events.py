"""order-created as this service reads it."""

import json
from collections.abc import Mapping
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from mail_service.events import Item, UnreadableRecord, occurred_at, parse, read
from mail_service.kafka import Record

EXAMPLES = Path(__file__).parents[3] / "shared_schemas" / "examples"
VALID = sorted((EXAMPLES / "valid").glob("*.json"))
INVALID = sorted((EXAMPLES / "invalid").glob("*.json"))
RECORDED_AT = datetime(2026, 11, 21, 9, tzinfo=UTC)
REQUIRED = {"orderId": "1001", "userId": "7", "amount": "57000", "email": "minji@example.com"}
CANARY = "canary-7f3a"


def record(
    value: bytes | None, *, key: bytes | None = None, headers: Mapping[str, str] | None = None
) -> Record:
    """Make a record as Kafka carries it."""
    encoded = [(name, text.encode()) for name, text in (headers or {}).items()]
    return Record("topic", 0, 0, key, value, encoded, RECORDED_AT)


def event(**changes: object) -> bytes:
    """Return a value with the required fields and some changes."""
    return json.dumps({**REQUIRED, **changes}).encode()


def item(**changes: object) -> dict[str, object]:
    """Return one item with some changes."""
    return {"sku": "TEA", "name": "Tea", "quantity": 2, "unitPrice": "12000", **changes}


def example(path: Path) -> tuple[Record, dict[str, Any]]:
    """Return an example as a record, and its value as data."""
    content = json.loads(path.read_text(encoding="utf-8"))
    key = content["key"]
    value = json.dumps(content["value"], ensure_ascii=False).encode()
    return record(value, key=key and key.encode(), headers=content["headers"]), content["value"]


def test_there_are_examples_of_both_kinds() -> None:
    """A moved folder does not make the tests below empty."""
    assert len(VALID) >= 5
    assert len(INVALID) >= 10


@pytest.mark.parametrize("path", VALID, ids=lambda path: path.stem)
def test_a_valid_example_is_read_as_what_it_says(path: Path) -> None:
    """Every field that the contract names arrives, and nothing else is made of it."""
    carried, said = example(path)

    found = read(carried)

    assert found is not None
    assert found.order_id == str(said["orderId"])
    assert found.email == said["email"]
    assert found.amount == Decimal(str(said["amount"]))
    assert found.currency == said.get("currency")
    assert found.locale == said.get("locale")
    ordered_at = said.get("orderedAt")
    assert found.ordered_at == (datetime.fromisoformat(ordered_at) if ordered_at else None)
    assert list(found.items) == [
        Item(line["sku"], line["name"], line["quantity"], Decimal(line["unitPrice"]))
        for line in said.get("items", [])
    ]


@pytest.mark.parametrize("path", INVALID, ids=lambda path: path.stem)
def test_an_invalid_example_is_unreadable(path: Path) -> None:
    """What the contract forbids becomes a dead letter, whoever was to see it."""
    with pytest.raises(UnreadableRecord):
        read(example(path)[0])


def test_a_record_without_cloudevents_headers_is_an_order_created() -> None:
    """The topic names the fact."""
    assert read(record(event(), headers={"__TypeId__": "com.example.Order"})) is not None


@pytest.mark.parametrize("kind", ["order.cancelled.v1", "order.created", "", "order.created.v1 "])
def test_a_type_we_do_not_know_is_not_for_us(kind: str) -> None:
    """Another type may come to this topic one day: it is skipped, not refused."""
    assert read(record(b"not even JSON", headers={"ce_type": kind})) is None


@pytest.mark.parametrize("kind", ["order.created.v2", "order.created.v10", "order.created.v0"])
def test_a_major_version_we_do_not_know_is_unreadable(kind: str) -> None:
    """An order is in it, and its customer waits: somebody must look."""
    with pytest.raises(UnreadableRecord, match="major version"):
        read(record(event(), headers={"ce_type": kind}))


def test_a_tombstone_is_not_for_us() -> None:
    """A record without a value says that something is to be forgotten; there is no mail in it."""
    assert read(record(None, key=b"1001")) is None


def test_an_empty_value_is_no_tombstone() -> None:
    """No bytes are no event."""
    with pytest.raises(UnreadableRecord):
        read(record(b"", key=b"1001"))


@pytest.mark.parametrize("key", [b"1002", b"\xff", b"1001 ", b'"1001"'])
def test_a_key_that_contradicts_the_order_is_unreadable(key: bytes) -> None:
    """One of the two is wrong and nobody knows which."""
    with pytest.raises(UnreadableRecord, match="key"):
        read(record(event(), key=key))


@pytest.mark.fault("F-P6")
@pytest.mark.parametrize("key", [None, b"", b"1001"])
def test_a_key_is_not_needed(key: bytes | None) -> None:
    """A producer without keys is understood."""
    found = read(record(event(), key=key))

    assert found is not None
    assert found.order_id == "1001"


def test_ids_and_amounts_may_be_integers() -> None:
    """Languages that write numbers are understood, digit by digit."""
    found = parse(event(orderId=9007199254740993, userId=7, amount=999999999999999))

    assert found.order_id == "9007199254740993"
    assert found.amount == Decimal(999999999999999)


def test_unknown_fields_are_ignored() -> None:
    """A later release may say more."""
    more = event(giftWrap=True, loyalty={"points": 12}, items=[item(colour="green")])

    assert parse(more).items == [Item("TEA", "Tea", 2, Decimal(12000))]


def test_what_a_record_says_of_classes_has_no_effect() -> None:
    """A type header names nothing that is loaded."""
    headers = {"__TypeId__": "os.system", "ce_dataschema": "file:///etc/passwd"}

    assert read(record(event(), headers=headers)) == parse(event())


UNREADABLE = {
    "empty": b"",
    "not JSON": b"{",
    "more after the end": event() + b"{}",
    "a string": b'"text"',
    "null": b"null",
    "NaN": b'{"orderId": "1", "userId": "1", "email": "a@b.c", "amount": NaN}',
    "infinity": b'{"orderId": "1", "userId": "1", "email": "a@b.c", "amount": -Infinity}',
    "an overflowing number": b'{"orderId": "1", "userId": "1", "email": "a@b.c", "amount": 1e999}',
    "NaN where nobody looks": event()[:-1] + b', "more": NaN}',
    "deep lists": b"[" * 100_000,
    "deep objects": b'{"a":' * 50_000,
    "deep where nobody looks": event()[:-1] + b', "more": ' + b"[" * 100_000,
    "5000 digits": event()[:-1] + b', "more": ' + b"9" * 5_000 + b"}",
    "not UTF-8": event(email="é@example.com").replace(b"\\u00e9", b"\xe9"),
    "UTF-16": event().decode().encode("utf-16"),
    "byte order mark": b"\xef\xbb\xbf" + event(),
    "float amount": event(amount=570.5),
    "float that is whole": event(amount=570.0),
    "boolean amount": event(amount=True),
    "amount in words": event(amount="57,000"),
    "amount with a sign": event(amount="+57000"),
    "negative amount": event(amount=-1),
    "amount in other digits": event(amount="\u0665\u0667"),
    "amount with an exponent": event(amount="5E3"),
    "amount with an underscore": event(amount="57_000"),
    "amount with a line end": event(amount="57000\n"),
    "sixteen digits": event(amount="1234567890123456"),
    "five decimals": event(amount="1.00001"),
    "order id with a line end": event(orderId="1001\n"),
    "order id with a path": event(orderId="../1001"),
    "order id of dots": event(orderId="1..2"),
    "65 characters": event(orderId="a" * 65),
    "empty order id": event(orderId=""),
    "float order id": event(orderId=1001.0),
    "order id null": event(orderId=None),
    "no user": json.dumps({k: v for k, v in REQUIRED.items() if k != "userId"}).encode(),
    "two recipients": event(email="a@example.com, b@example.com"),
    "two recipients without a space": event(email="a@example.com,b@example.com"),
    "a name with the address": event(email="Minji <minji@example.com>"),
    "a quoted local part": event(email='"a b"@example.com'),
    "a header": event(email="a@example.com\nBcc: b@example.com"),
    "a line end": event(email="a@example.com\n"),
    "a line separator": event(email="a@example.com\u2028b"),
    "a null byte": event(email="a\x00@example.com"),
    "no at": event(email="minji"),
    "two ats": event(email="a@b@example.com"),
    "255 characters": event(email="a@" + "b" * 253),
    "address literal": event(email="a@[127.0.0.1]"),
    "currency in small letters": event(currency="krw"),
    "time without sense": event(orderedAt="yesterday"),
    "items as an object": event(items={"sku": "TEA"}),
    "no items": event(items=None),
    "an item as a list": event(items=[["TEA", "Tea", 1, "12000"]]),
    "an item as a string": event(items=["TEA"]),
    "no item": event(items=[item(), None]),
    "an item without a price": event(items=[{"sku": "TEA", "name": "Tea", "quantity": 1}]),
    "a number as a name": event(items=[item(name=7)]),
    "a null byte in a name": event(items=[item(name="T\0a")]),
    "a null byte in a sku": event(items=[item(sku="T\0A")]),
    "201 characters": event(items=[item(name="t" * 201)]),
    "a sku of 65": event(items=[item(sku="T" * 65)]),
    "item without a name": event(items=[item(name="")]),
    "quantity zero": event(items=[item(quantity=0)]),
    "half a quantity": event(items=[item(quantity=0.5)]),
    "quantity as a string": event(items=[item(quantity="2")]),
    "boolean quantity": event(items=[item(quantity=True)]),
    "float price": event(items=[item(unitPrice=0.1)]),
}


@pytest.mark.parametrize("value", UNREADABLE.values(), ids=UNREADABLE.keys())
def test_a_value_that_can_never_be_a_mail_is_unreadable(value: bytes) -> None:
    """Whatever is wrong with it, the reader says so and goes on."""
    with pytest.raises(UnreadableRecord):
        parse(value)


@pytest.mark.parametrize(
    "hostile",
    [
        record(CANARY.encode()),
        record(f'{{"{CANARY}"'.encode()),
        record(json.dumps({CANARY: CANARY}).encode()),
        record(event(orderId=f"{CANARY} x")),
        record(event(userId=[CANARY])),
        record(event(amount=CANARY)),
        record(event(email=CANARY)),
        record(event(email=f"{CANARY}@example.com,b@example.com")),
        record(event(currency=CANARY)),
        record(event(locale=CANARY * 9)),
        record(event(orderedAt=CANARY)),
        record(event(items=[{CANARY: CANARY}])),
        record(event(items=[item(name=CANARY * 50)])),
        record(event(), key=CANARY.encode()),
        record(event(email=f"{CANARY}@example.com"), headers={"ce_type": "order.created.v9"}),
    ],
)
def test_the_reason_holds_no_value_of_the_record(hostile: Record) -> None:
    """A reason is logged and shown: no address gets there."""
    with pytest.raises(UnreadableRecord) as refused:
        read(hostile)

    assert str(refused.value)
    assert CANARY not in str(refused.value)


def test_the_reason_names_the_fields_that_are_wrong() -> None:
    """Whoever runs the producer can start looking."""
    with pytest.raises(UnreadableRecord, match="OrderCreatedEvent: amount, email"):
        parse(event(amount="-1", email="minji"))


@pytest.mark.parametrize(
    ("ce_time", "at"),
    [
        ("2026-01-02T03:04:05Z", datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)),
        ("2026-01-02T03:04:05.123456+00:00", datetime(2026, 1, 2, 3, 4, 5, 123456, tzinfo=UTC)),
        ("2026-01-02T03:04:05+09:00", datetime(2026, 1, 1, 18, 4, 5, tzinfo=UTC)),
        ("2026-01-02T03:04:05", RECORDED_AT),
        ("yesterday", RECORDED_AT),
        ("", RECORDED_AT),
        ("2026-01-02T99:00:00Z", RECORDED_AT),
    ],
)
def test_an_event_happened_when_its_header_says(ce_time: str, at: datetime) -> None:
    """A time that is no instant counts as not said: the record's own stands in."""
    assert occurred_at(record(event(), headers={"ce_time": ce_time})) == at


def test_an_event_without_a_time_happened_when_it_was_recorded() -> None:
    """Every record has a timestamp."""
    assert occurred_at(record(event())) == RECORDED_AT
