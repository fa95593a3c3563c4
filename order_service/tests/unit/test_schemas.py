from decimal import Decimal
from typing import Any

import pytest
from email_validator import EmailNotValidError, validate_email
from marshmallow import ValidationError

from order_service.schemas import MAX_ITEMS, MAX_QUANTITY, OrderRequestSchema

LINE = {"sku": "TEA-GREEN-50", "quantity": 2}
BODY: dict[str, Any] = {"email": "minji@example.com", "items": [LINE]}

LOCAL_PARTS = [
    *("minji", "m.i+n_j-i", "7", "m" * 64, "m" * 65, "Minji", "POSTMASTER", "postmaster"),
    *("m.", ".m", "m..i", "m+", "-m", "m i", '"m"', "민지", "m\n", "m@", "<m", "m\u0131", ""),
]
DOMAINS = [
    *("example.com", "EXAMPLE.com", "example", "localhost", "a.test", "a.invalid", "예시.한국"),
    *("xn--vf4b27j.xn--3e0b707e", "xn--a.com", "a-.com", "-a.com", "a..com", "a.com.", ".a.com"),
    *("a.com>", "a.com <b@c.com>", "b@a.com", "a.com\n", " a.com", "[127.0.0.1]", "127.0.0.1"),
    *(".".join(["d" * 60] * 3 + ["d" * length]) for length in (3, 4, 60)),
    *(f"{'d' * 64}.com", ""),
]


def load(**changed: Any) -> dict[str, Any]:
    loaded: dict[str, Any] = OrderRequestSchema().load(BODY | changed)
    return loaded


def faulty_fields(body: dict[str, Any]) -> set[str]:
    return set(OrderRequestSchema().validate(body))


def test_a_body_is_loaded_with_its_defaults() -> None:
    """Locale and expected amount may be left out."""
    assert load() == BODY | {"locale": "ko", "expected_amount": None}


@pytest.mark.parametrize(
    ("written", "kept"),
    [
        ("minji@example.com", "minji@example.com"),
        ("Min.Ji+tea@EXAMPLE.com", "Min.Ji+tea@example.com"),
        ("민지@example.com", "민지@example.com"),
        ("minji@예시.한국", "minji@예시.한국"),
        ("minji@kim치.한국", "minji@kim치.한국"),
        ("minji@例え屋カフェー.jp", "minji@例え屋カフェー.jp"),
        ("minji@пример.рф", "minji@пример.рф"),
        ("e\u0301@example.com", "\u00e9@example.com"),
    ],
)
def test_an_address_is_kept_normalised(written: str, kept: str) -> None:
    """The domain in small letters, characters composed; the local part as it was written."""
    assert load(email=written)["email"] == kept


@pytest.mark.parametrize(
    "email",
    [
        "",
        "minji",
        "minji@",
        "@example.com",
        "minji@localhost",
        "minji@example.com\n",
        "minji@example.com\r\nBcc: all@example.com",
        "minji\x00@example.com",
        " minji@example.com",
        "minji@example.com,all@example.com",
        "Minji <minji@example.com>",
        "minji@[127.0.0.1]",
        "minji@\u0430pple.com",
        "minji@xn--pple-43d.com",
        "minji@g\u03bfogle.com",
        "\ud800@example.com",
        f"{'m' * 65}@example.com",
        f"m@{'d' * 60}.{'d' * 60}.{'d' * 60}.{'d' * 60}.{'d' * 12}",
        7,
        None,
    ],
    ids=repr,
)
def test_what_is_no_single_address_is_refused(email: object) -> None:
    """What no mail server takes, and what would reach somebody else too, is no address."""
    assert faulty_fields(BODY | {"email": email}) == {"email"}


def verdict(email: str) -> str | None:
    try:
        return validate_email(email, check_deliverability=False, strict=True).normalized
    except EmailNotValidError:
        return None


@pytest.mark.parametrize("local", LOCAL_PARTS)
@pytest.mark.parametrize("domain", DOMAINS)
def test_an_address_is_judged_as_by_the_library(local: str, domain: str) -> None:
    """Remembering what was said of a domain, and asking only about it, changes no verdict."""
    email = f"{local}@{domain}"
    if verdict(email) is None:
        assert faulty_fields(BODY | {"email": email}) == {"email"}
    else:
        assert load(email=email)["email"] == verdict(email)


