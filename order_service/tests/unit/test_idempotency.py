from typing import Any

import pytest

from order_service.errors import IdempotencyKeyRejected
from order_service.idempotency import fingerprint, parse_key


@pytest.mark.parametrize(
    ("header", "key"),
    [
        ("a", "a"),
        ("8e03978e-40d5-43dd-bc93-6894a57f9324", "8e03978e-40d5-43dd-bc93-6894a57f9324"),
        ('"8e03978e-40d5-43dd-bc93-6894a57f9324"', "8e03978e-40d5-43dd-bc93-6894a57f9324"),
        ("  spaced  ", "spaced"),
        ("two words", "two words"),
        ("!~", "!~"),
        ("k" * 255, "k" * 255),
        (f'"{"k" * 255}"', "k" * 255),
    ],
)
def test_a_key_is_taken_bare_or_quoted(header: str, key: str) -> None:
    """The same key in quotes, as the draft has it, and bare, as clients send it, is one key."""
    assert parse_key(header) == key


@pytest.mark.parametrize(
    "header",
    [
        None,
        "",
        "   ",
        '""',
        '" "',
        "k" * 256,
        f'"{"k" * 256}"',
        "열쇠",
        "clé",
        "a\x00b",
        "a\tb",
        "a\x7f",
    ],
)
def test_what_is_no_key_is_rejected(header: str | None) -> None:
    """Missing, empty, too long, not ASCII or not printable."""
    with pytest.raises(IdempotencyKeyRejected):
        parse_key(header)


def test_the_order_of_members_makes_no_difference() -> None:
    """Two clients that write the same order differently wrote the same order."""
    assert fingerprint({"email": "a@example.com", "items": [{"sku": "A", "quantity": 1}]}) == (
        fingerprint({"items": [{"quantity": 1, "sku": "A"}], "email": "a@example.com"})
    )


@pytest.mark.parametrize(
    "other",
    [
        {"email": "b@example.com", "items": [{"sku": "A", "quantity": 1}]},
        {"email": "a@example.com", "items": [{"sku": "A", "quantity": 2}]},
        {"email": "a@example.com", "items": [{"sku": "A", "quantity": 1}] * 2},
        {"email": "a@example.com", "items": [{"sku": "A", "quantity": 1}], "locale": "en"},
        {"email": "a@example.com", "items": [{"sku": "A", "quantity": "1"}]},
    ],
)
def test_another_order_has_another_fingerprint(other: dict[str, Any]) -> None:
    """Whatever a client changes, the fingerprint changes."""
    assert fingerprint(other) != fingerprint(
        {"email": "a@example.com", "items": [{"sku": "A", "quantity": 1}]}
    )


def test_the_order_of_items_makes_a_difference() -> None:
    """Lines are numbered, so their order is part of the order."""
    first, second = {"sku": "A", "quantity": 1}, {"sku": "B", "quantity": 1}
    assert fingerprint({"items": [first, second]}) != fingerprint({"items": [second, first]})
