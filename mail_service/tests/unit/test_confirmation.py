"""An event → the bytes of one mail."""

import html
import re
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from email import policy
from email.message import EmailMessage
from email.parser import BytesParser
from email.utils import parsedate_to_datetime
from typing import Any

import pytest
from babel.numbers import format_currency, list_currencies

from mail_service.confirmation import (
    CannotRender,
    ComposedMail,
    Confirmation,
    Shop,
    _money,
    message_id,
)
from mail_service.events import Item, OrderCreated
from mail_service.settings import Settings

EVENT_AT = datetime(2026, 11, 21, 9, 0, tzinfo=UTC)
SHOP = Shop(
    name="Tea House",
    url="https://shop.example",
    locale="ko",
    time_zone="Asia/Seoul",
    currency="KRW",
    mail_from="orders@shop.example",
    reply_to=None,
    bounce_to=None,
    templates=None,
)
BARE = OrderCreated(
    order_id="1001",
    email="minji@example.com",
    amount=Decimal(57000),
    currency=None,
    locale=None,
    ordered_at=None,
    items=(),
)
FULL = replace(
    BARE,
    currency="USD",
    locale="en",
    amount=Decimal("41.50"),
    ordered_at=datetime(2026, 11, 21, 23, 30, tzinfo=UTC),
    items=(
        Item("TEA", "Green tea 50 g", 2, Decimal("8.25")),
        Item("CUP", "White cup", 1, Decimal("25.00")),
    ),
)


def compose(event: OrderCreated, shop: Shop = SHOP) -> ComposedMail:
    """Compose one confirmation."""
    name = message_id(event.order_id, mail_from=shop.mail_from)
    return Confirmation(shop).compose(event, event_at=EVENT_AT, message_id=name)


def read(envelope: ComposedMail) -> EmailMessage:
    """Read a mail as its recipient's program does, which must find nothing wrong with it."""
    message = BytesParser(policy=policy.default.clone(raise_on_defect=True)).parsebytes(
        envelope.content
    )
    assert isinstance(message, EmailMessage)
    return message


def bodies(event: OrderCreated, shop: Shop = SHOP) -> tuple[str, str]:
    """Return text and HTML of the mail."""
    message = read(compose(event, shop))
    assert message.get_content_type() == "multipart/alternative"
    text, rich = message.iter_parts()
    assert (text.get_content_type(), rich.get_content_type()) == ("text/plain", "text/html")
    return text.get_content(), rich.get_content()


@pytest.mark.parametrize(
    ("said", "of_shop", "language"),
    [
        ("ko", "en", "ko"),
        ("en", "ko", "en"),
        ("ko-KR", "en", "ko"),
        ("en_US", "ko", "en"),
        ("EN", "ko", "en"),
        (None, "ko", "ko"),
        (None, "en", "en"),
        ("fr", "en", "en"),
        ("korean", "en", "en"),
        ("\ud800", "en", "en"),
    ],
)
def test_the_mail_speaks_the_customers_language(
    said: str | None, of_shop: str, language: str
) -> None:
    """A language that we do not write, or none, becomes the shop's."""
    message = read(compose(replace(BARE, locale=said), replace(SHOP, locale=of_shop)))

    assert message["Content-Language"] == language
    assert ("주문" in message["Subject"]) is (language == "ko")


@pytest.mark.parametrize("locale", ["ko", "en"])
def test_the_required_fields_alone_make_a_good_mail(locale: str) -> None:
    """What an event does not say comes from the shop and the record."""
    text, rich = bodies(replace(BARE, locale=locale))

    for body in (text, html.unescape(rich)):
        assert "1001" in body
        assert "₩57,000" in body
        assert "18:00" in body
        assert "Tea House" in body
        assert "https://shop.example/orders/1001" in body
        assert "orders@shop.example" in body
        assert "None" not in body
    assert 'scope="col"' not in rich


