"""`replay`: a time range of the topic gone over again, beside the live group."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

import click
from sqlalchemy import Engine

from mail_service import events, positions, views
from mail_service.events import UnreadableRecord
from mail_service.kafka import Log, Reader, Record, Topic
from mail_service.models import make_engine
from mail_service.operate.again import Wanted, make_due, ranges_from
from mail_service.operate.output import (
    Consent,
    Instant,
    as_json_option,
    consent_options,
    counted,
    examples,
    print_json,
    progress,
    require_range,
)
from mail_service.settings import Settings
from mail_service.startup import CLOSED_ROWS_DAYS


@dataclass(slots=True)
class Findings:
    """The events of a range: by what the ledger has of them, and those that it does not know."""

    counts: Counter[str] = field(default_factory=Counter)
    wanted: dict[str, Wanted] = field(default_factory=dict)
    recipients: set[str] = field(default_factory=set)


@click.command(
    epilog=examples("mail-service replay --from 2026-10-01T00:00+09:00 --to 2026-11-01T00:00+09:00")
)
@click.option("--from", "since", type=Instant(), required=True, help="Such as 2026-11-01T00:00Z.")
@click.option("--to", "until", type=Instant(), help="Up to, not including; now, if not named.")
@consent_options
@as_json_option
def replay(
    since: datetime,
    until: datetime | None,
    *,
    consent: Consent,
    as_json: bool,
) -> None:
    """Make due the mails of a time range that the ledger does not know.

    What it knows is left as it is: nothing that was sent is sent again (`mails resend` does that),
    nothing DEAD is tried again (`mails retry`). Reads beside the group, whose offsets stay; records
    that the group has not come to yet are left to it. Safe to be repeated.
    """
    until = until or datetime.now(UTC)
    require_range(since, until)
    if since < datetime.now(UTC) - timedelta(days=CLOSED_ROWS_DAYS):
        raise click.UsageError(
            f"--from: the ledger remembers closed mails for {CLOSED_ROWS_DAYS} days; what was sent"
            " before could be sent again"
        )
    settings = Settings.from_environment()
    engine = make_engine(settings.database_url)
    topic = Topic(settings.kafka, client_id="mail-service-replay")
    logs = topic.describe()
    ranges = ranges_from(topic, since, logs)
    if not any(ranges.values()):
        raise click.UsageError(f"the topic has no record of {since.isoformat()} or later")
    with Reader(settings.kafka, client_id="mail-service-replay") as reader:
        found = _look(engine, reader, logs, ranges, since, until)
        if not found.counts:
            raise click.UsageError(
                f"the topic has no event between {since.isoformat()} and {until.isoformat()}"
            )
        plan = (
            f"{found.counts.total()} events in the range: {counted(found.counts)};"
            f" {len(found.wanted)} mails to {len(found.recipients)} recipients would be sent"
        )
        made: list[str] = []
        refused: Counter[str] = Counter()
        if consent.to(plan) and found.wanted:
            done = make_due(
                settings,
                engine,
                reader,
                list(found.wanted.values()),
                topic_id=logs[0].topic_id,
                reason="replayed",
            )
            made, refused = done.order_ids, Counter(done.refused.values())
    if as_json:
        print_json({"events": found.counts, "made_due": made, "left_alone": refused})
    else:
        click.echo(f"{len(made)} made due; left alone: {counted(refused)}")


def _look(
    engine: Engine,
    reader: Reader,
    logs: Sequence[Log],
    ranges: Mapping[int, range],
    since: datetime,
    until: datetime,
) -> Findings:
    """Compare a range with the ledger, each event once."""
    topic_id = logs[0].topic_id
    found = Findings()
    with engine.connect() as connection:
        read_up_to = positions.next_offsets(connection, topic_id)
    with progress("reading the topic", sum(map(len, ranges.values()))) as advance:
        for records in reader.read_between(ranges, topic_id=topic_id):
            fresh: dict[str, Wanted] = {}
            recipients: dict[str, str] = {}
            for record, event in _events(records, since, until, found.counts):
                wanted = Wanted(event.order_id, record.partition, record.offset)
                if record.offset >= read_up_to.get(record.partition, 0):
                    found.counts["not read yet"] += 1
                elif event.order_id not in found.wanted:
                    fresh.setdefault(event.order_id, wanted)
                    recipients[event.order_id] = event.email
            with engine.connect() as connection:
                known = views.states(connection, list(fresh))
            found.counts.update(known.values())
            for order_id in fresh.keys() - known.keys():
                found.counts["unknown"] += 1
                found.wanted[order_id] = fresh[order_id]
                found.recipients.add(recipients[order_id])
            advance(len(records))
    return found


def _events(
    records: Sequence[Record], since: datetime, until: datetime, counts: Counter[str]
) -> Iterator[tuple[Record, events.OrderCreated]]:
    """Yield what can be read of the range; count what cannot."""
    for record in records:
        if not since <= events.occurred_at(record) < until:
            continue
        try:
            event = events.read(record)
        except UnreadableRecord:
            counts["unreadable"] += 1
            continue
        if event is not None:
            yield record, event
