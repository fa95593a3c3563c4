"""`mails list|show|retry|resend|settle`: the ledger as an operator sees and decides it."""

import functools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any

import click
from sqlalchemy import RowMapping

from mail_service import decisions
from mail_service.decisions import OPEN, RELEASED, SETTLED, STATES, Choice, Settlement
from mail_service.ledger import FROM_EVENTS
from mail_service.models import make_engine
from mail_service.operate.output import (
    EXIT_FOUND,
    Command,
    Consent,
    Words,
    addresses_option,
    as_json_option,
    consent_options,
    counted,
    examples,
    masked,
    print_json,
    print_rows,
    print_table,
    progress,
    since_option,
    until_option,
)
from mail_service.operate.resend import resend
from mail_service.settings import Settings

LIST_COLUMNS = ("order_id", "campaign", "state", "attempts", "due_at", "recipient", "reason")
SHOW_COLUMNS = (
    "order_id",
    "campaign",
    "state",
    "recipient",
    "attempts",
    "unknown_count",
    "message_id",
    "event_at",
    "topic_id",
    "partition",
    "offset",
    "taken_in_at",
    "due_at",
    "give_up_at",
    "reason",
    "owner",
    "sent_at",
    "sent_by",
    "reply",
    "release",
    "template_digest",
)
DEFAULT_LIMIT = 100
MOST_LISTED = 10_000
BATCH = 1000
TOLD_REASONS = 10


def which_options(states: Sequence[str], *, is_waiting: bool = False) -> Callable[..., Command]:
    """Give a command ORDER_IDS, --all and what narrows them, which reach it as one `choice`."""

    def decorate(command: Command) -> Command:
        @click.argument("order_ids", nargs=-1)
        @click.option("--all", "is_all", is_flag=True, help="Every mail that the options leave.")
        @click.option("--state", "states", multiple=True, type=click.Choice(states), default=states)
        @click.option("--campaign", help="Only those of this campaign.")
        @click.option("--reason", help="Only those whose reason holds this text.")
        @since_option
        @until_option
        @functools.wraps(command)
        def with_choice(
            *,
            order_ids: Sequence[str],
            is_all: bool,
            states: Sequence[str],
            campaign: str | None,
            reason: str | None,
            since: datetime | None,
            until: datetime | None,
            **others: Any,
        ) -> None:
            if is_all == bool(order_ids):
                raise click.UsageError("name order ids, or --all")
            choice = Choice(
                states=states,
                order_ids=list(order_ids) or None,
                campaign=campaign,
                reason=reason,
                since=since,
                until=until,
                is_waiting=is_waiting,
            )
            command(choice=choice, **others)

        return with_choice

    return decorate


@click.group()
def mails() -> None:
    """See the ledger, and decide what waits for a person."""


mails.add_command(resend)


@mails.command(
    "list",
    epilog=examples(
        "mail-service mails list --state DEAD --state HELD",
        "mail-service mails list --state UNKNOWN --json",
    ),
)
@click.option("--state", "states", multiple=True, type=click.Choice(STATES), default=OPEN)
@click.option("--campaign", help="Only those of this campaign.")
@click.option("--reason", help="Only those whose reason holds this text.")
@since_option
@until_option
@click.option("--limit", default=DEFAULT_LIMIT, type=click.IntRange(1, MOST_LISTED))
@addresses_option
@as_json_option
def list_(
    states: Sequence[str],
    campaign: str | None,
    reason: str | None,
    since: datetime | None,
    until: datetime | None,
    limit: int,
    *,
    show_addresses: bool,
    as_json: bool,
) -> None:
    """List mails by the time of their orders; without --state the open ones."""
    choice = Choice(states=states, campaign=campaign, reason=reason, since=since, until=until)
    with make_engine(Settings.from_environment().database_url).connect() as connection:
        found = decisions.choose(connection, choice, limit=limit)
    columns = SHOW_COLUMNS if as_json else LIST_COLUMNS
    print_table(_shown(found, columns, show_addresses=show_addresses), as_json=as_json)


@mails.command(
    epilog=examples("mail-service mails show 01936f6e-7c1a-7000-8000-000000000001 --json")
)
@click.argument("order_id")
@addresses_option
@as_json_option
def show(order_id: str, *, show_addresses: bool, as_json: bool) -> None:
    """Show the mails of ORDER_ID; exit 1 when the ledger knows none."""
    with make_engine(Settings.from_environment().database_url).connect() as connection:
        found = decisions.choose(connection, Choice(states=STATES, order_ids=[order_id]))
    print_rows(_shown(found, SHOW_COLUMNS, show_addresses=show_addresses), as_json=as_json)
    if not found:
        raise SystemExit(EXIT_FOUND)