@pytest.mark.parametrize("field", ["email", "items"])
def test_what_an_order_needs_must_be_there(field: str) -> None:
    """Without address or items there is no order."""
    assert faulty_fields({name: BODY[name] for name in BODY if name != field}) == {field}


@pytest.mark.parametrize("field", ["amount", "price", "currency", "userId", "id"])
def test_a_field_nobody_asked_for_is_refused(field: str) -> None:
    """A client that names a price is told so instead of being ignored."""
    assert faulty_fields(BODY | {field: "1"}) == {field}


@pytest.mark.parametrize("field", ["price", "unitPrice", "name"])
def test_a_line_names_no_price(field: str) -> None:
    """Prices are the shop's to name."""
    with pytest.raises(ValidationError) as refused:
        load(items=[LINE | {field: "1"}])
    assert refused.value.normalized_messages() == {"items": {0: {field: ["Unknown field."]}}}


@pytest.mark.parametrize("quantity", [1, MAX_QUANTITY])
def test_a_quantity_within_bounds_is_taken(quantity: int) -> None:
    """One and 999 are quantities."""
    assert load(items=[LINE | {"quantity": quantity}])["items"][0]["quantity"] == quantity


@pytest.mark.parametrize(
    "quantity", [0, -1, MAX_QUANTITY + 1, 1.5, "2", True, None, float("nan"), float("inf"), 10**20]
)
def test_what_is_no_quantity_is_refused(quantity: object) -> None:
    """Only a JSON integer from 1 to 999 is a quantity."""
    with pytest.raises(ValidationError) as refused:
        load(items=[LINE | {"quantity": quantity}])
    assert list(refused.value.normalized_messages()["items"][0]) == ["quantity"]


@pytest.mark.parametrize("count", [1, MAX_ITEMS])
def test_an_order_has_so_many_lines(count: int) -> None:
    """One line and fifty lines are an order."""
    assert len(load(items=[LINE] * count)["items"]) == count


@pytest.mark.parametrize("items", [[], [LINE] * (MAX_ITEMS + 1), {}, "TEA", None, ["TEA"]])
def test_what_is_no_list_of_lines_is_refused(items: object) -> None:
    """No line, too many, or no lines at all."""
    assert faulty_fields(BODY | {"items": items}) == {"items"}


@pytest.mark.parametrize("sku", ["", "A B", "차", "A\n", "A/B", "x" * 65, "\ud800", 7, None])
def test_what_is_no_sku_is_refused(sku: object) -> None:
    """A sku is 1 to 64 letters, digits, dots, underscores and hyphens."""
    with pytest.raises(ValidationError) as refused:
        load(items=[LINE | {"sku": sku}])
    assert list(refused.value.normalized_messages()["items"][0]) == ["sku"]


@pytest.mark.parametrize("locale", ["ko", "en"])
def test_the_shop_speaks(locale: str) -> None:
    """Korean and English are the locales."""
    assert load(locale=locale)["locale"] == locale


@pytest.mark.parametrize("locale", ["fr", "KO", "", None, "ko\n"])
def test_another_locale_is_refused(locale: object) -> None:
    """There is no mail in another language."""
    assert faulty_fields(BODY | {"locale": locale}) == {"locale"}


@pytest.mark.parametrize(
    ("written", "amount"),
    [("57000", "57000"), ("8.25", "8.25"), ("0", "0"), ("9" * 15 + ".9999", "9" * 15 + ".9999")],
)
def test_an_amount_is_a_decimal_string(written: str, amount: str) -> None:
    """What a client expects to pay is read without a float in between."""
    assert load(expectedAmount=written)["expected_amount"] == Decimal(amount)


@pytest.mark.parametrize(
    "amount",
    [57000, 8.25, "-1", "1e3", "1,000", "٣", "", "1.", ".5", "1.00000", "1" * 16, "NaN", "1\n"],
)
def test_what_is_no_amount_is_refused(amount: object) -> None:
    """Numbers, signs, exponents and separators are not decimal strings."""
    assert faulty_fields(BODY | {"expectedAmount": amount}) == {"expectedAmount"}
