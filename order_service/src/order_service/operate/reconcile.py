"""`reconcile`: every order has its event in the topic, and every event its order."""

import json
import math
import time
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

import click
from sqlalchemy import Engine, text

from order_service import events
from order_service.kafka import Reader, Topic, TopicState
from order_service.models import make_engine
from order_service.operate.output import EXIT_FOUND, as_json_option, examples, progress
from order_service.settings import Settings

FETCHED_ROWS = 10_000
ASKED_IDS = 1_000
SHOWN_IDS = 20

_NO_HURRY = text("SELECT set_config('statement_timeout', '0', true)")
_ORDERS = text("""
    SELECT id FROM orders WHERE ordered_at >= :since AND ordered_at < :until ORDER BY id
""")
_KNOWN_ORDERS = text("SELECT id FROM orders WHERE id = ANY(CAST(:ids AS uuid[]))")
_OUTBOX = text("""
    SELECT orders.id, orders.ordered_at, outbox.state, outbox.topic_id, outbox.partition,
           outbox."offset"
      FROM orders LEFT JOIN outbox ON outbox.aggregateid = CAST(orders.id AS text)
     WHERE orders.id = ANY(CAST(:ids AS uuid[]))
     ORDER BY orders.id
""")


class Instant(click.ParamType[datetime]):
    """A moment with its offset from UTC; without one it would mean another here and there."""

    name = "instant"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> datetime:
        """Parse ISO 8601."""
        try:
            moment = value if isinstance(value, datetime) else datetime.fromisoformat(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)
        if moment.tzinfo is None:
            self.fail(f"{value} names no offset from UTC, such as Z or +09:00", param, ctx)
        return moment


@dataclass(frozen=True, slots=True)
class Scan:
    """What the topic holds of a range: events by order id, and up to where it was read."""

    topic: TopicState
    ends: dict[int, int]
    events: Counter[UUID]
    retained_since_seconds: float


@dataclass
class OrderIds:
    """The orders of a range, each in exactly one list; the last should be empty."""

    with_event: list[UUID] = field(default_factory=list)
    on_their_way: list[UUID] = field(default_factory=list)
    outside_retention: list[UUID] = field(default_factory=list)
    missing: list[UUID] = field(default_factory=list)


@dataclass(slots=True)
class Report:
    """Orders of a range against the events in the topic; there should be no ghosts."""

    order_ids: OrderIds = field(default_factory=OrderIds)
    repeated_events: int = 0
    ghosts: list[UUID] = field(default_factory=list)

    def summary(self) -> dict[str, Any]:
        """Count what is as it should be, name the rest."""
        found = self.order_ids
        with_event, on_their_way = len(found.with_event), len(found.on_their_way)
        outside_retention = len(found.outside_retention)
        return {
            "orders": with_event + on_their_way + outside_retention + len(found.missing),
            "with_event": with_event,
            "repeated_events": self.repeated_events,
            "on_their_way": on_their_way,
            "outside_retention": outside_retention,
            "missing": [str(order_id) for order_id in found.missing],
            "ghosts": [str(order_id) for order_id in self.ghosts],
        }


@click.command(
    epilog=examples(
        "order-service reconcile --from 2026-11-01T00:00Z",
        "order-service reconcile --from 2026-11-01T00:00+09:00 --to 2026-12-01T00:00+09:00 --json",
    )
)
@click.option("--from", "since", type=Instant(), required=True, help="Such as 2026-11-01T00:00Z.")
@click.option("--to", "until", type=Instant(), help="Now, when it is not named.")
@click.option("--ids", "wants_ids", is_flag=True, help="With --json: every order id by its list.")
@as_json_option
def reconcile(since: datetime, until: datetime | None, *, wants_ids: bool, as_json: bool) -> None:
    """Compare the orders placed in a range of time with the events in the topic.

    Counts them, and names each order without its event (`outbox republish` publishes it again) and
    each event without its order (a ghost); exit 1 when there is one. Orders older than the topic's
    retention are only counted. Keeps every order id of the range in memory, about 300 MB a
    million.
    """
    now = datetime.now(UTC)
    until = until or now
    if not since < until:
        raise click.UsageError("--from must be before --to")
    if wants_ids and not as_json:
        raise click.UsageError("--ids needs --json")
    settings = Settings.from_environment()
    topic = Topic(settings.kafka)
    scan = _scan(settings, topic, since, until)
    report = compare(make_engine(settings.database_url), topic, scan, since, until)
    summary = report.summary()
    if wants_ids:
        summary["order_ids"] = vars(report.order_ids)
    if as_json:
        click.echo(json.dumps(summary, default=str))
    else:
        _print(summary)
    if summary["missing"] or summary["ghosts"]:
        raise SystemExit(EXIT_FOUND)


