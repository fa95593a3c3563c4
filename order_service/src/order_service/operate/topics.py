"""`topics ensure|list|describe`: the topic, as declared and as it is."""

import json
import time

import click

from order_service.kafka import TOPIC, KafkaUnavailable, Topic
from order_service.operate.output import EXIT_FOUND, as_json_option, examples, print_table
from order_service.settings import Settings

# Right after a broker's start it may take a moment until the controller answers.
PATIENCE_SECONDS = 30.0
RETRY_SECONDS = 1.0
SHOWN_SETTINGS = ("cleanup.policy", "retention.ms", "segment.ms", "min.insync.replicas")


@click.group()
def topics() -> None:
    """Keep the topic."""


@topics.command(epilog=examples("order-service topics ensure"))
def ensure() -> None:
    """Create order-created with its partitions, replication and settings, when it is missing."""
    topic = Topic(Settings.from_environment().kafka)
    deadline = time.monotonic() + PATIENCE_SECONDS
    while True:
        try:
            was_missing = topic.ensure()
            break
        except KafkaUnavailable as error:
            if time.monotonic() > deadline:
                raise KafkaUnavailable(f"{TOPIC} could not be created: {error}") from error
            time.sleep(RETRY_SECONDS)
    click.echo(f"{TOPIC} {'created' if was_missing else 'was there'}")


@topics.command("list", epilog=examples("order-service topics list"))
@as_json_option
def list_(*, as_json: bool) -> None:
    """List the topics this cluster has, and which of them is ours."""
    found = Topic(Settings.from_environment().kafka).list_all()
    rows = [
        {"topic": name, "partitions": partitions, "ours": "yes" if name == TOPIC else ""}
        for name, partitions in sorted(found.items())
    ]
    print_table(rows, as_json=as_json)
    if TOPIC not in found:
        raise SystemExit(EXIT_FOUND)


@topics.command(epilog=examples("order-service topics describe --json"))
@as_json_option
def describe(*, as_json: bool) -> None:
    """Show order-created as it is; exit 1 when it is not as declared."""
    topic = Topic(Settings.from_environment().kafka)
    state, check = topic.describe(), topic.check()
    settings = topic.settings()
    bounds = topic.bounds(range(state.partitions))
    partitions = [
        {"partition": number, "start": bound.start, "end": bound.end}
        for number, bound in sorted(bounds.items())
    ]
    described = {
        "topic": TOPIC,
        "topic_id": state.id,
        "replication": state.replication,
        **{name: settings[name] for name in SHOWN_SETTINGS},
        "faults": check.faults,
        "warnings": check.warnings,
    }
    if as_json:
        click.echo(json.dumps({**described, "partitions": partitions}))
    else:
        for name, value in described.items():
            click.echo(f"{name:>20}  {', '.join(value) if isinstance(value, list) else value}")
        click.echo()
        print_table(partitions, as_json=False)
    if check.faults:
        raise SystemExit(EXIT_FOUND)
