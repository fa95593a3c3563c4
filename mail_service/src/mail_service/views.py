"""What the ledger holds, for comparison: read only."""

from collections.abc import Sequence
from datetime import datetime

from sqlalchemy import Connection, RowMapping, text

from mail_service.ledger import FROM_EVENTS, KIND

_STATES = text("""
    SELECT order_id, state FROM deliveries
     WHERE kind = :kind AND campaign = :campaign AND order_id = ANY(CAST(:order_ids AS text[]))
""")
_OF_RANGE = text("""
    SELECT order_id, state, unknown_count, sent_by FROM deliveries
     WHERE kind = :kind AND campaign = :campaign AND event_at >= :since AND event_at < :until
""")


def states(connection: Connection, order_ids: Sequence[str]) -> dict[str, str]:
    """Return the states of those orders' mails that the ledger knows."""
    which = {"kind": KIND, "campaign": FROM_EVENTS, "order_ids": list(order_ids)}
    return {row.order_id: row.state for row in connection.execute(_STATES, which)}


def of_range(connection: Connection, since: datetime, until: datetime) -> list[RowMapping]:
    """Return each mail whose event lies in a range: its order, its state and how it came to it."""
    which = {"kind": KIND, "campaign": FROM_EVENTS, "since": since, "until": until}
    return list(connection.execute(_OF_RANGE, which).mappings())
