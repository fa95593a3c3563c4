"""Every metric and log event of this service, by name."""

import logging
import sys

import structlog
from prometheus_client import Counter, Gauge

log: structlog.stdlib.BoundLogger = structlog.get_logger("order_service")

orders_placed = Counter("order_orders_placed_total", "Orders accepted", ["outcome"])
events_published = Counter("order_events_published_total", "Delivery reports", ["outcome"])
events_completed = Counter("order_events_completed_total", "Events seen in the topic")
events_lost = Counter(
    "order_events_lost_total", "Events proven lost, by their new state", ["state"]
)
records_foreign = Counter("order_records_foreign_total", "Records in the topic that are not ours")
events_phantom = Counter(
    "order_events_phantom_total", "Events of ours in the topic that the outbox does not know"
)
readback_gaps = Counter(
    "order_readback_gaps_total", "Positions outside the log, by the bound gone to", ["bound"]
)
relay_is_active = Gauge("order_relay_is_active", "1 while this relay publishes")
outbox_events = Gauge(
    "order_outbox_events", "Events not yet seen in the topic; counted to 100,000", ["state"]
)
outbox_oldest_age = Gauge(
    "order_outbox_oldest_age_seconds", "Age of the oldest event not yet seen in the topic"
)
snapshot_oldest_age = Gauge(
    "order_database_oldest_snapshot_age_seconds", "What vacuum, and so the outbox, waits for"
)


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
