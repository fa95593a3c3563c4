"""Every metric and log event of this service, by name."""

import logging
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import ClassVar, TextIO

import structlog
from prometheus_client import Counter, Gauge

log: structlog.typing.FilteringBoundLogger = structlog.get_logger()

records_taken_in = Counter("mail_records_taken_in_total", "Records, by what they became", ["as"])
mails_taken_up = Counter("mail_taken_up_total", "Rows claimed from the ledger again")
verdicts = Counter("mail_verdicts_total", "Ends of an attempt", ["verdict"])
leases_ended = Counter("mail_leases_ended_total", "Rows whose replica was gone, now UNKNOWN")
offsets_not_committed = Counter(
    "mail_offsets_not_committed_total", "Commits, our witness, that the group did not take"
)
slots_busy = Gauge("mail_slots_busy", "Sender slots with a mail in them")
partitions_waiting = Gauge(
    "mail_partitions_waiting", "Partitions of this replica that it does not read, as of a gap"
)
breaker_is_open = Gauge("mail_breaker_is_open", "1 while the relay is left alone")


def configure_logging(level: str, stream: TextIO = sys.stdout) -> None:
    """Write one JSON object a line, for our events and the libraries'.

    Ours do not go through the standard library's logging, which would triple what a line costs. A
    line that cannot be written is lost, and stops nothing.
    """
    handler = logging.StreamHandler(stream)
    Lines.handler = handler
    shared: list[structlog.types.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        _add_logger_name,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.format_exc_info,
    ]
    structlog.configure(
        processors=[*shared, structlog.processors.JSONRenderer()],
        logger_factory=lambda *_: lines,
        wrapper_class=structlog.make_filtering_bound_logger(level),
        cache_logger_on_first_use=True,
    )
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                structlog.processors.JSONRenderer(),
            ],
        )
    )
    logging.basicConfig(level=level, handlers=[handler], force=True)
    logging.getLogger("werkzeug").setLevel(logging.WARNING)
    logging.getLogger("alembic").setLevel(logging.WARNING)


class Lines(threading.local):
    """Writes whole lines, in turns with the handler of the libraries'."""

    handler: ClassVar["logging.StreamHandler[TextIO]"]
    gathered: list[str] | None = None

    def info(self, line: str) -> None:
        """Write a line; its level stands in it."""
        if self.gathered is not None:
            self.gathered.append(line)
            return
        self.handler.acquire()
        try:
            # The disk is full, or nobody reads any more.
            with suppress(OSError, ValueError):
                self.handler.stream.write(f"{line}\n")
                self.handler.stream.flush()
        finally:
            self.handler.release()

    debug = warning = error = critical = info

    @contextmanager
    def together(self) -> Iterator[None]:
        """Write what this thread logs meanwhile in one call, each of which gives the lock away."""
        self.gathered = []
        try:
            yield
        finally:
            gathered, self.gathered = self.gathered, None
            if gathered:
                self.info("\n".join(gathered))


lines = Lines()


def _add_logger_name(
    _: object, __: str, event: structlog.types.EventDict
) -> structlog.types.EventDict:
    """Say which logger wrote a line: a library's own, else this service's."""
    record: logging.LogRecord | None = event.get("_record")
    event["logger"] = record.name if record else "mail_service"
    return event
