"""An event → the bytes of one mail."""

import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, date, datetime
from decimal import Decimal
from email.errors import MessageError
from email.utils import format_datetime
from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

from babel import Locale
from babel.dates import format_date
from babel.numbers import format_currency, get_currency_precision

from mail_service import events
from mail_service.events import Item, OrderCreated
from mail_service.mime import CannotWrite, Skeleton, Values, plain_address
from mail_service.settings import Settings
from mail_service.wording import BrokenTemplate, Templates, Wording

LANGUAGES = ("ko", "en")
DIGEST_DIGITS = 12
SAMPLE = events.parse(files("mail_service").joinpath("templates/sample.json").read_bytes())
SAMPLE_AT = datetime(2026, 11, 21, 9, tzinfo=UTC)


@dataclass(frozen=True, slots=True)
class ComposedMail:
    """One mail for one recipient; `content` has CRLF line ends."""

    sender: str
    recipient: str
    content: bytes


class CannotRender(Exception):
    """No mail can be made of this event, or of any; the message holds nothing of the event."""


@dataclass(frozen=True, slots=True)
class Shop:
    """Who the mail is from, and what stands in for what an event does not say."""

    name: str
    url: str
    locale: str
    time_zone: str
    currency: str
    mail_from: str
    reply_to: str | None
    bounce_to: str | None
    templates: Path | None

    @classmethod
    def of(cls, settings: Settings) -> "Shop":
        """Take the shop's part of the settings."""
        return cls(
            name=settings.shop_name,
            url=settings.shop_url.rstrip("/"),
            locale=settings.shop_locale,
            time_zone=settings.shop_time_zone,
            currency=settings.shop_currency,
            mail_from=settings.mail_from,
            reply_to=settings.mail_reply_to,
            bounce_to=settings.mail_bounce_to,
            templates=settings.mail_templates,
        )


def message_id(order_id: str, *, mail_from: str, campaign: str = "") -> str:
    """Name an order's mail so that an operator can find it in the relay's log."""
    again = f"+{campaign}" if campaign else ""
    return f"<order-confirmation.{order_id}{again}@{mail_from.rpartition('@')[2]}>"


class Confirmation:
    """Composes confirmations; what cannot be used for any mail raises CannotRender here."""

    def __init__(self, shop: Shop) -> None:
        self._shop = shop
        self._zone = ZoneInfo(shop.time_zone)
        try:
            self._languages = {name: _Language(name, shop) for name in LANGUAGES}
        except (BrokenTemplate, CannotWrite, ValueError, MessageError) as error:
            raise CannotRender(str(error)) from error
        for language in LANGUAGES:
            tried = replace(SAMPLE, locale=language)
            self.compose(tried, event_at=SAMPLE_AT, message_id="<sample@mail.invalid>")

    @property
    def digest(self) -> str:
        """Return what tells these templates from others."""
        sources = (self._languages[name].templates.source for name in LANGUAGES)
        return hashlib.sha256("\0".join(sources).encode()).hexdigest()[:DIGEST_DIGITS]

    def compose(self, event: OrderCreated, *, event_at: datetime, message_id: str) -> ComposedMail:
        """Return the mail; raise CannotRender when the event allows none."""
        wording = self.word(event, event_at=event_at)
        try:
            recipient = plain_address(event.email)
            content = self._language(event).skeleton.fill(
                Values(
                    recipient=recipient,
                    subject=wording.subject,
                    date=_date(int(time.time())),
                    message_id=message_id,
                    order_id=event.order_id,
                    text=wording.text,
                    html=wording.html,
                )
            )
        except CannotWrite as error:
            raise CannotRender(str(error)) from error
        return ComposedMail(self._shop.bounce_to or self._shop.mail_from, recipient, content)

    def word(self, event: OrderCreated, *, event_at: datetime) -> Wording:
        """Return what the mail says; raise CannotRender."""
        language = self._language(event)
        try:
            return language.templates.say(self._facts(event, event_at, language))
        except BrokenTemplate as error:
            raise CannotRender(str(error)) from error
        except (ValueError, ArithmeticError) as error:
            raise CannotRender(type(error).__name__) from error

    def _language(self, event: OrderCreated) -> "_Language":
        """Choose by the locale's language (RFC 5646), else the shop's."""
        name = (event.locale or "").replace("_", "-").partition("-")[0].lower()
        return self._languages.get(name) or self._languages[self._shop.locale]

    def _facts(
        self, event: OrderCreated, event_at: datetime, language: "_Language"
    ) -> dict[str, Any]:
        shop = self._shop
        currency = event.currency or shop.currency
        ordered_at = (event.ordered_at or event_at).astimezone(self._zone)
        order_url = f"{shop.url}/orders/{event.order_id}"
        money = _money(language.name, currency)
        return {
            **language.facts,
            "order_url": order_url,
            "order_id": event.order_id,
            "ordered_at": f"{_day(ordered_at.date(), language.name)} {ordered_at:%H:%M}",
            "items": [
                {
                    "name": item.name,
                    "quantity": item.quantity,
                    "unit_price": money(item.unit_price),
                    "total": money(item.unit_price * item.quantity),
                }
                for item in event.items
            ],
            "amount": money(event.amount),
            "recipient": event.email,
            "markup": _markup(event, shop, currency, ordered_at, order_url),
        }


