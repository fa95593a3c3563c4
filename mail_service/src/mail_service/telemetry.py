"""Every metric and log event of this service, by name."""

import logging
import sys

import structlog
from prometheus_client import Counter, Gauge

log: structlog.stdlib.BoundLogger = structlog.get_logger("mail_service")

records_taken_in = Counter("mail_records_taken_in_total", "Records, by what they became", ["as"])
mails_taken_up = Counter("mail_taken_up_total", "Rows claimed from the ledger again")
verdicts = Counter("mail_verdicts_total", "Ends of an attempt", ["verdict"])
leases_ended = Counter("mail_leases_ended_total", "Rows whose replica was gone, now UNKNOWN")
slots_busy = Gauge("mail_slots_busy", "Sender slots with a mail in them")


def configure_logging(level: str) -> None:
    """Write one JSON object a line to standard output, for our events and the libraries'."""
    shared: list[structlog.types.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.format_exc_info,
    ]
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler(sys.stdout)
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
