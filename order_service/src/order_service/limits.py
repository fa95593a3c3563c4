"""How many orders a user and a recipient may have: the order form is not a mail cannon."""

from dataclasses import dataclass

from psycopg2.errors import LockNotAvailable
from sqlalchemy import Connection, text
from sqlalchemy.exc import OperationalError

from order_service.errors import TooManyOrders

USER_WINDOW_SECONDS = 60
RECIPIENT_WINDOW_SECONDS = 3600

# Always user, then recipient, so that no two orders wait for each other in a circle.
_LOCK = text("""
    SELECT pg_advisory_xact_lock(hashtextextended('user ' || :user_id, 0)),
           pg_advisory_xact_lock(hashtextextended('recipient ' || lower(:email), 0))
""")

# A later statement than the locks: its snapshot has every order that was placed before them.
_COUNT = text("""
    SELECT of_user.placed AS user_placed, of_user.free_in AS user_free_in,
           of_recipient.placed AS recipient_placed, of_recipient.free_in AS recipient_free_in
      FROM (SELECT count(*) AS placed,
                   extract(epoch FROM min(ordered_at) - now()) + :user_window AS free_in
              FROM orders
             WHERE user_id = :user_id
               AND ordered_at > now() - :user_window * interval '1 second') AS of_user,
           (SELECT count(*) AS placed,
                   extract(epoch FROM min(ordered_at) - now()) + :recipient_window AS free_in
              FROM orders
             WHERE lower(email) = lower(:email)
               AND ordered_at > now() - :recipient_window * interval '1 second') AS of_recipient
""")


@dataclass(frozen=True, slots=True)
class OrderLimits:
    """Most orders of a user in a minute, and for a recipient in an hour."""

    per_user_per_minute: int
    per_recipient_per_hour: int


def check(connection: Connection, limits: OrderLimits, *, user_id: str, email: str) -> None:
    """Let one more order through, exactly, over all workers; else raise TooManyOrders.

    The locks last until the transaction ends, so nobody else counts before this order is there.
    """
    who = {"user_id": user_id, "email": email}
    try:
        connection.execute(_LOCK, who)
    except OperationalError as error:
        if isinstance(error.orig, LockNotAvailable):
            raise _too_many("Too many orders at once.", 1) from error
        raise
    windows = {"user_window": USER_WINDOW_SECONDS, "recipient_window": RECIPIENT_WINDOW_SECONDS}
    placed = connection.execute(_COUNT, {**who, **windows}).one()
    if placed.user_placed >= limits.per_user_per_minute:
        raise _too_many("Too many orders in a minute.", placed.user_free_in)
    if placed.recipient_placed >= limits.per_recipient_per_hour:
        raise _too_many("Too many orders for this address in an hour.", placed.recipient_free_in)


def _too_many(detail: str, free_in_seconds: float) -> TooManyOrders:
    return TooManyOrders(detail, headers={"Retry-After": str(max(1, round(free_in_seconds)))})