@pytest.mark.parametrize("locale", ["ko", "en"])
def test_text_and_html_say_the_same(locale: str) -> None:
    """Every fact of the order stands in both."""
    text, rich = bodies(replace(FULL, locale=locale))

    for fact in (
        "1001",
        "minji@example.com",
        "Green tea 50 g",
        "White cup",
        "8.25",
        "16.50",
        "25.00",
        "41.50",
        "08:30",
        "Tea House",
        "https://shop.example/orders/1001",
    ):
        assert fact in text
        assert fact in html.unescape(rich)


def test_the_headers_are_those_of_a_machines_mail() -> None:
    """Each header is there once, and says what an operator or a mailbox needs."""
    message = read(compose(BARE))

    assert {name: message.get_all(name) for name in set(message.keys()) - {"Date", "Subject"}} == {
        "From": ["Tea House <orders@shop.example>"],
        "To": ["minji@example.com"],
        "Message-ID": ["<order-confirmation.1001@shop.example>"],
        "Auto-Submitted": ["auto-generated"],
        "X-Auto-Response-Suppress": ["All"],
        "Content-Language": ["ko"],
        "X-Order-Id": ["1001"],
        "X-Entity-Ref-ID": ["1001"],
        "MIME-Version": ["1.0"],
        "Content-Type": message.get_all("Content-Type"),
    }
    assert abs(parsedate_to_datetime(message["Date"]) - datetime.now(UTC)) < timedelta(minutes=1)


def test_nobody_can_unsubscribe_from_a_confirmation() -> None:
    """It answers an order; it is no newsletter."""
    assert "List-Unsubscribe" not in read(compose(FULL))


def test_the_subject_names_shop_and_order() -> None:
    """A customer finds the mail by either."""
    assert read(compose(FULL))["Subject"] == "[Tea House] We have your order 1001"


@pytest.mark.parametrize("order_id", ["1001", "a" * 64, "0193.6f6e_7c1a-7000"])
def test_an_order_has_one_message_id_which_holds_it(order_id: str) -> None:
    """However long, it arrives as it was written into the ledger."""
    shop = replace(SHOP, mail_from="orders@mail.a-rather-long-shop-name.example.com")

    message = read(compose(replace(BARE, order_id=order_id), shop))

    expected = f"<order-confirmation.{order_id}@mail.a-rather-long-shop-name.example.com>"
    assert message["Message-ID"] == expected
    assert message["X-Order-Id"] == order_id


def test_replies_and_bounces_go_where_the_shop_says() -> None:
    """The envelope's sender is the address for bounces, the header's is the shop's."""
    shop = replace(SHOP, reply_to="help@shop.example", bounce_to="bounce@shop.example")

    envelope = compose(BARE, shop)

    assert envelope.sender == "bounce@shop.example"
    assert read(envelope)["Reply-To"] == "help@shop.example"
    assert "orders@shop.example" in read(envelope)["From"]


def test_bounces_go_to_the_sender_when_nothing_else_is_said() -> None:
    """A bounce always reaches the shop."""
    assert compose(BARE).sender == "orders@shop.example"


@pytest.mark.parametrize(
    ("locale", "currency", "amount", "written"),
    [
        ("ko", "KRW", "57000", "₩57,000"),
        ("en", "KRW", "57000", "₩57,000"),
        ("en", "USD", "41.5", "$41.50"),
        ("ko", "USD", "41.5", "US$41.50"),
        ("en", "USD", "1234567", "$1,234,567.00"),
        ("en", "JPY", "1000", "¥1,000"),
        ("en", "KWD", "1.5", "KWD1.500"),
    ],
)
def test_money_is_written_as_its_currency_is(
    locale: str, currency: str, amount: str, written: str
) -> None:
    """Won have no decimals, dollars have two."""
    text, _ = bodies(replace(BARE, locale=locale, currency=currency, amount=Decimal(amount)))

    label = "합계: " if locale == "ko" else "Total: "
    assert f"{label}{written}" in text.splitlines()


