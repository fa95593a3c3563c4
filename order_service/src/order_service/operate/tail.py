"""`events tail`: the topic as it grows."""

import json
import signal
import threading
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import click

from order_service import events as event_codec
from order_service.kafka import Reader, Record, Topic
from order_service.operate.output import as_json_option, examples
from order_service.settings import Settings

READ_RECORDS = 100
READ_SECONDS = 0.5


@click.group()
def events() -> None:
    """Read the topic order-created."""


@events.command(
    epilog=examples(
        "order-service events tail",
        "order-service events tail --from-beginning --key 01936f6e-7c1a-7000-8000-000000000001",
    )
)
@click.option("--from-beginning", is_flag=True, help="All that is retained, not only what comes.")
@click.option("--partition", "partitions", multiple=True, type=click.IntRange(0))
@click.option("--key", help="Only records of this order.")
@as_json_option
def tail(
    partitions: Sequence[int], key: str | None, *, from_beginning: bool, as_json: bool
) -> None:
    """Print each record as it comes, addresses masked, until Ctrl-C.

    Joins no group and commits nothing.
    """
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    settings = Settings.from_environment()
    topic = Topic(settings.kafka)
    there = range(topic.describe().partitions)
    if unknown := set(partitions).difference(there):
        raise click.UsageError(f"there is no partition {', '.join(map(str, sorted(unknown)))}")
    bounds = topic.bounds(partitions or there)
    starts = {
        partition: bound.start if from_beginning else bound.end
        for partition, bound in bounds.items()
    }
    reader = Reader(settings.kafka, topic, role="tail")
    try:
        reader.assign(starts, starts)
        while not stop.is_set():
            for record in reader.read(limit=READ_RECORDS, timeout_seconds=READ_SECONDS).records:
                shown = _shown(record)
                if key is None or shown["key"] == key:
                    click.echo(json.dumps(shown, ensure_ascii=False) if as_json else _line(shown))
    finally:
        reader.close()


def _shown(record: Record) -> dict[str, Any]:
    return {
        "partition": record.partition,
        "offset": record.offset,
        "at": _instant(record.timestamp_ms),
        "key": None if record.key is None else record.key.decode(errors="replace"),
        "type": record.headers.get("ce_type"),
        "event_id": record.headers.get("ce_id"),
        "value": event_codec.masked(record.value),
    }


def _instant(milliseconds: int) -> str | None:
    try:
        return datetime.fromtimestamp(milliseconds / 1000, UTC).isoformat(timespec="milliseconds")
    except (ValueError, OverflowError, OSError):
        # Whoever wrote it made no sense; the record is shown all the same.
        return None


def _line(shown: Mapping[str, Any]) -> str:
    line = "{partition}/{offset}  {at}  {key}  {type}  {value}".format_map(shown)
    # Whoever may write to the topic must not write to the terminal.
    return "".join(letter if letter.isprintable() else "?" for letter in line)
