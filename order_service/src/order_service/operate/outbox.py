"""`outbox show`: how far an order's event is."""

import json

import click

from order_service import outbox as rows
from order_service.models import make_engine
from order_service.settings import Settings

EXIT_NOT_FOUND = 1


@click.group()
def outbox() -> None:
    """See the events on their way to the topic."""


@outbox.command()
@click.argument("order_id")
@click.option("--json", "as_json", is_flag=True, help="For scripts.")
def show(order_id: str, *, as_json: bool) -> None:
    """Show the outbox row of ORDER_ID; exit 1 when there is none."""
    with make_engine(Settings.from_environment().database_url).connect() as connection:
        found = rows.show(connection, order_id)
    if as_json:
        click.echo(json.dumps(found, default=str))
    else:
        for row in found:
            for name, value in row.items():
                click.echo(f"{name:>18}  {'' if value is None else value}")
    if not found:
        raise SystemExit(EXIT_NOT_FOUND)