@pytest.mark.parametrize("language", ["ko", "en"])
def test_every_currency_is_written_as_babel_writes_it(language: str) -> None:
    """Whole and broken amounts, small and large, halves included."""
    amounts = [Decimal(text) for text in ("0", "0.5", "1.5", "2.345", "999.995", "1234567.8915")]
    amounts.append(Decimal(10**15 - 1))
    for currency in list_currencies():
        for amount in amounts:
            expected = format_currency(amount, currency, locale=language)
            assert _money(language, currency)(amount) == expected


@pytest.mark.parametrize(
    ("zone", "written"),
    [("Asia/Seoul", "November 22, 2026 08:30"), ("America/New_York", "November 21, 2026 18:30")],
)
def test_the_time_is_the_shops(zone: str, written: str) -> None:
    """A customer reads local time."""
    text, _ = bodies(FULL, replace(SHOP, time_zone=zone))

    assert written in text


@pytest.mark.parametrize(
    "name", ["<img src=x>", "{{7*7}}", "{% raw %}", "javascript:alert(1)", "Tom & 'Jerry' \"\""]
)
@pytest.mark.parametrize("locale", ["ko", "en"])
def test_a_name_is_text_whatever_it_looks_like(name: str, locale: str) -> None:
    """Names are shown as they are: no tag, no template, no link comes of one."""
    item = Item("X", name, 1, Decimal(1))

    text, rich = bodies(replace(BARE, locale=locale, items=(item,)))

    assert f"- {name}" in text.splitlines()
    assert f">{html.escape(name)}<br>" in rich.replace("&#34;", "&quot;").replace("&#39;", "&#x27;")


@pytest.mark.parametrize(
    "name", ["a\r\nBcc: b@example.com", "a\nBcc: b@example.com", "a\r\n\r\n.\r\nMAIL FROM:<x@y>"]
)
def test_a_line_break_in_a_name_makes_no_header(name: str) -> None:
    """It stays in the body, one recipient long."""
    envelope = compose(replace(BARE, items=(Item("X", name, 1, Decimal(1)),)))

    message = read(envelope)
    assert "Bcc" not in message
    assert message["To"] == envelope.recipient == "minji@example.com"
    assert "Bcc" not in [key for part in message.iter_parts() for key in part]


@pytest.mark.parametrize(
    "name", ["Tea\r\nBcc: b@example.com", "Tea\nBcc: b@example.com", "Tea\x85Bcc: b@example.com"]
)
def test_a_line_break_in_the_shops_name_makes_no_mail(name: str) -> None:
    """A header that would become two is refused."""
    with pytest.raises(CannotRender):
        compose(BARE, replace(SHOP, name=name))


def test_a_comma_in_the_shops_name_makes_no_second_sender() -> None:
    """A name is quoted where it must be."""
    message = read(compose(BARE, replace(SHOP, name="Tea, Cups & Co")))

    (sender,) = message["From"].addresses
    assert (sender.display_name, sender.addr_spec) == ("Tea, Cups & Co", "orders@shop.example")


def test_a_domain_in_other_letters_travels_in_ascii() -> None:
    """Every relay can read envelope and header."""
    envelope = compose(replace(BARE, email="minji@exämple.de"))

    assert envelope.recipient == read(envelope)["To"] == "minji@xn--exmple-cua.de"


def test_a_name_in_other_letters_is_the_recipients_own() -> None:
    """Header and envelope carry it in UTF-8 (RFC 6532), the domain in ASCII all the same."""
    envelope = compose(replace(BARE, email="민지@exämple.de"))

    assert envelope.recipient == "민지@xn--exmple-cua.de"
    message = BytesParser(policy=policy.SMTPUTF8).parsebytes(envelope.content)
    assert message["To"] == envelope.recipient
    assert [line for line in envelope.content.splitlines() if not line.isascii()] == [
        f"To: {envelope.recipient}".encode()
    ]


