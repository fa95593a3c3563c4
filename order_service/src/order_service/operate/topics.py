"""`topics ensure`: the topic, as declared."""

import time

import click

from order_service.kafka import TOPIC, KafkaUnavailable, Topic
from order_service.settings import Settings

# Right after a broker's start it may take a moment until the controller answers.
PATIENCE_SECONDS = 30.0
RETRY_SECONDS = 1.0


@click.group()
def topics() -> None:
    """Keep the topic."""


@topics.command()
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
                raise click.ClickException(f"{TOPIC} could not be created: {error}") from error
            time.sleep(RETRY_SECONDS)
    click.echo(f"{TOPIC} {'created' if was_missing else 'was there'}")
