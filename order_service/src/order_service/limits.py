"""How many orders a user and a recipient may have: the order form is not a mail cannon."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from psycopg2.errors import LockNotAvailable

from order_service.errors import TooManyOrders
from order_service.transaction import Statement, Transaction

# Always user, then recipient, so that no two orders wait for each other in a circle.
_USER = "hashtextextended('user ' || CAST(%(principal)s AS text), 0)"
_RECIPIENT = "hashtextextended('recipient ' || lower(CAST(%(email)s AS text)), 0)"
TRY_TURN = f"""
    CASE WHEN pg_try_advisory_xact_lock({_USER})
         THEN pg_try_advisory_xact_lock({_RECIPIENT}) ELSE false END
"""
TURN = Statement(f"SELECT pg_advisory_xact_lock({_USER}), pg_advisory_xact_lock({_RECIPIENT})")

# For a later statement than the locks: its snapshot has every order that was placed before them.
ORDERS_PLACED = """
    SELECT *
      FROM (SELECT count(*), min(ordered_at)
              FROM orders
             WHERE user_id = %(principal)s
               AND ordered_at > now() - interval '1 minute') AS of_user (count, since),
           (SELECT count(*), min(ordered_at)
              FROM orders
             WHERE lower(email) = lower(%(email)s)
               AND ordered_at > now() - interval '1 hour') AS of_recipient (count, since)
"""
MINUTE, HOUR = timedelta(minutes=1), timedelta(hours=1)


@dataclass(frozen=True, slots=True)
class OrdersPlaced:
    """A row of ORDERS_PLACED: how many there are, and the moment of the oldest of them."""

    by_user: int
    by_user_since: datetime | None
    for_recipient: int
    for_recipient_since: datetime | None


@dataclass(frozen=True, slots=True)
class OrderLimits:
    """Most orders of a user in a minute, and for a recipient in an hour."""

    per_user_per_minute: int
    per_recipient_per_hour: int

    def check(self, placed: OrdersPlaced, *, at: datetime) -> None:
        """Let one more order through, exactly, over all workers; else raise TooManyOrders."""
        if placed.by_user_since and placed.by_user >= self.per_user_per_minute:
            raise _too_many("Too many orders in a minute.", placed.by_user_since + MINUTE - at)
        if placed.for_recipient_since and placed.for_recipient >= self.per_recipient_per_hour:
            raise _too_many(
                "Too many orders for this address in an hour.",
                placed.for_recipient_since + HOUR - at,
            )


def wait_for_turn(transaction: Transaction, parameters: Mapping[str, Any]) -> None:
    """Let nobody else count until the transaction ends; TooManyOrders when they take long.

    It is a statement of its own: what else may be locked, a table, is no excess of orders.
    """
    try:
        transaction.fetch(TURN, parameters=parameters)
    except LockNotAvailable as error:
        raise _too_many("Too many orders at once.", timedelta(seconds=1)) from error


def _too_many(detail: str, free_in: timedelta) -> TooManyOrders:
    return TooManyOrders(
        detail, headers={"Retry-After": str(max(1, round(free_in.total_seconds())))}
    )