def _scan(settings: Settings, topic: Topic, since: datetime, until: datetime) -> Scan:
    """Read the range's records; one that was published again lies behind later ones."""
    state = topic.describe()
    retention_ms = int(topic.settings()["retention.ms"])
    retained_since_seconds = time.time() - retention_ms / 1000 if retention_ms >= 0 else -math.inf
    ends = {number: bound.end for number, bound in topic.bounds(range(state.partitions)).items()}
    starts = topic.offsets_at(since, ends)
    # A record's time is its order's, in whole milliseconds.
    first_ms, last_ms = (int(moment.timestamp() * 1000) for moment in (since, until))
    found: Counter[UUID] = Counter()
    total = sum(end - starts[number] for number, end in ends.items())
    with (
        closing(Reader(settings.kafka, topic, role="reconcile")) as reader,
        progress("reading the topic", total) as advance,
    ):
        for records in reader.read_between(starts, ends):
            found.update(
                order_id
                for record in records
                if first_ms <= record.timestamp_ms <= last_ms
                and (order_id := events.order_id_in(record.headers)) is not None
            )
            advance(len(records))
    return Scan(state, ends, found, retained_since_seconds)


def compare(engine: Engine, topic: Topic, scan: Scan, since: datetime, until: datetime) -> Report:
    """Sort the orders of the range by what the scan has of them."""
    report = Report(repeated_events=scan.events.total() - len(scan.events))
    with_event = report.order_ids.with_event
    without_event: list[UUID] = []
    with engine.begin() as connection:
        connection.execute(_NO_HURRY)
        orders = connection.execution_options(yield_per=FETCHED_ROWS).execute(
            _ORDERS, {"since": since, "until": until}
        )
        for order_id in orders.scalars():
            (with_event if order_id in scan.events else without_event).append(order_id)
        rows = [
            row
            for ids in _in_parts(without_event)
            for row in connection.execute(_OUTBOX, {"ids": ids})
        ]
        for ids in _in_parts(scan.events):
            known = set(connection.execute(_KNOWN_ORDERS, {"ids": ids}).scalars())
            report.ghosts += [order_id for order_id in ids if order_id not in known]
    # Asked after the rows were read: what is said to lie beyond these ends is not in the topic.
    ends = {number: bound.end for number, bound in topic.bounds(scan.ends).items()}
    for row in rows:
        _list_for(row, report.order_ids, scan, ends).append(row.id)
    return report


def _list_for(row: Any, lists: OrderIds, scan: Scan, ends: Mapping[int, int]) -> list[UUID]:
    """Say of an order without an event in the scan whether it should be there."""
    came_after_scan = (
        row.state == "COMPLETED"
        and row.topic_id == scan.topic.id
        and row.partition in ends
        and scan.ends[row.partition] <= row.offset < ends[row.partition]
    )
    if row.state in {"INIT", "PUBLISHED"} or came_after_scan:
        return lists.on_their_way
    if row.ordered_at.timestamp() < scan.retained_since_seconds:
        return lists.outside_retention
    return lists.missing


def _in_parts(ids: Collection[UUID]) -> Iterator[list[UUID]]:
    all_ids = list(ids)
    for start in range(0, len(all_ids), ASKED_IDS):
        yield all_ids[start : start + ASKED_IDS]


def _print(summary: Mapping[str, Any]) -> None:
    for name, value in summary.items():
        count = len(value) if isinstance(value, list) else value
        click.echo(f"{name.replace('_', ' '):>18}  {count}")
    for name, ids in (("missing", summary["missing"]), ("ghost", summary["ghosts"])):
        for order_id in ids[:SHOWN_IDS]:
            click.echo(f"{name}  {order_id}")
        if len(ids) > SHOWN_IDS:
            click.echo(f"{name}  and {len(ids) - SHOWN_IDS} more, see --json")