@pytest.mark.parametrize("shop_name", ["차 한 잔 " * 12, "Tea House " * 30, "a" * 200, "茶" * 60])
def test_a_long_subject_is_folded_and_arrives_whole(shop_name: str) -> None:
    """No line is longer than 76 characters, and no letter is cut (RFC 2047 §5)."""
    envelope = compose(replace(BARE, locale="ko"), replace(SHOP, name=shop_name.strip()))

    head = envelope.content.partition(b"\r\n\r\n")[0]
    (subject,) = re.findall(rb"^Subject: .*(?:\r\n[ \t].*)*", head, re.MULTILINE)
    assert max(map(len, subject.split(b"\r\n"))) <= 76 + len("Subject: ")
    assert shop_name.strip() in read(envelope)["Subject"]


NO_MAIL = {
    "comma": replace(BARE, email="a@example.com, b@example.com"),
    "comma without a space": replace(BARE, email="a@example.com,b@example.com"),
    "a comma after IDNA": replace(BARE, email="a@example.com\uff0cb.example"),
    "header": replace(BARE, email="a@example.com\r\nBcc: b@example.com"),
    "local part with a header": replace(BARE, email="a\r\nBcc: b@example.com"),
    "name and address": replace(BARE, email="Minji <minji@example.com>"),
    "dot at the end": replace(BARE, email="minji@example.com."),
    "dot at the end after IDNA": replace(BARE, email="minji@example.com\u3002"),
    "parentheses after IDNA": replace(BARE, email="minji@\u2474.com"),
    "empty label": replace(BARE, email="minji@example..com"),
    "long label": replace(BARE, email=f"minji@{'é' * 100}.com"),
    "two dots": replace(BARE, email="min..ji@example.com"),
    "local part that cannot be seen": replace(BARE, email="min\u200bji@example.com"),
    "local part that runs backwards": replace(BARE, email="min\u202eji@example.com"),
    "local part with a wide space": replace(BARE, email="min\u3000ji@example.com"),
    "long local part": replace(BARE, email=f"{'민' * 22}@example.com"),
    "surrogate": replace(BARE, items=(Item("X", "\ud800", 1, Decimal(1)),)),
    "quantity without end": replace(BARE, items=(Item("X", "x", 10**30, Decimal(1)),)),
    "end of time": replace(BARE, ordered_at=datetime(9999, 12, 31, 23, 59, tzinfo=UTC)),
}


@pytest.mark.parametrize("event", NO_MAIL.values(), ids=NO_MAIL.keys())
def test_an_event_that_allows_no_mail_is_said_to(event: OrderCreated) -> None:
    """There is one way to fail, which ends one mail and not the process."""
    with pytest.raises(CannotRender):
        compose(event)


@pytest.mark.parametrize(
    "event",
    [
        replace(BARE, email="a@b.kr", locale="en", items=(Item("X", "녹차", 1, Decimal(1)),)),
        replace(FULL, locale="ko"),
        FULL,
    ],
    ids=["short lines", "Korean", "English"],
)
def test_the_content_passes_any_relay(event: OrderCreated) -> None:
    """Lines are short, end in CRLF and are ASCII: no extension of SMTP is needed."""
    content = compose(event).content

    assert content.isascii()
    assert content.endswith(b"\r\n")
    assert content.count(b"\n") == content.count(b"\r") == content.count(b"\r\n")
    assert max(map(len, content.split(b"\r\n"))) <= 998


def test_the_shop_comes_from_the_settings(environment: dict[str, Any]) -> None:
    """An address of the shop ends without a slash, so that links have one."""
    settings = Settings.from_environment({**environment, "SHOP_URL": "https://shop.example/"})

    assert Shop.of(settings) == replace(SHOP, name="Tea House")
