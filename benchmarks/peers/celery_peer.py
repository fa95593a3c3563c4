"""Flask, Celery and Redis: a task a mail. Nothing is stored, and a lost worker loses its tasks."""

import os
import smtplib
import uuid
from functools import cache
from typing import Any

from celery import Celery
from flask import Flask, request
from peer_mail import SMTP_PORT, with_email_message, with_mime_classes

HOST = "127.0.0.1"

app = Celery("celery_peer", broker=os.environ["BROKER"])
app.conf.task_ignore_result = True
web = Flask("celery_peer")


@app.task
def as_documented(order: dict[str, Any]) -> None:
    """Connect, send, and hang up."""
    with smtplib.SMTP(HOST, SMTP_PORT) as relay:
        relay.send_message(with_email_message(order))


@app.task
def on_kept_connection(order: dict[str, Any]) -> None:
    """Send over the connection of this worker's process."""
    _kept().send_message(with_mime_classes(order))


@cache
def _kept() -> smtplib.SMTP:
    return smtplib.SMTP(HOST, SMTP_PORT)


@web.post("/orders")
def place() -> tuple[dict[str, str], int]:
    """Take an order by putting its mail into the queue."""
    order = {**request.get_json(), "orderId": str(uuid.uuid4())}
    as_documented.delay(order)
    return {"id": order["orderId"]}, 201
