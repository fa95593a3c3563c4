"""Parts of the mail service alone, in its own environment: its SMTP client, its rendering.

    .venv/mail/bin/python -m benchmarks.mail_alone smtp PORT MAILS
    .venv/mail/bin/python -m benchmarks.mail_alone render MAILS
    .venv/mail/bin/python -m benchmarks.mail_alone words

One JSON object goes to standard output.
"""

import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from decimal import Decimal

from mail_service.confirmation import SAMPLE, Confirmation, Shop, message_id
from mail_service.dialogues import finish
from mail_service.events import Item, OrderCreated
from mail_service.settings import TIMING
from mail_service.smtp import Relay, SmtpConnection

HOST = "127.0.0.1"
SHOP = Shop(
    name="차 한 잔 Teahouse",
    url="https://teahouse.example",
    locale="ko",
    time_zone="Asia/Seoul",
    currency="KRW",
    mail_from="orders@teahouse.example",
    reply_to=None,
    bounce_to=None,
    templates=None,
)
WARM_UP_MAILS = 200


def smtp(port: int, mails: int) -> dict[str, float]:
    """Send one ready-made mail again and again over one connection."""
    composed = Confirmation(SHOP).compose(
        SAMPLE, event_at=datetime.now(UTC), message_id="<benchmark@teahouse.example>"
    )
    connection = SmtpConnection(Relay(HOST, port, "off", None, None, TIMING))

    def send(count: int) -> None:
        for _ in range(count):
            answer = finish(
                connection.deliver(
                    composed.content,
                    sender=composed.sender,
                    recipient=composed.recipient,
                    may_finish=lambda: True,
                )
            )
            if answer.code != 250:
                raise RuntimeError(str(answer))

    send(WARM_UP_MAILS)
    cpu_began, began = time.process_time(), time.perf_counter()
    send(mails)
    seconds, cpu_seconds = time.perf_counter() - began, time.process_time() - cpu_began
    finish(connection.close())
    return {"mails_per_second": mails / seconds, "cpu_us": 1e6 * cpu_seconds / mails}


def render(mails: int) -> dict[str, float]:
    """Compose Korean mails of three lines, no two prices alike."""
    confirmation = Confirmation(SHOP)
    events = []
    for number in range(mails + WARM_UP_MAILS):
        items = [
            Item(
                f"TEA-{line}",
                f"녹차 {line}호 Green tea",
                1 + line,
                Decimal(8000 + 3 * number + line),
            )
            for line in range(3)
        ]
        amount = sum((item.unit_price * item.quantity for item in items), Decimal(0))
        events.append(replace(SAMPLE, order_id=f"order-{number}", amount=amount, items=items))
    now = datetime.now(UTC)

    def compose(some: Sequence[OrderCreated]) -> None:
        for event in some:
            name = message_id(event.order_id, mail_from=SHOP.mail_from)
            confirmation.compose(event, event_at=now, message_id=name)

    compose(events[:WARM_UP_MAILS])
    began = time.process_time()
    compose(events[WARM_UP_MAILS:])
    return {"cpu_us": 1e6 * (time.process_time() - began) / mails}


def words() -> dict[str, str]:
    """Return what our mail says, for peers to say the same."""
    wording = Confirmation(SHOP).word(SAMPLE, event_at=datetime.now(UTC))
    return {"orderId": SAMPLE.order_id, "text": wording.text, "html": wording.html}


if __name__ == "__main__":
    measured: Mapping[str, float | str]
    match sys.argv[1:]:
        case ["smtp", port, mails]:
            measured = smtp(int(port), int(mails))
        case ["render", mails]:
            measured = render(int(mails))
        case ["words"]:
            measured = words()
        case _:
            sys.exit(__doc__)
    json.dump(measured, sys.stdout)
