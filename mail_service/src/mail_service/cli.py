"""consume and the jobs; the one file that wires."""

import os
import signal
import socket
import sys
import threading
import time
import uuid

import click
from sqlalchemy import Engine

from mail_service import probes
from mail_service.app import create_app
from mail_service.confirmation import Confirmation, Shop
from mail_service.consumer import Consumption
from mail_service.judge import Judge
from mail_service.lease import Lease
from mail_service.models import make_engine
from mail_service.operate.mails import mails
from mail_service.operate.migrate import migrate
from mail_service.senders import Senders
from mail_service.settings import Settings, SettingsError
from mail_service.smtp import Relay, SmtpConnection
from mail_service.telemetry import configure_logging, log

# A round waits for a slot, a record and the cluster's answers; silent for longer, it is stuck.
ROUND_SILENCE_SECONDS = 60.0
EXIT_USAGE = 2
EXIT_FAILED = 3


@click.group()
def commands() -> None:
    """Send a confirmation mail for each order in the topic order-created."""


@commands.command()
def consume() -> None:
    """Take in what the group gives this replica, and send it."""
    settings = Settings.from_environment()
    configure_logging(settings.log_level)
    stop = _stop_on_signals()
    engine = make_engine(settings.database_url)
    replica_id = uuid.uuid4()
    replica_name = f"mail-service-{socket.gethostname()}-{os.getpid()}"
    consumption = Consumption(
        settings=settings,
        engine=engine,
        senders=_senders(
            settings,
            engine,
            Lease(replica_id, name=replica_name, seconds=settings.timing.lease_seconds),
        ),
        replica_id=replica_id,
        replica_name=replica_name,
        stop=stop,
    )
    app = create_app(
        settings,
        is_live=lambda: time.monotonic() - consumption.round_at < ROUND_SILENCE_SECONDS,
        is_ready=lambda: probes.answers(engine),
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
        final_dot_timeout_seconds=settings.timing.final_dot_timeout_seconds,
    )
    return Senders(
        count=settings.mail_concurrency,
        engine=engine,
        lease=lease,
        connect=lambda: SmtpConnection(relay),
        confirmation=Confirmation(Shop.of(settings)),
        judge=Judge(settings.timing, resends_unknown=settings.mail_on_unknown == "resend"),
    )


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


for job in (mails, migrate):
    commands.add_command(job)


def main() -> None:
    """Run a command; a setting that cannot be used ends it with 2 and one message."""
    try:
        commands()
    except SettingsError as error:
        click.echo(str(error), err=True)
        sys.exit(EXIT_USAGE)
