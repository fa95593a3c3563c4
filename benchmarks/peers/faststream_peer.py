"""FastStream at most once: sixteen mails at a time, whose records are committed before."""

import asyncio
import os
from typing import Any

from aiosmtplib import SMTP
from faststream import FastStream
from faststream.kafka import KafkaBroker
from peer_mail import SENDER, SMTP_PORT, with_mime_classes

SLOTS = 16

broker = KafkaBroker(os.environ["BROKER"], logger=None)
app = FastStream(broker, logger=None)
kept: asyncio.Queue[SMTP] = asyncio.Queue()


@app.after_startup
async def connect() -> None:
    """Open a connection for each slot."""
    for _ in range(SLOTS):
        relay = SMTP(hostname="127.0.0.1", port=SMTP_PORT, start_tls=False)
        await relay.connect()
        kept.put_nowait(relay)


@broker.subscriber(
    "order-created", group_id="peer", auto_offset_reset="earliest", max_workers=SLOTS
)
async def confirm(order: dict[str, Any]) -> None:
    """Send an order's mail over a connection that is free."""
    content = with_mime_classes(order).as_bytes().replace(b"\n", b"\r\n")
    relay = await kept.get()
    try:
        await relay.sendmail(SENDER, [order["email"]], content)
    finally:
        kept.put_nowait(relay)
