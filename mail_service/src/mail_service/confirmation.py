"""An event → the bytes of one mail."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal
from email.errors import MessageError
from email.headerregistry import Address
from email.message import EmailMessage
from email.policy import SMTP
from email.utils import format_datetime
from typing import Any
from zoneinfo import ZoneInfo

from babel.dates import format_date
from babel.numbers import format_currency
from jinja2 import Environment, PackageLoader, StrictUndefined, TemplateError, select_autoescape

from mail_service.events import OrderCreated
from mail_service.settings import Settings

LOCALES = ("ko", "en")
SUBJECTS: Mapping[str, str] = {
    "ko": "[{shop}] 주문이 접수되었습니다 (주문 번호 {order_id})",
    "en": "[{shop}] We have your order {order_id}",
}


@dataclass(frozen=True, slots=True)
class ComposedMail:
    """One mail for one recipient; `content` has CRLF line ends."""

    sender: str
    recipient: str
    content: bytes


class CannotRender(Exception):
    """No mail can be made of this event."""


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
        )


def message_id(order_id: str, *, mail_from: str) -> str:
    """Name an order's mail so that an operator can find it in the relay's log."""
    return f"<order-confirmation.{order_id}@{mail_from.rpartition('@')[2]}>"


class Confirmation:
    """Composes confirmations; templates are loaded once, a broken one fails here."""

    def __init__(self, shop: Shop) -> None:
        self._shop = shop
        self._zone = ZoneInfo(shop.time_zone)
        environment = Environment(
            loader=PackageLoader("mail_service"),
            autoescape=select_autoescape(["html"]),
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        self._templates = {
            (locale, kind): environment.get_template(f"confirmation.{locale}.{kind}")
            for locale in LOCALES
            for kind in ("txt", "html")
        }

    def compose(self, event: OrderCreated, *, event_at: datetime, message_id: str) -> ComposedMail:
        """Return the mail; raise CannotRender when the event allows none."""
        try:
            recipient = _plain_address(event.email)
            message = self._message(event, event_at, message_id, recipient)
            content = message.as_bytes(policy=SMTP)
        except (TemplateError, ValueError, ArithmeticError, MessageError) as error:
            raise CannotRender(type(error).__name__) from error
        sender = self._shop.bounce_to or self._shop.mail_from
        return ComposedMail(sender, recipient, content)

    def _message(
        self, event: OrderCreated, event_at: datetime, message_id: str, recipient: str
    ) -> EmailMessage:
        locale = self._locale(event)
        values = self._values(event, event_at, locale)
        message = EmailMessage(policy=SMTP)
        message["From"] = Address(self._shop.name, addr_spec=self._shop.mail_from)
        message["To"] = Address(addr_spec=recipient)
        message["Subject"] = SUBJECTS[locale].format(shop=self._shop.name, order_id=event.order_id)
        message["Date"] = format_datetime(datetime.now(UTC))
        message["Message-ID"] = message_id
        if self._shop.reply_to:
            message["Reply-To"] = Address(addr_spec=self._shop.reply_to)
        message["Auto-Submitted"] = "auto-generated"
        message["X-Auto-Response-Suppress"] = "All"
        message["X-Order-Id"] = event.order_id
        text, html = (self._templates[locale, kind].render(values) for kind in ("txt", "html"))
        # base64: no relay needs 8BITMIME for it, whatever a name is written in.
        message.set_content(text, cte="base64")
        message.add_alternative(html, subtype="html", cte="base64")
        # Only now: becoming multipart, a message gives its Content- headers to its first part.
        message["Content-Language"] = locale
        return message

    def _locale(self, event: OrderCreated) -> str:
        language = (event.locale or "").replace("_", "-").partition("-")[0].lower()
        return language if language in LOCALES else self._shop.locale

    def _values(self, event: OrderCreated, event_at: datetime, locale: str) -> dict[str, Any]:
        currency = event.currency or self._shop.currency
        ordered_at = (event.ordered_at or event_at).astimezone(self._zone)

        def money(amount: Decimal) -> str:
            return format_currency(amount, currency, locale=locale)

        return {
            "shop_name": self._shop.name,
            "order_url": f"{self._shop.url}/orders/{event.order_id}",
            "order_id": event.order_id,
            "ordered_at": f"{format_date(ordered_at, 'long', locale=locale)} {ordered_at:%H:%M}",
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
        }


def _plain_address(email: str) -> str:
    """Return the address as the envelope and the header carry it, its domain in ASCII."""
    local, _, domain = email.rpartition("@")
    # Without SMTPUTF8 a command and a header are ASCII: a local part cannot be made so.
    local.encode("ascii")
    return f"{local}@{domain.encode('idna').decode()}"
