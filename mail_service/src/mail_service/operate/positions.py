"""`positions list|accept-gap|rewind`: how far the topic was taken in, and what a person decides."""

from collections.abc import Sequence
from datetime import datetime
from typing import Any

import click
from sqlalchemy import Connection, Engine

from mail_service import control, decisions
from mail_service import positions as rows
from mail_service.kafka import Log, Topic
from mail_service.models import make_engine
from mail_service.operate.output import (
    EXIT_FAILED,
    EXIT_FOUND,
    Consent,
    Instant,
    as_json_option,
    consent_options,
    examples,
    print_json,
    print_table,
)
from mail_service.positions import NOT_UNPACKED, Gap, PositionMoved, Start
from mail_service.settings import Settings


@click.group()
def positions() -> None:
    """See how far the topic was taken in, and decide about gaps."""


@positions.command("list", epilog=examples("mail-service positions list --json"))
@as_json_option
def list_(*, as_json: bool) -> None:
    """List the partitions, how far behind each is, and the gaps; exit 1 when one waits."""
    settings = Settings.from_environment()
    logs = _topic(settings).describe()
    with make_engine(settings.database_url).connect() as connection:
        taken_in = rows.next_offsets(connection, logs[0].topic_id) if logs else {}
        gaps = rows.open_gaps(connection)
        reason = control.pause_reason(connection)
    found = [_shown(where, taken_in.get(where.partition)) for where in logs]
    open_gaps = [_gap_shown(gap) for gap in gaps]
    if as_json:
        print_json({"positions": found, "gaps": open_gaps, "paused": reason})
    else:
        print_table(found, as_json=False)
        if reason is not None:
            click.echo(f"\npaused: {reason}")
        if gaps:
            click.echo("\ngaps that wait for `positions accept-gap`")
            print_table(open_gaps, as_json=False)
    if gaps:
        raise SystemExit(EXIT_FOUND)


@positions.command("accept-gap", epilog=examples("mail-service positions accept-gap 3"))
@click.argument("gap_ids", nargs=-1, type=int, required=True)
@click.option("--go-on-at", type=click.IntRange(0), help="Behind a batch that cannot be unpacked.")
@consent_options
@as_json_option
def accept_gap(
    gap_ids: Sequence[int],
    go_on_at: int | None,
    *,
    consent: Consent,
    as_json: bool,
) -> None:
    """Go on behind gaps, by their ids in `positions list`; exit 1 when one of them does not wait.

    The replica that has the partition goes on within seconds. Who publishes the events can publish
    those of the gap once more: what was read already is a duplicate.
    """
    settings = Settings.from_environment()
    engine = make_engine(settings.database_url)
    with engine.connect() as connection:
        found = [gap for gap in rows.open_gaps(connection) if gap.id in gap_ids]
    if go_on_at is not None and not all(_is_behind(gap, go_on_at) for gap in found):
        raise click.UsageError(f"--go-on-at: behind a gap where {NOT_UNPACKED}")
    if go_on_at is not None and len(set(gap_ids)) > 1:
        raise click.UsageError("--go-on-at: for one gap")
    outcomes: list[dict[str, Any]] = [
        {"id": gap_id, "outcome": "does not wait"}
        for gap_id in sorted(set(gap_ids) - {gap.id for gap in found})
    ]
    plan = "\n".join(f"gap {gap.id}, {_told(gap)}: would be accepted" for gap in found)
    is_to_be = consent.to(plan or "nothing to accept")
    outcomes += [
        {"id": gap.id, "outcome": _accept(engine, gap, go_on_at) if is_to_be else "left alone"}
        for gap in found
    ]
    print_table(outcomes, as_json=as_json)
    if any(each["outcome"] == "does not wait" for each in outcomes):
        raise SystemExit(EXIT_FOUND)


