"""place_order: the one transaction."""

import json
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal

from psycopg2.errors import DeadlockDetected, SerializationFailure, UniqueViolation
from sqlalchemy import Connection, Engine, text
from sqlalchemy.exc import IntegrityError, OperationalError
from sqlalchemy.orm import Session
from uuid_utils.compat import uuid7

from order_service import catalogue, events, idempotency, outbox
from order_service.errors import PriceChanged, ProductUnknown
from order_service.events import Item, PlacedOrder
from order_service.limits import OrderLimits
from order_service.limits import check as check_limits
from order_service.models import Order
from order_service.telemetry import log, orders_placed

RETRIES = 2
RETRY_SECONDS = 0.05

# One statement, so that the order, its items, its event and its key are one round trip.
_INSERT = text("""
    WITH placed AS (
        INSERT INTO orders (id, user_id, email, locale, currency, amount, ordered_at)
        VALUES (:order_id, :user_id, :email, :locale, :currency, :amount, :ordered_at)
    ), items AS (
        INSERT INTO order_items (order_id, line, sku, name, quantity, unit_price)
        SELECT :order_id, line, sku, name, quantity, unit_price
          FROM unnest(CAST(:skus AS text[]), CAST(:names AS text[]),
                      CAST(:quantities AS integer[]), CAST(:unit_prices AS numeric[]))
               WITH ORDINALITY AS item (sku, name, quantity, unit_price, line)
    ), event AS (
        INSERT INTO outbox
               (id, aggregatetype, aggregateid, type, payload, headers, occurred_at)
        VALUES (:event_id, :aggregatetype, :key, :type, :payload, CAST(:headers AS json),
                :ordered_at)
    )
    INSERT INTO idempotency_keys (principal, operation, key, fingerprint, order_id)
    VALUES (:principal, :operation, :idempotency_key, :fingerprint, :order_id)
""")


@dataclass(frozen=True, slots=True)
class OrderRequest:
    """What a client asks for: quantities by sku, never a price."""

    email: str
    locale: str
    currency: str
    items: Sequence[tuple[str, int]]
    expected_amount: Decimal | None = None


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
    placement = _place(engine, request, use, limits)
    if not placement.is_replayed:
        outbox.wake_relay(engine)
    orders_placed.labels("replayed" if placement.is_replayed else "placed").inc()
    log.info("order.placed", order_id=str(placement.order.id), is_replayed=placement.is_replayed)
    return placement


def _place(
    engine: Engine, request: OrderRequest, use: idempotency.Use, limits: OrderLimits
) -> Placement:
    """Run the transaction, again only after the database has surely undone it.

    Any other failure, a COMMIT without an answer above all, is the client's to repeat.
    """
    for _ in range(RETRIES):
        try:
            with engine.begin() as connection:
                return _find_or_insert(connection, request, use, limits)
        except (IntegrityError, OperationalError) as error:
            if not _is_rolled_back(error):
                raise
            time.sleep(random.uniform(0, RETRY_SECONDS))  # noqa: S311 - spreads retries
    with engine.begin() as connection:
        return _find_or_insert(connection, request, use, limits)


def _find_or_insert(
    connection: Connection, request: OrderRequest, use: idempotency.Use, limits: OrderLimits
) -> Placement:
    claim = idempotency.claim(connection, use)
    if claim.order_id is not None:
        with Session(connection) as session:
            return Placement(session.get_one(Order, claim.order_id), is_replayed=True)
    check_limits(connection, limits, user_id=use.principal, email=request.email)
    order = _price(connection, request, user_id=use.principal, ordered_at=claim.at)
    event = events.order_created(order, event_id=uuid7())
    connection.execute(
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
    )
    return Placement(order, is_replayed=False)


def _price(
    connection: Connection, request: OrderRequest, *, user_id: str, ordered_at: datetime
) -> PlacedOrder:
    """Give every line its name and unit price of now, and add up."""
    products = catalogue.for_sale(
        connection, [sku for sku, _ in request.items], currency=request.currency
    )
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


def _is_rolled_back(error: IntegrityError | OperationalError) -> bool:
    """Say whether the database has surely undone everything, and another try may go better."""
    original = error.orig
    if isinstance(original, UniqueViolation):
        return bool(original.diag.constraint_name == idempotency.UNIQUE_CONSTRAINT)
    return isinstance(original, SerializationFailure | DeadlockDetected)
