"""`mails resend`: mails that were sent, once more, on purpose."""

import functools
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import click
from sqlalchemy import Engine

from mail_service import decisions
from mail_service.decisions import STATES, Campaign, Choice
from mail_service.kafka import Log, Reader, Topic
from mail_service.ledger import FROM_EVENTS
from mail_service.models import make_engine
from mail_service.operate.again import GONE, Made, Wanted, is_retained, make_due
from mail_service.operate.output import (
    EXIT_FOUND,
    Command,
    Consent,
    Words,
    as_json_option,
    consent_options,
    counted,
    examples,
    print_json,
    require_range,
    since_option,
    until_option,
)
from mail_service.settings import Settings

CAMPAIGN = re.compile(r"[A-Za-z0-9-]{1,64}")
IN_CAMPAIGN = "in the campaign already"
BEYOND_LIMIT = "beyond the limit"
SHOWN_REFUSED = 20
AS_WANTED = {IN_CAMPAIGN, BEYOND_LIMIT}


def campaign_options(command: Command) -> Command:
    """Give a command --campaign, --reason and --limit, which reach it as one `campaign`."""

    @click.option("--campaign", "name", required=True, help="Letters, digits and hyphens.")
    @click.option("--reason", type=Words(), required=True, help="Why; kept with the campaign.")
    @click.option("--limit", type=click.IntRange(min=1), help="Most mails, all runs together.")
    @functools.wraps(command)
    def with_campaign(*, name: str, reason: str, limit: int | None, **others: Any) -> None:
        if not CAMPAIGN.fullmatch(name):
            raise click.UsageError("--campaign: 1 to 64 letters, digits and hyphens")
        command(campaign=Campaign(name, reason, limit), **others)

    return with_campaign


@click.command(
    epilog=examples(
        "mail-service mails resend 01936f6e-7c1a-7000-8000-000000000001"
        ' --campaign lost-2026-11 --reason "asked for it"',
        "mail-service mails resend --from 2026-10-01T00:00+09:00 --to 2026-11-01T00:00+09:00"
        ' --campaign 2026-10-again --reason "the price was missing" --limit 10',
    )
)
@click.argument("order_ids", nargs=-1)
@since_option
@until_option
@campaign_options
@consent_options
@as_json_option
def resend(
    order_ids: Sequence[str],
    since: datetime | None,
    until: datetime | None,
    campaign: Campaign,
    consent: Consent,
    *,
    as_json: bool,
) -> None:
    """Send mails that are SENT once more: those of ORDER_IDS, or of the orders of a time range.

    Each order gets one mail of a campaign, under a Message-ID of its own, however often this is
    run or killed. The event is read back from the topic: what has expired there, or was erased,
    is refused. Exit 1 when something is, and it is named.
    """
    is_range = since is not None and until is not None
    if bool(order_ids) == is_range or (order_ids and (since or until)):
        raise click.UsageError("name order ids, or --from and --to")
    if since and until:
        require_range(since, until)
    settings = Settings.from_environment()
    engine = make_engine(settings.database_url)
    logs = {
        where.partition: where
        for where in Topic(settings.kafka, client_id="mail-service-resend").describe()
    }
    choice = Choice(
        states=STATES,
        order_ids=list(order_ids) or None,
        campaign=FROM_EVENTS,
        since=since,
        until=until,
    )
    wanted, known = _sort(engine, choice, campaign, logs)
    left_alone = Counter(known.values())
    plan = (
        f"campaign {campaign.name}: {len(wanted)} mails would be sent once more;"
        f" left alone: {counted(left_alone)}"
    )
    made = Made()
    if consent.to(plan) and wanted:
        with Reader(settings.kafka, client_id="mail-service-resend") as reader:
            made = make_due(
                settings,
                engine,
                reader,
                wanted,
                topic_id=next(iter(logs.values())).topic_id,
                reason=f"campaign {campaign.name}",
                campaign=campaign,
            )
    _tell(made, known | made.refused, as_json=as_json)


def _sort(
    engine: Engine, choice: Choice, campaign: Campaign, logs: Mapping[int, Log]
) -> tuple[list[Wanted], dict[str, str]]:
    """Tell what is to be sent once more from what is not, and why."""
    with decisions.deciding(engine) as connection:
        known = decisions.orders_of(connection, campaign.name)
        found = decisions.choose(connection, choice)
    wanted: list[Wanted] = []
    left_alone: dict[str, str] = {}
    for row in found:
        order_id = row["order_id"]
        if order_id in known:
            left_alone[order_id] = IN_CAMPAIGN
        elif row["state"] != "SENT":
            left_alone[order_id] = row["state"]
        elif not is_retained(row, logs):
            left_alone[order_id] = GONE
        elif campaign.limit is not None and len(known) + len(wanted) >= campaign.limit:
            left_alone[order_id] = BEYOND_LIMIT
        else:
            wanted.append(Wanted(order_id, row["partition"], row["offset"]))
    unknown = set(choice.order_ids or ()) - {row["order_id"] for row in found}
    return wanted, left_alone | dict.fromkeys(sorted(unknown), "unknown to the ledger")


def _tell(made: Made, left_alone: Mapping[str, str], *, as_json: bool) -> None:
    """Print counts, and by name what is refused; exit 1 when something is."""
    counts = Counter(left_alone.values())
    refused = {order_id: why for order_id, why in left_alone.items() if why not in AS_WANTED}
    if as_json:
        print_json({"made_due": made.order_ids, "left_alone": counts, "refused": refused})
    else:
        click.echo(f"{len(made.order_ids)} made due; left alone: {counted(counts)}")
        for order_id, why in list(refused.items())[:SHOWN_REFUSED]:
            click.echo(f"{order_id}  {why}")
        if len(refused) > SHOWN_REFUSED:
            click.echo(f"and {len(refused) - SHOWN_REFUSED} more, see --json")
    if refused:
        raise SystemExit(EXIT_FOUND)