@mails.command(
    epilog=examples(
        "mail-service mails retry 01936f6e-7c1a-7000-8000-000000000001",
        "mail-service mails retry --all --state DEAD --reason expired --dry-run",
    )
)
@which_options(RELEASED)
@consent_options
@as_json_option
def retry(choice: Choice, consent: Consent, *, as_json: bool) -> None:
    """Let DEAD and HELD mails be sent, with their full time again.

    Exit 1 when one of ORDER_IDS has none.
    """
    settings = Settings.from_environment()
    engine = make_engine(settings.database_url)
    with engine.connect() as connection:
        found = decisions.choose(connection, choice)
    released: list[int] = []
    if consent.to(_plan(found, "would be sent")):
        patience = timedelta(hours=settings.mail_give_up_hours)
        with progress("releasing", len(found)) as advance:
            for start in range(0, len(found), BATCH):
                ids = [row["id"] for row in found[start : start + BATCH]]
                with decisions.deciding(engine) as connection:
                    released += decisions.retry(connection, ids, patience=patience)
                advance(len(ids))
    _tell(found, released, choice, "RETRY", as_json=as_json)


@mails.command(
    epilog=examples(
        'mail-service mails settle 01936f6e-7c1a-7000-8000-000000000001 --sent --why "in its log"',
        'mail-service mails settle --all --state UNKNOWN --send --why "the relay was reset"',
    )
)
@click.option("--sent", "settlement", flag_value="sent", help="It had arrived.")
@click.option("--send", "settlement", flag_value="send", help="It had not: send it.")
@click.option("--dead", "settlement", flag_value="dead", help="Leave it unsent.")
@click.option("--why", type=Words(), required=True, help="How you know; kept with the mail.")
@which_options(SETTLED, is_waiting=True)
@consent_options
@as_json_option
def settle(
    settlement: str | None, why: str, choice: Choice, consent: Consent, *, as_json: bool
) -> None:
    """Say what became of mails that wait for a person: UNKNOWN without a due time, or HELD.

    The SMTP relay's log knows each by its Message-ID. Exit 1 when one of ORDER_IDS has none.
    """
    if settlement is None:
        raise click.UsageError("say --sent, --send or --dead")
    settings = Settings.from_environment()
    engine = make_engine(settings.database_url)
    with engine.connect() as connection:
        found = decisions.choose(connection, choice)
    settled: list[int] = []
    if consent.to(_plan(found, f"would be settled as {settlement}")):
        with decisions.deciding(engine) as connection:
            settled = decisions.settle(
                connection,
                [row["id"] for row in found],
                Settlement(settlement),
                reason=why,
                patience=timedelta(hours=settings.mail_give_up_hours),
            )
    _tell(found, settled, choice, f"settled as {settlement}", as_json=as_json)


def _plan(found: Sequence[RowMapping], what: str) -> str:
    recipients = {decisions.recipient(row) for row in found}
    reasons = Counter(f"{row['state']} ({row['reason']})" for row in found)
    states = Counter(dict(reasons.most_common(TOLD_REASONS)))
    if others := reasons.total() - states.total():
        states["for other reasons"] = others
    return f"{len(found)} mails to {len(recipients)} recipients {what}: {counted(states)}"


def _tell(
    found: Sequence[RowMapping],
    changed: Sequence[int],
    choice: Choice,
    outcome: str,
    *,
    as_json: bool,
) -> None:
    are_changed = set(changed)
    rows = [
        {
            "order_id": row["order_id"],
            "campaign": row["campaign"],
            "outcome": outcome if row["id"] in are_changed else "left alone",
        }
        for row in found
    ]
    unknown = sorted(set(choice.order_ids or ()) - {row["order_id"] for row in found})
    rows += [
        {"order_id": order_id, "campaign": FROM_EVENTS, "outcome": "none in these states"}
        for order_id in unknown
    ]
    if as_json:
        print_json(rows)
    else:
        print_table(rows[:DEFAULT_LIMIT], as_json=False)
        if len(rows) > DEFAULT_LIMIT:
            click.echo(f"and {len(rows) - DEFAULT_LIMIT} more, see --json")
    if unknown:
        raise SystemExit(EXIT_FOUND)


def _shown(
    rows: Sequence[RowMapping], columns: Sequence[str], *, show_addresses: bool
) -> list[dict[str, Any]]:
    return [_one_shown(row, columns, show_addresses=show_addresses) for row in rows]


def _one_shown(row: RowMapping, columns: Sequence[str], *, show_addresses: bool) -> dict[str, Any]:
    recipient = decisions.recipient(row)
    if recipient is not None and not show_addresses:
        recipient = masked(recipient)
    values: Mapping[str, Any] = {**row, "recipient": recipient, "owner": row["replica"]}
    return {name: values[name] for name in columns}
