"""Where a customer's address is kept, and how it is erased there.

It is in the order, in its event in the outbox, and in the fingerprint of its Idempotency-Key: a
digest, by which whoever has the rest of the order could try addresses. What the topic has already
stays there as long as the topic keeps it.
"""

import time
from collections.abc import Iterator, Sequence
from typing import Any
from uuid import UUID

from psycopg2.errors import LockNotAvailable
from sqlalchemy import Connection, Engine, text
from sqlalchemy.exc import OperationalError

from order_service import events

BATCH_ORDERS = 1_000
# Others hold a row for milliseconds; who holds one for longer has forgotten it.
PATIENCE_SECONDS = 30.0
RETRY_SECONDS = 0.05

_NO_HURRY = text("""
    SELECT set_config('statement_timeout', '0', true), set_config('lock_timeout', '60s', true)
""")

# An event that waits may be on its way to the topic at this moment; the row of one that was
# published long ago is purged, and the order's time stands for it.
_SELECT = text("""
    SELECT orders.id, orders.email, orders.ordered_at,
           CASE WHEN outbox.id IS NULL THEN orders.ordered_at
                WHEN outbox.state = 'INIT' THEN now()
                ELSE outbox.published_at
           END AS published_at
      FROM orders LEFT JOIN outbox ON outbox.aggregateid = CAST(orders.id AS text)
     WHERE orders.id = ANY(CAST(:order_ids AS uuid[]))
        OR lower(orders.email) = lower(CAST(:email AS text))
        OR orders.user_id = CAST(:user_id AS text)
     ORDER BY orders.id
""")

# Rows are never waited for: who holds some and waits for none is in no deadlock.
_ERASE_ORDERS = text("""
    UPDATE orders SET email = :erased
      FROM (SELECT id FROM orders
             WHERE id = ANY(CAST(:order_ids AS uuid[])) AND email <> :erased
             ORDER BY id
               FOR UPDATE NOWAIT) AS held
     WHERE orders.id = held.id
    RETURNING orders.id, orders.user_id
""")

_HOLD_EVENTS = text("""
    SELECT id, payload FROM outbox
     WHERE aggregateid = ANY(CAST(:order_ids AS text[]))
     ORDER BY id
       FOR UPDATE NOWAIT
""")

_ERASE_EVENTS = text("""
    UPDATE outbox SET payload = erased.payload
      FROM unnest(CAST(:ids AS uuid[]), CAST(:payloads AS bytea[])) AS erased (id, payload)
     WHERE outbox.id = erased.id
""")

# An order's key is its user's, and keys are found by user. No payload has an empty fingerprint: the
# key cannot be used again, not even for the same order.
_ERASE_FINGERPRINTS = text("""
    UPDATE idempotency_keys AS used SET fingerprint = ''
      FROM (SELECT principal, operation, key FROM idempotency_keys
             WHERE principal = ANY(CAST(:user_ids AS text[]))
               AND order_id = ANY(CAST(:order_ids AS uuid[]))
             ORDER BY principal, operation, key
               FOR UPDATE NOWAIT) AS held
     WHERE used.principal = held.principal AND used.operation = held.operation
       AND used.key = held.key
""")

# The planner keeps values of columns as samples, addresses among them.
_RENEW_SAMPLES = text("ANALYZE orders, outbox, idempotency_keys")


def select(
    engine: Engine, *, order_ids: Sequence[UUID], email: str | None, user_id: str | None
) -> Sequence[Any]:
    """Return the orders with one of these ids, with this address in any case, or of this user.

    Beside each is when its event was published last, None if never.
    """
    with engine.begin() as connection:
        connection.execute(_NO_HURRY)
        which = {"order_ids": list(order_ids), "email": email, "user_id": user_id}
        return connection.execute(_SELECT, which).all()


def erase(engine: Engine, order_ids: Sequence[UUID]) -> Iterator[int]:
    """Erase the address of these orders, a batch in a transaction; yield the size of each.

    What was erased before stays as it is.
    """
    for start in range(0, len(order_ids), BATCH_ORDERS):
        batch = order_ids[start : start + BATCH_ORDERS]
        _erase_batch(engine, batch)
        yield len(batch)


def renew_samples(engine: Engine) -> None:
    """Let the planner forget the addresses it has samples of."""
    with engine.begin() as connection:
        connection.execute(_NO_HURRY)
        connection.execute(_RENEW_SAMPLES)


def _erase_batch(engine: Engine, order_ids: Sequence[UUID]) -> None:
    """Try until nobody holds one of the rows."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while True:
        try:
            with engine.begin() as connection:
                _erase(connection, order_ids)
        except OperationalError as error:
            if not isinstance(error.orig, LockNotAvailable) or time.monotonic() > deadline:
                raise
            time.sleep(RETRY_SECONDS)
        else:
            return


def _erase(connection: Connection, order_ids: Sequence[UUID]) -> None:
    which = {"order_ids": list(order_ids), "erased": events.ERASED_ADDRESS}
    orders = connection.execute(_ERASE_ORDERS, which).all()
    ids = [order.id for order in orders]
    rows = connection.execute(_HOLD_EVENTS, {"order_ids": list(map(str, ids))}).all()
    connection.execute(
        _ERASE_EVENTS,
        {
            "ids": [row.id for row in rows],
            "payloads": [events.erased(bytes(row.payload)) for row in rows],
        },
    )
    user_ids = sorted({order.user_id for order in orders})
    connection.execute(_ERASE_FINGERPRINTS, {"user_ids": user_ids, "order_ids": ids})
