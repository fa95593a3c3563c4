"""api, relay and the jobs; the one file that wires."""

import contextlib
import os
import signal
import sys
import tempfile
import threading
import time
import traceback
from typing import Any

import click
from flask import Flask
from psycopg2.errors import UndefinedTable
from sqlalchemy.exc import DBAPIError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from order_service import probes, startup
from order_service.app import create_app
from order_service.kafka import (
    KafkaUnavailable,
    PropertyRefused,
    Publisher,
    PublisherFailed,
    Reader,
    Topic,
)
from order_service.models import make_engine
from order_service.operate.erase import erase
from order_service.operate.migrate import migrate
from order_service.operate.openapi import openapi
from order_service.operate.outbox import outbox
from order_service.operate.output import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_USAGE, examples
from order_service.operate.products import products
from order_service.operate.reconcile import reconcile
from order_service.operate.tail import events
from order_service.operate.token import token
from order_service.operate.topics import topics
from order_service.readback import ReadBack
from order_service.relay import Relay
from order_service.settings import Settings, SettingsError
from order_service.telemetry import configure_logging, log

# A round may wait for the delivery time-out; silent for longer, the relay is stuck.
RELAY_SILENCE_SECONDS = 60.0


class Commands(click.Group):
    """A group whose output need not find a reader."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run a command; end with 3 when the system does not let it read or write."""
        try:
            return super().invoke(ctx)
        except OSError as error:
            if not isinstance(error, BrokenPipeError):
                click.echo(str(error), err=True)
            # What could not be written must not be tried again at the process's end.
            with contextlib.suppress(OSError):
                sys.stdout.close()
            raise SystemExit(EXIT_FAILED) from error


@click.group(cls=Commands)
def commands() -> None:
    """Take orders, and tell the topic order-created of each."""


@commands.command(epilog=examples("HTTP_PORT=8000 PROBE_PORT=9000 order-service api"))
def api() -> None:
    """Serve the REST API under gunicorn."""
    settings = Settings.from_environment()
    _refuse_unfit_database(settings.database_url)
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


@commands.command(epilog=examples("PROBE_PORT=9001 order-service relay"))
def relay() -> None:
    """Publish the outbox and read it back; stand by while another relay is active."""
    settings = Settings.from_environment()
    configure_logging(settings.log_level)
    stop = _stop_on_signals()
    engine = make_engine(settings.database_url)
    readback = ReadBack(
        engine=engine,
        topic=Topic(settings.kafka),
        make_reader=lambda topic: Reader(settings.kafka, topic, role="read-back"),
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
            is_ready=lambda: worker.has_topic and probes.is_fit(engine),
            metrics=probes.own_metrics,
        )
    )
    with probes.serving(app, settings.probe_port):
        worker.run()


def _refuse_unfit_database(database_url: str) -> None:
    """Check a database that answers; one that does not yet is /readyz's business."""
    with contextlib.suppress(OperationalError), make_engine(database_url).connect() as connection:
        startup.require(startup.database_faults(connection))


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


for job in (erase, events, migrate, openapi, outbox, products, reconcile, token, topics):
    commands.add_command(job)


def main() -> None:
    """Run a command; end as README.md says, in one message and without a traceback."""
    try:
        sys.exit(commands.main(standalone_mode=False))
    except click.Abort:
        sys.exit(EXIT_INTERRUPTED)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (SettingsError, PropertyRefused) as error:
        click.echo(str(error), err=True)
        sys.exit(EXIT_USAGE)
    except startup.StartUpRefused as error:
        click.echo(str(error), err=True)
        sys.exit(EXIT_FAILED)
    except (PublisherFailed, KafkaUnavailable) as error:
        click.echo(f"Kafka: {error}", err=True)
        sys.exit(EXIT_FAILED)
    except (DBAPIError, PoolTimeout) as error:
        original = getattr(error, "orig", error)
        hint = "; run `order-service migrate`" if isinstance(original, UndefinedTable) else ""
        # The first line says what; the others quote the statement.
        click.echo(f"database: {str(original).splitlines()[0]}{hint}", err=True)
        sys.exit(EXIT_FAILED)
    except Exception:  # noqa: BLE001 - the last resort
        # Python would end with 1, which scripts take for something found.
        traceback.print_exc()
        sys.exit(EXIT_FAILED)
