"""Every metric and log event of this service, by name."""

import logging
import sys

import structlog
from prometheus_client import Counter, Gauge

log: structlog.stdlib.BoundLogger = structlog.get_logger("order_service")

orders_placed = Counter("order_orders_placed_total", "Orders accepted", ["outcome"])
events_published = Counter("order_events_published_total", "Delivery reports", ["outcome"])
events_completed = Counter("order_events_completed_total", "Events seen in the topic")
events_lost = Counter("order_events_lost_total", "Events proven lost, by what was done")
records_foreign = Counter("order_records_foreign_total", "Records in the topic that are not ours")
relay_is_active = Gauge("order_relay_is_active", "1 while this relay publishes")


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
