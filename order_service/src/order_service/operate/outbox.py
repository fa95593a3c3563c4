"""`outbox list|show|retry|republish`: the events on their way to the topic."""

from collections.abc import Sequence

import click

from order_service import outbox as rows
from order_service.models import make_engine
from order_service.operate.output import (
    EXIT_FOUND,
    as_json_option,
    examples,
    print_rows,
    print_table,
)
from order_service.settings import Settings

STATES = (*rows.OPEN, "COMPLETED")
LIST_COLUMNS = ("order_id", "state", "occurred_at", "republished_count", "reason")
DEFAULT_LIMIT = 100
MOST_LISTED = 10_000

dry_run_option = click.option(
    "--dry-run", "is_dry_run", is_flag=True, help="Change nothing; print what would be."
)


@click.group()
def outbox() -> None:
    """See the events on their way to the topic, and repair."""


@outbox.command(
    "list",
    epilog=examples("order-service outbox list", "order-service outbox list --state FAILED --json"),
)
@click.option("--state", "states", multiple=True, type=click.Choice(STATES), default=rows.OPEN)
@click.option("--limit", default=DEFAULT_LIMIT, type=click.IntRange(1, MOST_LISTED))
@as_json_option
def list_(states: Sequence[str], limit: int, *, as_json: bool) -> None:
    """List events, oldest first; without --state those not yet seen in the topic."""
    with make_engine(Settings.from_environment().database_url).connect() as connection:
        found = rows.list_rows(connection, dict.fromkeys(states), limit=limit)
    if not as_json:
        found = [{name: row[name] for name in LIST_COLUMNS} for row in found]
    print_table(found, as_json=as_json)


@outbox.command(epilog=examples("order-service outbox show 01936f6e-7c1a-7000-8000-000000000001"))
@click.argument("order_id")
@as_json_option
def show(order_id: str, *, as_json: bool) -> None:
    """Show the outbox row of ORDER_ID; exit 1 when there is none."""
    with make_engine(Settings.from_environment().database_url).connect() as connection:
        found = rows.show(connection, order_id)
    print_rows(found, as_json=as_json)
    if not found:
        raise SystemExit(EXIT_FOUND)


@outbox.command(
    epilog=examples(
        "order-service outbox retry --all --dry-run",
        "order-service outbox retry 01936f6e-7c1a-7000-8000-000000000001",
    )
)
@click.argument("order_ids", nargs=-1)
@click.option("--all", "is_all", is_flag=True, help="Every event that has FAILED.")
@dry_run_option
@as_json_option
def retry(order_ids: Sequence[str], *, is_all: bool, is_dry_run: bool, as_json: bool) -> None:
    """Let FAILED events be published again; exit 1 when one of ORDER_IDS has none."""
    if is_all == bool(order_ids):
        raise click.UsageError("name order ids, or --all")
    which = None if is_all else list(order_ids)
    with make_engine(Settings.from_environment().database_url).begin() as connection:
        moved = rows.retry(connection, which, is_dry_run=is_dry_run)
    _tell(moved, order_ids, is_dry_run=is_dry_run, as_json=as_json)


@outbox.command(
    epilog=examples(
        "order-service outbox republish 01936f6e-7c1a-7000-8000-000000000001",
        "order-service reconcile --from 2026-11-01T00:00Z --json | jq -r '.missing[]' |"
        " xargs order-service outbox republish",
    )
)
@click.argument("order_ids", nargs=-1, required=True)
@dry_run_option
@as_json_option
def republish(order_ids: Sequence[str], *, is_dry_run: bool, as_json: bool) -> None:
    """Publish events once more that were PUBLISHED or COMPLETED.

    For what the topic has lost, as `reconcile` tells. An event keeps its id: who has it already
    takes it for a duplicate. Rows are kept for 14 days after COMPLETED; exit 1 when one of
    ORDER_IDS has none in these states.
    """
    with make_engine(Settings.from_environment().database_url).begin() as connection:
        moved = rows.republish(connection, order_ids, is_dry_run=is_dry_run)
    _tell(moved, order_ids, is_dry_run=is_dry_run, as_json=as_json)


def _tell(
    moved: Sequence[str], order_ids: Sequence[str], *, is_dry_run: bool, as_json: bool
) -> None:
    becomes = "would be INIT" if is_dry_run else "INIT"
    left_alone = sorted(set(order_ids).difference(moved))
    outcome = [{"order_id": order_id, "outcome": becomes} for order_id in moved]
    outcome += [{"order_id": order_id, "outcome": "left alone"} for order_id in left_alone]
    print_table(outcome, as_json=as_json)
    if left_alone:
        raise SystemExit(EXIT_FOUND)
