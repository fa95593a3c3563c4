"""`erase`: a customer's address, out of everything the order service keeps."""

import json
import math
import os
from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

import click
from marshmallow import ValidationError
from sqlalchemy import Engine

from order_service import events, personal
from order_service.kafka import TOPIC, KafkaUnavailable, Topic
from order_service.models import make_engine
from order_service.operate.output import (
    EXIT_FAILED,
    EXIT_FOUND,
    as_json_option,
    examples,
    print_table,
    progress,
)
from order_service.schemas import Email
from order_service.settings import Settings

STDIN = 0


@click.command(
    epilog=examples(
        "order-service erase --email minji@example.com --dry-run",
        "order-service erase --email minji@example.com --yes | mail-service erase --yes -",
        "order-service erase 01936f6e-7c1a-7000-8000-000000000001 --yes --json",
    )
)
@click.argument("order_ids", nargs=-1, type=click.UUID, metavar="[ORDER_ID]...")
@click.option("--email", metavar="ADDRESS", help="Orders with this address, in any case.")
@click.option("--user", metavar="USER", help="Orders of this user.")
@click.option("--dry-run", "is_dry_run", is_flag=True, help="Change nothing; list the orders.")
@click.option("--yes", "is_sure", is_flag=True, help="Ask nothing.")
@as_json_option
def erase(
    order_ids: Sequence[UUID],
    email: str | None,
    user: str | None,
    *,
    is_dry_run: bool,
    is_sure: bool,
    as_json: bool,
) -> None:
    """Erase the customer's address from orders, their events and their Idempotency-Keys.

    Takes every order that has one of the ids, the address or the user. Prints the order ids, for
    `mail-service erase`, and only then begins: however it ends, the mail side can know them all.
    What the topic keeps, and until when, is said on standard error. It may be repeated. Exit 1 when
    an ORDER_ID is not known or there is no such order.
    """
    if email is None and user is None and not order_ids:
        raise click.UsageError("name order ids, --email or --user")
    if not (is_sure or is_dry_run or os.isatty(STDIN)):
        raise click.UsageError("nobody is there to ask: --yes erases, --dry-run lists the orders")
    settings = Settings.from_environment()
    engine = make_engine(settings.database_url)
    orders = personal.select(
        engine, order_ids=order_ids, email=_as_ordered_with(email), user_id=user
    )
    unknown = sorted(set(order_ids).difference(order.id for order in orders))
    for order_id in unknown:
        click.echo(f"{order_id} is not known", err=True)
    kept_until = _kept_until(Topic(settings.kafka), orders) if orders else None
    if is_dry_run:
        _list(orders, as_json=as_json)
    else:
        _confirm(len(orders), is_sure=is_sure or not orders)
        _print_ids(orders, kept_until, as_json=as_json)
        _erase(engine, [order.id for order in orders])
    if unknown or not orders:
        raise SystemExit(EXIT_FOUND)


def _as_ordered_with(email: str | None) -> str | None:
    """Write an address as the API does; one that it would not take now stays as it is."""
    try:
        return None if email is None else Email().deserialize(email)
    except ValidationError:
        return email


def _kept_until(topic: Topic, orders: Sequence[Any]) -> datetime | None:
    """Say when the topic will have deleted the orders' records, and return it if it is known.

    A record goes with its segment, which a younger one may hold back for as long as the segment
    takes records.
    """
    published = [order.published_at for order in orders if order.published_at is not None]
    if not published:
        return None
    until = None
    try:
        settings = topic.settings()
        retention_ms, segment_ms = int(settings["retention.ms"]), int(settings["segment.ms"])
        kept_ms = retention_ms + segment_ms if retention_ms >= 0 else math.inf
        until = max(published) + timedelta(milliseconds=kept_ms)
        told = f"until {events.instant(until)} at the latest"
    except OverflowError:
        told = "for ever"
    except KafkaUnavailable as error:
        told = f"nobody knows how long (Kafka: {error})"
    click.echo(f"the topic {TOPIC} keeps their records, with the address, {told}", err=True)
    return until


def _list(orders: Sequence[Any], *, as_json: bool) -> None:
    rows = [
        {
            "order_id": order.id,
            "ordered_at": order.ordered_at,
            "email": events.masked_address(order.email),
        }
        for order in orders
    ]
    print_table(rows, as_json=as_json)


def _confirm(count: int, *, is_sure: bool) -> None:
    if not is_sure and not click.confirm(
        f"Orders found: {count}. Erase the address from them?", err=True
    ):
        raise SystemExit(EXIT_FAILED)


def _print_ids(orders: Sequence[Any], kept_until: datetime | None, *, as_json: bool) -> None:
    order_ids = [str(order.id) for order in orders]
    if as_json:
        until = None if kept_until is None else events.instant(kept_until)
        click.echo(json.dumps({"order_ids": order_ids, "topic_keeps_until": until}))
    elif order_ids:
        click.echo("\n".join(order_ids))


def _erase(engine: Engine, order_ids: Sequence[UUID]) -> None:
    with progress("erasing", len(order_ids)) as advance:
        for count in personal.erase(engine, order_ids):
            advance(count)
    click.echo(f"erased: {len(order_ids)} orders", err=True)
    # Also when there was nothing to erase: an earlier run may have been ended before it came here.
    personal.renew_samples(engine)
