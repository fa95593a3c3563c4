"""`reconcile`: every record of a time range has its mail, and no order two."""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime

import click
from sqlalchemy import Engine, RowMapping, text

from mail_service import dead_letters, decisions, events, positions, views
from mail_service.events import UnreadableRecord
from mail_service.kafka import Log, Reader, Topic
from mail_service.models import make_engine
from mail_service.operate.again import ranges_from
from mail_service.operate.output import (
    EXIT_FOUND,
    Instant,
    as_json_option,
    examples,
    print_json,
    progress,
    require_range,
)
from mail_service.settings import Settings

SHOWN_IDS = 20
ASKED_IDS = 1000
NO_HURRY = text("SELECT set_config('statement_timeout', '0', true)")


@dataclass(slots=True)
class Scan:
    """The range's records in the topic: where each order's event is, and what was not readable."""

    records: int = 0
    orders: dict[str, tuple[int, int]] = field(default_factory=dict)
    unreadable: dict[int, list[int]] = field(default_factory=lambda: defaultdict(list))


@dataclass(slots=True)
class Report:
    """Records of a range against the ledger; the last three should be empty.

    A double is a mail that was accepted at least once and whose earlier attempt nobody knows the
    end of. `unread` are partition and offset of records that left no dead letter.
    """

    records: int = 0
    orders: int = 0
    states: dict[str, int] = field(default_factory=dict)
    dead_letters: int = 0
    waiting: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unread: list[str] = field(default_factory=list)
    doubles: list[str] = field(default_factory=list)


@click.command(
    epilog=examples("mail-service reconcile --from 2026-11-20T00:00Z --to 2026-11-21T00:00Z")
)
@click.option("--from", "since", type=Instant(), required=True, help="Such as 2026-11-01T00:00Z.")
@click.option("--to", "until", type=Instant(), help="Up to, not including; now, if not named.")
@click.option("--ids", is_flag=True, help="With --json: every order id of the ledger, by state.")
@as_json_option
def reconcile(since: datetime, until: datetime | None, *, ids: bool, as_json: bool) -> None:
    """Compare the topic's records of a range of time with the ledger.

    Counts the mails by state, and names each order in the topic that the ledger has lost
    (`replay` makes it due), each unreadable record without a dead letter, and each mail that may
    have gone out twice; exit 1 when there is one. Keeps every order id of the range in memory,
    about 300 MB a million.
    """
    until = until or datetime.now(UTC)
    require_range(since, until)
    if ids and not as_json:
        raise click.UsageError("--ids goes with --json")
    settings = Settings.from_environment()
    engine = make_engine(settings.database_url)
    topic = Topic(settings.kafka, client_id="mail-service-reconcile")
    logs = topic.describe()
    # Asked before the ledger: what lies below these positions must be in it.
    with engine.connect() as connection:
        read_up_to = positions.next_offsets(connection, logs[0].topic_id)
    scan = _scan(settings, topic, logs, since, until)
    report, by_state = _compare(engine, scan, logs[0].topic_id, read_up_to, since, until)
    if as_json:
        print_json(asdict(report) | ({"order_ids": by_state} if ids else {}))
    else:
        _print(report)
    if report.missing or report.unread or report.doubles:
        raise SystemExit(EXIT_FOUND)


def _scan(
    settings: Settings, topic: Topic, logs: list[Log], since: datetime, until: datetime
) -> Scan:
    ranges = ranges_from(topic, since, logs)
    scan = Scan()
    with (
        Reader(settings.kafka, client_id="mail-service-reconcile") as reader,
        progress("reading the topic", sum(map(len, ranges.values()))) as advance,
    ):
        for records in reader.read_between(ranges, topic_id=logs[0].topic_id):
            for record in records:
                if not since <= events.occurred_at(record) < until:
                    continue
                scan.records += 1
                try:
                    event = events.read(record)
                except UnreadableRecord:
                    scan.unreadable[record.partition].append(record.offset)
                    continue
                if event is not None:
                    scan.orders.setdefault(event.order_id, (record.partition, record.offset))
            advance(len(records))
    return scan


def _compare(
    engine: Engine,
    scan: Scan,
    topic_id: str,
    read_up_to: Mapping[int, int],
    since: datetime,
    until: datetime,
) -> tuple[Report, dict[str, list[str]]]:
    report = Report(records=scan.records, orders=len(scan.orders))
    by_state: dict[str, list[str]] = defaultdict(list)
    order_ids = list(scan.orders)
    with engine.begin() as connection:
        connection.execute(NO_HURRY)
        for start in range(0, len(order_ids), ASKED_IDS):
            asked = order_ids[start : start + ASKED_IDS]
            known = views.states(connection, asked)
            for order_id in asked:
                partition, offset = scan.orders[order_id]
                if order_id not in known:
                    is_read = offset < read_up_to.get(partition, 0)
                    (report.missing if is_read else report.waiting).append(order_id)
        for partition, offsets in scan.unreadable.items():
            kept = dead_letters.offsets_among(
                connection, topic_id=topic_id, partition=partition, offsets=offsets
            )
            report.dead_letters += len(kept)
            report.unread += [
                f"{partition}/{offset}"
                for offset in offsets
                if offset not in kept and offset < read_up_to.get(partition, 0)
            ]
        for row in views.of_range(connection, since, until):
            by_state[row["state"]].append(row["order_id"])
            if _is_double(row):
                report.doubles.append(row["order_id"])
    report.states = {state: len(found) for state, found in by_state.items()}
    return report, dict(by_state)


def _is_double(row: RowMapping) -> bool:
    """Say whether an attempt without an answer stands beside the one that was accepted."""
    # What was settled as sent is that very attempt.
    explained = 1 if row["sent_by"] == decisions.SETTLED_BY else 0
    return bool(row["state"] == "SENT" and row["unknown_count"] > explained)


def _print(report: Report) -> None:
    for name, value in asdict(report).items():
        if name == "states":
            for state, count in sorted(report.states.items()):
                click.echo(f"{state:>18}  {count}")
        else:
            count = len(value) if isinstance(value, list) else value
            click.echo(f"{name.replace('_', ' '):>18}  {count}")
    named = {"missing": report.missing, "unread": report.unread, "double": report.doubles}
    for name, found in named.items():
        for each in found[:SHOWN_IDS]:
            click.echo(f"{name}  {each}")
        if len(found) > SHOWN_IDS:
            click.echo(f"{name}  and {len(found) - SHOWN_IDS} more, see --json")
