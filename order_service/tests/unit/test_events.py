import json
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta, timezone
from decimal import Decimal
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from cloudevents.core.base import BaseCloudEvent
from cloudevents.core.bindings.kafka import KafkaMessage, from_binary_event
from jsonschema import Draft202012Validator

from order_service.events import (
    ERASED_ADDRESS,
    Event,
    PlacedOrder,
    erased,
    instant,
    masked_address,
    order_created,
)

EVENT_ID = UUID("01936f6e-7c1a-7000-8000-0000000000e1")
SEOUL = timezone(timedelta(hours=9))


@pytest.fixture
def event(order: PlacedOrder) -> Event:
    """Give the event of the sample order."""
    return order_created(order, event_id=EVENT_ID)


@pytest.fixture
def parsed(event: Event) -> BaseCloudEvent:
    """Give the event as the CloudEvents SDK reads it."""
    headers = {name: value.encode() for name, value in event.headers.items()}
    return from_binary_event(KafkaMessage(headers, event.key.encode(), event.value))


@pytest.fixture(scope="session")
def faults(contract: Path) -> Callable[[bytes], list[str]]:
    """Give a function that lists where a value departs from the contract."""
    schema = json.loads((contract / "events/order-created.v1.json").read_text(encoding="utf-8"))
    validator = Draft202012Validator(schema, format_checker=Draft202012Validator.FORMAT_CHECKER)
    return lambda value: [fault.message for fault in validator.iter_errors(json.loads(value))]


def example(contract: Path, name: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(
        (contract / "examples/valid" / name).read_text(encoding="utf-8")
    )
    return content


def test_the_event_is_the_example_of_the_contract(event: Event, contract: Path) -> None:
    """Key, headers and value are those of the example that says what this service writes."""
    published = example(contract, "full-korean.json")
    assert {"key": event.key, "headers": event.headers, "value": json.loads(event.value)} == {
        part: published[part] for part in ("key", "headers", "value")
    }


def test_the_value_is_compact_utf8(order: PlacedOrder) -> None:
    """No space between members, and Korean as itself, not as escapes."""
    event = order_created(replace(order, items=order.items[1:]), event_id=EVENT_ID)
    assert event.value.decode() == (
        '{"orderId":"01936f6e-7c1a-7000-8000-000000000001","userId":"user-7","amount":"57000",'
        '"email":"minji@example.com","currency":"KRW","locale":"ko",'
        '"orderedAt":"2026-11-21T09:00:00.123456Z",'
        '"items":[{"sku":"CUP-WHITE","name":"백자 찻잔","quantity":1,"unitPrice":"33000"}]}'
    )


def test_the_event_keeps_the_moment_of_the_order(event: Event, order: PlacedOrder) -> None:
    """The record's timestamp will be the order's time."""
    assert event.occurred_at == order.ordered_at


def test_the_value_is_as_the_contract_says(
    event: Event, faults: Callable[[bytes], list[str]]
) -> None:
    """The schema of the contract finds no fault."""
    assert faults(event.value) == []


def test_the_contract_would_find_a_fault(
    event: Event, faults: Callable[[bytes], list[str]]
) -> None:
    """A moment that is none is found, so formats are really checked."""
    wrong = event.value.replace(b"2026-11-21T09", b"2026-13-21T09")
    assert faults(wrong) == ["'2026-13-21T09:00:00.123456Z' is not a 'date-time'"]


@pytest.mark.parametrize(
    ("amount", "written"),
    [("57000", "57000"), ("8.25", "8.25"), ("8.20", "8.20"), ("1E+4", "10000"), ("0", "0")],
)
def test_money_is_a_plain_decimal_string(
    order: PlacedOrder, faults: Callable[[bytes], list[str]], amount: str, written: str
) -> None:
    """Digits are neither lost nor written with an exponent, and the contract allows them."""
    event = order_created(replace(order, amount=Decimal(amount)), event_id=EVENT_ID)
    assert (json.loads(event.value)["amount"], faults(event.value)) == (written, [])


@pytest.mark.parametrize(
    ("moment", "written"),
    [
        (datetime(2026, 11, 21, 18, 0, 0, 5, tzinfo=SEOUL), "2026-11-21T09:00:00.000005Z"),
        (datetime(2026, 11, 21, 9, tzinfo=UTC), "2026-11-21T09:00:00.000000Z"),
        (datetime(2027, 1, 1, 8, 59, 59, 999999, tzinfo=SEOUL), "2026-12-31T23:59:59.999999Z"),
    ],
)
def test_moments_are_utc_with_microseconds(moment: datetime, written: str) -> None:
    """Every moment has one form, whatever its zone."""
    assert instant(moment) == written


def test_a_cloudevents_reader_finds_the_attributes(parsed: BaseCloudEvent) -> None:
    """The SDK, which knows nothing of us, reads the headers as the attributes we mean."""
    assert parsed.get_attributes() == {
        "specversion": "1.0",
        "id": "01936f6e-7c1a-7000-8000-0000000000e1",
        "source": "/order-service",
        "type": "order.created.v1",
        "time": datetime(2026, 11, 21, 9, 0, 0, 123456, tzinfo=UTC),
        "subject": "01936f6e-7c1a-7000-8000-000000000001",
        "dataschema": "urn:order-created:v1",
        "datacontenttype": "application/json",
        "partitionkey": "01936f6e-7c1a-7000-8000-000000000001",
    }


def test_a_cloudevents_reader_finds_the_data(parsed: BaseCloudEvent, event: Event) -> None:
    """The SDK reads the value as the data."""
    assert parsed.get_data() == json.loads(event.value)


def test_a_trace_goes_on_with_the_event(order: PlacedOrder) -> None:
    """What follows from the order can be found from the request that placed it."""
    trace = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
    traced = order_created(order, event_id=EVENT_ID, traceparent=trace)
    assert traced.headers["traceparent"] == trace
    assert "traceparent" not in order_created(order, event_id=EVENT_ID).headers


def test_an_erased_event_is_the_event_of_an_erased_address(order: PlacedOrder) -> None:
    """To the byte what would have been written, so all but the address stays; once is enough."""
    value = order_created(order, event_id=EVENT_ID).value
    anonymous = order_created(replace(order, email=ERASED_ADDRESS), event_id=EVENT_ID).value
    assert (erased(value), erased(anonymous)) == (anonymous, anonymous)


def test_an_erased_event_is_as_the_contract_says(
    event: Event, faults: Callable[[bytes], list[str]]
) -> None:
    """Whoever reads the topic can read it."""
    assert faults(erased(event.value)) == []


@pytest.mark.parametrize(
    ("address", "shown"),
    [("minji@example.com", "m***@e***"), ("", "***@***"), ("민지@예시.kr", "민***@예***")],
)
def test_a_masked_address_shows_two_letters(address: str, shown: str) -> None:
    """Enough to tell addresses apart, not enough to write to one."""
    assert masked_address(address) == shown