@positions.command(
    epilog=examples(
        "mail-service positions rewind --dry-run",
        "mail-service positions rewind --to 2026-11-20T08:00+09:00 --partition 0",
    )
)
@click.option("--partition", "partitions", multiple=True, type=click.IntRange(0))
@click.option("--to", "moment", type=Instant(), help="To the first record of this time or later.")
@click.option("--hold-due", is_flag=True, help="Hold what is due: after the ledger was restored.")
@consent_options
@as_json_option
def rewind(
    partitions: Sequence[int],
    moment: datetime | None,
    *,
    hold_due: bool,
    consent: Consent,
    as_json: bool,
) -> None:
    """Have partitions read again from an earlier time, or from where the ledger is.

    For a ledger that was lost or restored to an earlier state, when replicas refuse to start
    because the group was further than it knows. What is read again and unknown is taken in as
    HELD, because it may have been sent by what the ledger has forgotten; where the group was
    further, what is due is HELD too, and so is all that lies in the topic now. Then `mails list
    --state HELD`, the relay's log, and `mails settle` or `mails retry`.
    """
    settings = Settings.from_environment()
    engine = make_engine(settings.database_url)
    topic = _topic(settings)
    logs = topic.describe(partitions or None)
    offsets = topic.offsets_at(moment, logs) if moment else {}
    with engine.connect() as connection:
        # Nothing is committed here: a ledger that was lost has no positions before consent.
        starts = {where.partition: _start_of(connection, where) for where in logs}
    is_held = hold_due or any(
        (where.committed or 0) > starts[where.partition].next_offset for where in logs
    )
    moves = [
        _move(where, starts[where.partition], offsets.get(where.partition), is_held=is_held)
        for where in logs
    ]
    plan = "\n".join(
        f"partition {move['partition']}: from {move['to']} on, HELD below {move['held_until']}"
        for move in moves
    ) + ("\nwhat is due now would be HELD" if is_held else "")
    held = 0
    if is_to_be := consent.to(plan):
        with decisions.deciding(engine) as connection:
            for where, move in zip(logs, moves, strict=True):
                _start_of(connection, where)
                rows.rewind(
                    connection,
                    topic_id=where.topic_id,
                    partition=where.partition,
                    next_offset=move["to"],
                    held_until=move["held_until"],
                )
            held = decisions.hold_due(connection) if is_held else 0
    if as_json:
        print_json({"positions": moves, "are_rewound": is_to_be, "held": held})
    else:
        click.echo(f"rewound; {held} mails HELD" if is_to_be else "left alone")


def _topic(settings: Settings) -> Topic:
    return Topic(settings.kafka, client_id="mail-service-positions")


def _start_of(connection: Connection, where: Log) -> Start:
    start = rows.start_of(
        connection,
        cluster_id=where.cluster_id,
        topic_id=where.topic_id,
        partition=where.partition,
        log_start=where.start,
    )
    if start.cluster_id != where.cluster_id:
        click.echo(f"the ledger is of the cluster {start.cluster_id}, not of this one", err=True)
        raise SystemExit(EXIT_FAILED)
    return start


def _move(where: Log, start: Start, offset: int | None, *, is_held: bool) -> dict[str, int]:
    """Say where a partition goes, and up to where its records may have been mailed.

    The group's commits are only a witness: of a ledger that is behind anything in the log may have.
    """
    known = (where.end, where.committed or 0) if is_held else ()
    return {
        "partition": where.partition,
        "from": start.next_offset,
        "to": start.next_offset if offset is None else min(start.next_offset, offset),
        "held_until": max((start.next_offset, *known)),
    }


def _is_behind(gap: Gap, go_on_at: int) -> bool:
    return gap.reason == NOT_UNPACKED and go_on_at > gap.first_offset


def _accept(engine: Engine, gap: Gap, go_on_at: int | None) -> str:
    try:
        with decisions.deciding(engine) as connection:
            next_offset = rows.accept_gap(connection, gap, go_on_at=go_on_at)
    except PositionMoved:
        return "does not wait"
    return "accepted" if next_offset is None else f"goes on at {next_offset}"


def _shown(where: Log, next_offset: int | None) -> dict[str, Any]:
    return {
        "partition": where.partition,
        "next_offset": next_offset,
        "lag": max(0, where.end - (where.start if next_offset is None else next_offset)),
        "log_start": where.start,
        "log_end": where.end,
        "committed": where.committed,
    }


def _gap_shown(gap: Gap) -> dict[str, Any]:
    return {name: getattr(gap, name) for name in Gap.__slots__}


def _told(gap: Gap) -> str:
    end = "" if gap.end_offset is None else f" up to {gap.end_offset}"
    return f"partition {gap.partition} from {gap.first_offset}{end}, {gap.reason}"
