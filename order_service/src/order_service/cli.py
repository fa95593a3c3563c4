"""api, relay and the jobs; the one file that wires."""

import os
import signal
import sys
import tempfile
import threading
import time

import click
from flask import Flask

from order_service import probes
from order_service.app import create_app
from order_service.kafka import Publisher, PublisherFailed, Reader, Topic
from order_service.models import make_engine
from order_service.operate.migrate import migrate
from order_service.operate.openapi import openapi
from order_service.operate.outbox import outbox
from order_service.operate.products import products
from order_service.operate.token import token
from order_service.operate.topics import topics
from order_service.readback import ReadBack
from order_service.relay import Relay
from order_service.settings import Settings, SettingsError
from order_service.telemetry import configure_logging, log

# A round may wait for the delivery time-out; silent for longer, the relay is stuck.
RELAY_SILENCE_SECONDS = 60.0
EXIT_USAGE = 2
EXIT_FAILED = 3


@click.group()
def commands() -> None:
    """Take orders, and tell the topic order-created of each."""


@commands.command()
def api() -> None:
    """Serve the REST API under gunicorn."""
    settings = Settings.from_environment()
    metrics = tempfile.mkdtemp(prefix="order-service-metrics-")
    os.execv(  # noqa: S606 - gunicorn takes the place of this process, and its signals
        sys.executable,
        [
            sys.executable,
            "-m",
            "gunicorn",
            "--config=python:order_service.gunicorn_conf",
            f"--bind=0.0.0.0:{settings.http_port}",
            f"--bind=0.0.0.0:{settings.probe_port}",
            f"--env=PROMETHEUS_MULTIPROC_DIR={metrics}",
        ],
    )


def wsgi() -> Flask:
    """Build the application of one gunicorn worker, after the fork."""
    settings = Settings.from_environment()
    configure_logging(settings.log_level)
    return create_app(settings)


@commands.command()
def relay() -> None:
    """Publish the outbox and read it back; stand by while another relay is active."""
    settings = Settings.from_environment()
    configure_logging(settings.log_level)
    stop = _stop_on_signals()
    engine = make_engine(settings.database_url)
    readback = ReadBack(
        engine=engine,
        topic=Topic(settings.kafka),
        make_reader=lambda topic: Reader(settings.kafka, topic),
    )
    worker = Relay(
        engine=engine,
        topic=Topic(settings.kafka),
        publisher=Publisher(settings.kafka, stop),
        companion=readback.running,
        stop=stop,
    )
    app = Flask("order_relay")
    app.register_blueprint(
        probes.probes(
            is_live=lambda: time.monotonic() - worker.round_at < RELAY_SILENCE_SECONDS,
            is_ready=lambda: probes.answers(engine),
            metrics=probes.own_metrics,
        )
    )
    with probes.serving(app, settings.probe_port):
        worker.run()


def _stop_on_signals() -> threading.Event:
    """Return the event that SIGTERM and SIGINT set; a thread that dies ends the process."""
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())

    def end(hook: threading.ExceptHookArgs) -> None:
        log.critical("thread.died", exc_info=hook.exc_value)
        os._exit(EXIT_FAILED)

    threading.excepthook = end
    return stop


for job in (migrate, openapi, outbox, products, token, topics):
    commands.add_command(job)


def main() -> None:
    """Run a command; a setting that cannot be used ends it with 2 and one message."""
    try:
        commands()
    except SettingsError as error:
        click.echo(str(error), err=True)
        sys.exit(EXIT_USAGE)
    except PublisherFailed as error:
        click.echo(f"the producer failed: {error}", err=True)
        sys.exit(EXIT_FAILED)
