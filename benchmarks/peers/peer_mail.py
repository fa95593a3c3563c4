"""The mail that every peer sends: as many bytes as ours, its lines and numbers by Jinja."""

import json
import os
from email.message import EmailMessage, Message
from email.mime.multipart import MIMEMultipart
from email.mime.text import MIMEText
from pathlib import Path
from typing import Any

from jinja2 import Template

SENDER = "orders@teahouse.example"
SMTP_PORT = int(os.environ["SMTP_PORT"])
LINES = "{% for item in order['items'] %}{{ item.name }}, {{ item.unitPrice }}\n{% endfor %}"
NUMBER = "{{ order.orderId }}"

_ours = json.loads(Path(os.environ["PEER_MAIL"]).read_text(encoding="utf-8"))
_text = Template(_ours["text"].replace(_ours["orderId"], NUMBER) + LINES)
_html = Template(
    _ours["html"].replace(_ours["orderId"], NUMBER).replace("</body>", f"{LINES}</body>"),
    autoescape=True,
)


def with_email_message(order: dict[str, Any]) -> EmailMessage:
    """Return the mail as the library's documentation builds it."""
    message = EmailMessage()
    _address(message, order)
    message.set_content(_text.render(order=order))
    message.add_alternative(_html.render(order=order), subtype="html")
    return message


def with_mime_classes(order: dict[str, Any]) -> MIMEMultipart:
    """Return the mail built of `email.mime`, which is faster."""
    message = MIMEMultipart("alternative")
    _address(message, order)
    message.attach(MIMEText(_text.render(order=order), "plain", "utf-8"))
    message.attach(MIMEText(_html.render(order=order), "html", "utf-8"))
    return message


def _address(message: Message, order: dict[str, Any]) -> None:
    message["Subject"] = f"주문이 접수되었습니다 {order['orderId']}"
    message["From"] = SENDER
    message["To"] = order["email"]
    message["Message-ID"] = f"<{order['orderId']}@teahouse.example>"
    message["X-Order-Id"] = order["orderId"]
