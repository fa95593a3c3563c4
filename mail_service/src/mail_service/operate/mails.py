"""`mails show`: what became of an order's mail."""

import json

import click

from mail_service import ledger
from mail_service.models import make_engine
from mail_service.settings import Settings

EXIT_NOT_FOUND = 1


@click.group()
def mails() -> None:
    """See the ledger."""


@mails.command()
@click.argument("order_id")
@click.option("--json", "as_json", is_flag=True, help="For scripts.")
def show(order_id: str, *, as_json: bool) -> None:
    """Show the mails of ORDER_ID; exit 1 when the ledger knows none."""
    with make_engine(Settings.from_environment().database_url).connect() as connection:
        found = ledger.show(connection, order_id)
    if as_json:
        click.echo(json.dumps(found, default=str))
    else:
        for row in found:
            for name, value in row.items():
                click.echo(f"{name:>12}  {'' if value is None else value}")
    if not found:
        raise SystemExit(EXIT_NOT_FOUND)
