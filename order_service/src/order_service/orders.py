"""place_order: the one transaction."""

import json
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from uuid import UUID

from psycopg2 import Error
from psycopg2.errors import DeadlockDetected, SerializationFailure, UniqueViolation
from sqlalchemy import Engine
from sqlalchemy.orm import Session
from uuid_utils.compat import uuid7

from order_service import events, idempotency, outbox
from order_service.catalogue import FOR_SALE, CatalogueEntry
from order_service.errors import PriceChanged, ProductUnknown
from order_service.events import Item, PlacedOrder
from order_service.limits import (
    ORDERS_PLACED,
    TRY_TURN,
    TURN,
    OrderLimits,
    OrdersPlaced,
    wait_for_turn,
)
from order_service.models import Order
from order_service.telemetry import log, orders_placed
from order_service.transaction import LostBeforeCommit, Statement, Transaction, begin

RETRIES = 2
RETRY_SECONDS = 0.05

# Everything but the products comes with each product that is for sale, and once without any.
_FOUND = Statement(f"""
    SELECT current_setting('order_service.held'), now(), earlier.*, placed.*, product.*
      FROM (VALUES (1)) AS request
      LEFT JOIN ({idempotency.EARLIER}) AS earlier ON true
      CROSS JOIN ({ORDERS_PLACED}) AS placed
      LEFT JOIN ({FOR_SALE}) AS product ON true
""")  # noqa: S608 - constants

# One statement, so that the order, its items, its event and its key are one round trip.
_INSERT = Statement("""
    WITH placed AS (
        INSERT INTO orders (id, user_id, email, locale, currency, amount, ordered_at)
        VALUES (%(order_id)s, %(user_id)s, %(email)s, %(locale)s, %(currency)s, %(amount)s,
                %(ordered_at)s)
    ), items AS (
        INSERT INTO order_items (order_id, line, sku, name, quantity, unit_price)
        SELECT %(order_id)s, line, sku, name, quantity, unit_price
          FROM unnest(CAST(%(skus)s AS text[]), CAST(%(names)s AS text[]),
                      CAST(%(quantities)s AS integer[]), CAST(%(unit_prices)s AS numeric[]))
               WITH ORDINALITY AS item (sku, name, quantity, unit_price, line)
    ), event AS (
        INSERT INTO outbox
               (id, aggregatetype, aggregateid, type, payload, headers, occurred_at)
        VALUES (%(event_id)s, %(aggregatetype)s, %(key)s, %(type)s, %(payload)s,
                CAST(%(headers)s AS json), %(ordered_at)s)
    )
    INSERT INTO idempotency_keys (principal, operation, key, fingerprint, order_id)
    VALUES (%(principal)s, %(operation)s, %(idempotency_key)s, %(fingerprint)s, %(order_id)s)
""")

# Which locks the transaction got is kept in it for the next statement of the same message.
_TRY_LOCKS = Statement(
    f"""
    SELECT set_config('order_service.held',
                      CASE WHEN NOT {idempotency.TRY_LOCK} THEN 'nothing'
                           WHEN {TRY_TURN} THEN 'everything' ELSE 'key' END, true)
    """,
    vouches_for=(TURN, _FOUND, _INSERT),
)


@dataclass(frozen=True, slots=True)
class OrderRequest:
    """What a client asks for: quantities by sku, never a price."""

    email: str
    locale: str
    currency: str
    items: Sequence[tuple[str, int]]
    expected_amount: Decimal | None = None
    traceparent: str | None = None


@dataclass(frozen=True, slots=True)
class Placement:
    """The order a request stands for, and whether an earlier request placed it."""

    order: PlacedOrder | Order
    is_replayed: bool


def place_order(
    engine: Engine, request: OrderRequest, use: idempotency.Use, limits: OrderLimits
) -> Placement:
    """Persist an order, its event and its key together, once for each key.

    Raises ProductUnknown, PriceChanged, TooManyOrders, RequestInFlight and IdempotencyKeyReused;
    nothing is written then, and the key is free.
    """
    order = _place(engine, request, use, limits)
    if isinstance(order, PlacedOrder):
        placement = Placement(order, is_replayed=False)
    else:
        with Session(engine) as session:
            placement = Placement(session.get_one(Order, order), is_replayed=True)
    orders_placed.labels("replayed" if placement.is_replayed else "placed").inc()
    log.info("order.placed", order_id=str(placement.order.id), is_replayed=placement.is_replayed)
    return placement


