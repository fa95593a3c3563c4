"""`erase`: forget a customer's address, for good."""

import re
import sys
from collections.abc import Iterator, Sequence

import click
from sqlalchemy import Engine

from mail_service import dead_letters, decisions
from mail_service.decisions import OPEN, Choice
from mail_service.models import make_engine
from mail_service.operate.output import (
    Consent,
    as_json_option,
    consent_options,
    examples,
    masked,
    print_json,
    progress,
)
from mail_service.settings import Settings

ORDER_ID = re.compile(r"(?=.{1,64}\Z)[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*")
FROM_STANDARD_INPUT = "-"
BATCH = 1000


@click.command(
    epilog=examples(
        "mail-service erase --yes - < order-ids.txt", "mail-service erase --email minji@example.com"
    )
)
@click.argument("order_ids", nargs=-1)
@click.option("--email", help="Also open mails and dead letters that hold this address.")
@consent_options
@as_json_option
def erase(
    order_ids: Sequence[str],
    email: str | None,
    *,
    consent: Consent,
    as_json: bool,
) -> None:
    """Make the mails of orders ERASED, also those of orders that are not known yet.

    Nothing sends them again: no record that comes once more, no replay, no campaign. Order ids
    come as arguments, or with - from standard input. The topic keeps its records until they
    expire. Safe to be repeated.
    """
    settings = Settings.from_environment()
    engine = make_engine(settings.database_url)
    chosen = dict.fromkeys(_read(order_ids))
    if email is not None:
        chosen |= dict.fromkeys(_orders_to(engine, email))
    if not chosen and email is None:
        raise click.UsageError("name order ids, - or --email")
    whom = f", and dead letters with {masked(email)}" if email else ""
    plan = f"the mails of {len(chosen)} orders{whom} would be erased"
    counts = {"erased": 0, "unknown_before": 0, "dead_letters": 0}
    if consent.to(plan):
        ids = list(chosen)
        with progress("erasing", len(ids)) as advance:
            for start in range(0, len(ids), BATCH):
                batch = ids[start : start + BATCH]
                with decisions.deciding(engine) as connection:
                    erased, new = decisions.erase(connection, batch)
                counts["erased"] += erased
                counts["unknown_before"] += new
                advance(len(batch))
        # Now that its order is ERASED, a dead letter that is read again becomes no mail.
        with decisions.deciding(engine) as connection:
            counts["dead_letters"] = dead_letters.erase(connection, ids, email)
    if as_json:
        print_json({"order_ids": list(chosen), **counts})
    else:
        click.echo(
            f"{counts['erased']} mails erased, {counts['unknown_before']} orders were not known,"
            f" {counts['dead_letters']} dead letters emptied"
        )


def _read(order_ids: Sequence[str]) -> Iterator[str]:
    for text in order_ids:
        lines = sys.stdin if text == FROM_STANDARD_INPUT else [text]
        for line in lines:
            order_id = line.strip()
            if order_id and not ORDER_ID.fullmatch(order_id):
                raise click.UsageError(f"{order_id!r} is no order id")
            if order_id:
                yield order_id


def _orders_to(engine: Engine, email: str) -> Iterator[str]:
    """Yield the orders whose open mails go there; a closed one holds no address."""
    with engine.connect() as connection:
        for row in decisions.choose(connection, Choice(states=OPEN)):
            recipient = decisions.recipient(row)
            if recipient is not None and recipient.lower() == email.lower():
                yield row["order_id"]
