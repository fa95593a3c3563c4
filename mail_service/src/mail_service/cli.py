"""consume and the jobs; the one file that wires."""

import contextlib
import os
import signal
import socket
import sys
import threading
import time
import traceback
import uuid
from typing import Any

import click
from psycopg2.errors import UndefinedTable
from sqlalchemy import Engine
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from mail_service import probes
from mail_service.app import create_app
from mail_service.confirmation import CannotRender, Confirmation, Shop
from mail_service.consumer import Consumption
from mail_service.judge import Judge
from mail_service.kafka import KafkaUnavailable, PropertyRefused
from mail_service.lease import Lease
from mail_service.models import make_engine
from mail_service.operate.dead_letters import dead_letters
from mail_service.operate.erase import erase
from mail_service.operate.mails import mails
from mail_service.operate.migrate import migrate
from mail_service.operate.output import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_USAGE
from mail_service.operate.pause import pause, resume
from mail_service.operate.positions import positions
from mail_service.operate.preview import preview
from mail_service.operate.reconcile import reconcile
from mail_service.operate.replay import replay
from mail_service.pace import Pace
from mail_service.senders import Senders, most_in_hand
from mail_service.settings import Settings, SettingsError
from mail_service.smtp import Relay, SmtpConnection
from mail_service.startup import StartUpRefused
from mail_service.telemetry import configure_logging, log

# A round waits for a slot, a record and the cluster's answers; silent for longer, it is stuck.
ROUND_SILENCE_SECONDS = 60.0
# How long the thread of all dialogues waits, behind each of its calls, for one that reads events.
SWITCH_SECONDS = 0.001


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
    """Send a confirmation mail for each order in the topic order-created."""


@commands.command()
def consume() -> None:
    """Take in what the group gives this replica, and send it."""
    sys.setswitchinterval(SWITCH_SECONDS)
    settings = Settings.from_environment()
    configure_logging(settings.log_level)
    stop, hurry = _stop_on_signals()
    engine = make_engine(settings.database_url)
    lease = Lease(
        uuid.uuid4(),
        name=f"mail-service-{socket.gethostname()}-{os.getpid()}",
        seconds=settings.timing.lease_seconds,
    )
    senders = _senders(settings, engine, lease)
    consumption = Consumption(
        settings=settings,
        engine=engine,
        senders=senders,
        lease=lease,
        stop=stop,
        hurry=hurry,
    )
    app = create_app(
        settings,
        is_live=lambda: (
            time.monotonic() - min(consumption.round_at, senders.turned_at) < ROUND_SILENCE_SECONDS
        ),
        is_ready=lambda: consumption.reads_all and probes.is_fit(engine),
    )
    with probes.serving(app, settings.probe_port):
        consumption.run()


def _senders(settings: Settings, engine: Engine, lease: Lease) -> Senders:
    relay = Relay(
        host=settings.smtp_host,
        port=settings.smtp_port,
        tls=settings.smtp_tls,
        user=settings.smtp_user,
        password=settings.smtp_password,
        timing=settings.timing,
    )
    most = most_in_hand(
        settings.mail_concurrency, is_rate_limited=settings.mail_rate_per_second is not None
    )
    return Senders(
        count=settings.mail_concurrency,
        engine=engine,
        lease=lease,
        connect=lambda: SmtpConnection(relay),
        confirmation=Confirmation(Shop.of(settings)),
        recipients=settings.mail_only_to,
        judge=Judge(settings.timing, resends_unknown=settings.mail_on_unknown == "resend"),
        pace=Pace(most=most, probe_seconds=settings.timing.probe_seconds),
    )


def _stop_on_signals() -> tuple[threading.Event, threading.Event]:
    """Return what a first signal sets, and what a second; a thread that dies ends the process."""
    stop, hurry = threading.Event(), threading.Event()

    def note(*_: object) -> None:
        (hurry if stop.is_set() else stop).set()

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, note)

    def end(hook: threading.ExceptHookArgs) -> None:
        try:
            log.critical("thread.died", exc_info=hook.exc_value)
        finally:
            os._exit(EXIT_FAILED)

    threading.excepthook = end
    return stop, hurry


for job in (
    dead_letters,
    erase,
    mails,
    migrate,
    pause,
    positions,
    preview,
    reconcile,
    replay,
    resume,
):
    commands.add_command(job)


def main() -> None:
    """Run a command; end as README.md says, in one message and without a traceback."""
    # What a job prints is for whoever asked: its log is not among it.
    configure_logging("WARNING", sys.stderr)
    try:
        sys.exit(commands.main(standalone_mode=False))
    except click.Abort:
        sys.exit(EXIT_INTERRUPTED)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (SettingsError, PropertyRefused, CannotRender) as error:
        click.echo(str(error), err=True)
        sys.exit(EXIT_USAGE)
    except StartUpRefused as error:
        click.echo(str(error), err=True)
        sys.exit(EXIT_FAILED)
    except KafkaUnavailable as error:
        click.echo(f"Kafka: {error}", err=True)
        sys.exit(EXIT_FAILED)
    except (DBAPIError, PoolTimeout) as error:
        original = getattr(error, "orig", error)
        hint = "; run `mail-service migrate`" if isinstance(original, UndefinedTable) else ""
        # The first line says what; the others quote the statement.
        click.echo(f"database: {str(original).splitlines()[0]}{hint}", err=True)
        sys.exit(EXIT_FAILED)
    except Exception:  # noqa: BLE001 - the last resort
        # Python would end with 1, which scripts take for something found.
        traceback.print_exc()
        sys.exit(EXIT_FAILED)