def _place(
    engine: Engine, request: OrderRequest, use: idempotency.Use, limits: OrderLimits
) -> PlacedOrder | UUID:
    """Run the transaction, again only after the database has surely undone it.

    Any other failure, a COMMIT without an answer above all, is the client's to repeat.
    """
    for _ in range(RETRIES):
        try:
            with begin(engine, _TRY_LOCKS) as transaction:
                return _find_or_insert(transaction, request, use, limits)
        except Error as error:
            if not _is_rolled_back(error):
                raise
            time.sleep(random.uniform(0, RETRY_SECONDS))  # noqa: S311 - spreads retries
    with begin(engine, _TRY_LOCKS) as transaction:
        return _find_or_insert(transaction, request, use, limits)


def _find_or_insert(
    transaction: Transaction, request: OrderRequest, use: idempotency.Use, limits: OrderLimits
) -> PlacedOrder | UUID:
    """Return the order just placed, or the id of the one that the key stands for already."""
    wanted = {
        "principal": use.principal,
        "operation": use.operation,
        "key": use.key,
        "email": request.email,
        "skus": [sku for sku, _ in request.items],
        "currency": request.currency,
    }
    rows = transaction.fetch(_TRY_LOCKS, _FOUND, parameters=wanted)
    held, at, fingerprint, order_id = rows[0][:4]
    earlier = idempotency.earlier_order(
        use, is_held=held != "nothing", fingerprint=fingerprint, order_id=order_id
    )
    if earlier is not None:
        return earlier
    if held != "everything":
        wait_for_turn(transaction, wanted)
        rows = transaction.fetch(_FOUND, parameters=wanted)
    limits.check(OrdersPlaced(*rows[0][4:8]), at=at)
    products = {row[8]: CatalogueEntry(*row[8:]) for row in rows}
    order = _price(request, products, user_id=use.principal, ordered_at=at)
    event = events.order_created(order, event_id=uuid7(), traceparent=request.traceparent)
    transaction.commit(
        _INSERT,
        {
            "order_id": order.id,
            "user_id": order.user_id,
            "email": order.email,
            "locale": order.locale,
            "currency": order.currency,
            "amount": order.amount,
            "ordered_at": order.ordered_at,
            "skus": [item.sku for item in order.items],
            "names": [item.name for item in order.items],
            "quantities": [item.quantity for item in order.items],
            "unit_prices": [item.unit_price for item in order.items],
            "event_id": event.id,
            "aggregatetype": events.AGGREGATE_TYPE,
            "key": event.key,
            "type": events.TYPE,
            "payload": event.value,
            "headers": json.dumps(event.headers),
            "principal": use.principal,
            "operation": use.operation,
            "idempotency_key": use.key,
            "fingerprint": use.fingerprint,
        },
        then=outbox.WAKE_RELAY,
    )
    return order


def _price(
    request: OrderRequest,
    products: Mapping[str, CatalogueEntry],
    *,
    user_id: str,
    ordered_at: datetime,
) -> PlacedOrder:
    """Give every line its name and unit price of now, and add up."""
    unknown = [
        {"pointer": f"/items/{index}/sku", "detail": f"{sku} is not for sale."}
        for index, (sku, _) in enumerate(request.items)
        if sku not in products
    ]
    if unknown:
        raise ProductUnknown("An item names a product that is not for sale.", errors=unknown)
    items = [
        Item(sku, products[sku].name(request.locale), quantity, products[sku].unit_price)
        for sku, quantity in request.items
    ]
    amount = sum((item.unit_price * item.quantity for item in items), Decimal(0))
    if request.expected_amount is not None and request.expected_amount != amount:
        raise PriceChanged(
            f"The order comes to {amount:f} {request.currency}, not to the expected amount."
        )
    return PlacedOrder(
        id=uuid7(),
        user_id=user_id,
        email=request.email,
        locale=request.locale,
        currency=request.currency,
        amount=amount,
        ordered_at=ordered_at,
        items=items,
    )


def _is_rolled_back(error: Error) -> bool:
    """Say whether the database has surely undone everything, and another try may go better."""
    if isinstance(error, UniqueViolation):
        return error.diag.constraint_name == idempotency.UNIQUE_CONSTRAINT
    return isinstance(error, SerializationFailure | DeadlockDetected | LostBeforeCommit)