class _Language:
    """All that the mails of one language have in common."""

    def __init__(self, name: str, shop: Shop) -> None:
        self.name = name
        self.facts = {
            "language": name,
            "shop_name": shop.name,
            "shop_url": shop.url,
            "support_address": shop.reply_to or shop.mail_from,
        }
        self.templates = Templates(name, shop.templates, self.facts)
        self.skeleton = Skeleton(
            sender_name=shop.name, sender=shop.mail_from, reply_to=shop.reply_to, language=name
        )


@lru_cache(maxsize=1)
def _date(second: int) -> str:
    """Return a time as RFC 5322 writes it: the same for all mails of one second."""
    return format_datetime(datetime.fromtimestamp(second, UTC))


@lru_cache(maxsize=256)
def _day(day: date, language: str) -> str:
    """Return a day as people write it; Babel takes 19 µs."""
    return format_date(day, "long", locale=language)


@lru_cache(maxsize=256)
def _money(language: str, currency: str) -> Callable[[Decimal], str]:
    """Return how an amount, never below zero, is written: as Babel does, which takes 10 µs."""
    locale = Locale.parse(language)
    nothing = Decimal(0).scaleb(-get_currency_precision(currency))
    before, digits, after = format_currency(0, currency, locale=locale).partition(f"{nothing:f}")
    if not digits:
        raise ValueError(f"amounts in {currency} are not written in these digits")
    return lambda amount: f"{before}{amount.quantize(nothing):,f}{after}"


def _markup(
    event: OrderCreated, shop: Shop, currency: str, ordered_at: datetime, order_url: str
) -> dict[str, Any]:
    """Return the order for mail programs that show one (https://schema.org/Order)."""
    return {
        "@context": "https://schema.org",
        "@type": "Order",
        "merchant": {"@type": "Organization", "name": shop.name},
        "orderNumber": event.order_id,
        "orderStatus": "https://schema.org/OrderProcessing",
        "orderDate": ordered_at.isoformat(),
        "price": str(event.amount),
        "priceCurrency": currency,
        "url": order_url,
        "acceptedOffer": _offers(event.items, currency),
    }


def _offers(items: Sequence[Item], currency: str) -> list[dict[str, Any]]:
    return [
        {
            "@type": "Offer",
            "itemOffered": {"@type": "Product", "name": item.name, "sku": item.sku},
            "price": str(item.unit_price),
            "priceCurrency": currency,
            "eligibleQuantity": {"@type": "QuantitativeValue", "value": item.quantity},
        }
        for item in items
    ]
