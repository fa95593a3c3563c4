"""The routes: HTTP in, HTTP out, no rules, no SQL."""

import re
from typing import Any
from uuid import UUID

from flask import Response, abort, current_app, g, request, url_for
from flask_smorest import Blueprint
from sqlalchemy import Select, String, cast, select, tuple_
from werkzeug.http import quote_etag

from order_service import docs, idempotency
from order_service.auth import requires
from order_service.bodies import StrictParser
from order_service.errors import OrderNotFound
from order_service.limits import OrderLimits
from order_service.models import Order, OutboxRow, Product, db
from order_service.orders import OrderRequest, place_order
from order_service.schemas import (
    Cursor,
    OrderListArgumentsSchema,
    OrderListSchema,
    OrderRequestSchema,
    OrderSchema,
    ProductListSchema,
    TrackedOrderSchema,
)
from order_service.settings import Settings

PLACE_ORDER = "POST /v1/orders"
# W3C Trace Context, version 00; all zeros name no trace.
TRACEPARENT = re.compile(r"00-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}")


class StrictBlueprint(Blueprint):
    """flask-smorest's blueprint, strict about bodies and about what a 304 carries."""

    ARGUMENTS_PARSER = StrictParser()

    def _check_not_modified(self, etag: str) -> None:
        """Answer 304 with the tag, which RFC 9110 wants and flask-smorest leaves out."""
        if etag in request.if_none_match:
            abort(Response(status=304, headers={"ETag": quote_etag(etag)}))


blueprint = StrictBlueprint("orders", __name__, url_prefix="/v1", description="Orders and products")


@blueprint.post("/orders")
@requires("orders:write")
@blueprint.doc(**docs.PLACE_ORDER)
@blueprint.arguments(OrderRequestSchema())
@blueprint.response(201, OrderSchema)
def post_order(body: dict[str, Any]) -> tuple[Any, int, dict[str, str]]:
    """Place an order; the Idempotency-Key makes sending it again safe."""
    settings: Settings = current_app.extensions["settings"]
    use = idempotency.Use(
        principal=g.principal.user_id,
        operation=PLACE_ORDER,
        key=idempotency.parse_key(request.headers.get("Idempotency-Key")),
        fingerprint=idempotency.fingerprint(body),
    )
    order_request = OrderRequest(
        email=body["email"],
        locale=body["locale"],
        currency=settings.shop_currency,
        items=[(item["sku"], item["quantity"]) for item in body["items"]],
        expected_amount=body["expected_amount"],
        traceparent=_traceparent(),
    )
    limits = OrderLimits(
        settings.orders_per_user_per_minute, settings.orders_per_recipient_per_hour
    )
    placement = place_order(db.engine, order_request, use, limits)
    headers = {"Location": url_for("orders.get_order", order_id=placement.order.id)}
    if placement.is_replayed:
        headers["Idempotent-Replayed"] = "true"
    return placement.order, 201, headers


@blueprint.get("/orders")
@requires("orders:read")
@blueprint.doc(**docs.LIST_ORDERS)
@blueprint.arguments(OrderListArgumentsSchema, location="query")
@blueprint.response(200, OrderListSchema)
def get_orders(arguments: dict[str, Any]) -> tuple[dict[str, Any], int, dict[str, str]]:
    """List my orders, newest first, a page at a time."""
    limit = arguments["limit"]
    mine = _my_orders().order_by(Order.ordered_at.desc(), Order.id.desc()).limit(limit + 1)
    if "cursor" in arguments:
        mine = mine.where(tuple_(Order.ordered_at, Order.id) < tuple_(*arguments["cursor"]))
    found = db.session.execute(mine).all()
    page = {"items": [_tracked(order, row) for order, row in found[:limit]], "next_cursor": None}
    if len(found) <= limit:
        return page, 200, {}
    last = found[limit - 1][0]
    cursor = Cursor.of(last.ordered_at, last.id)
    url = url_for("orders.get_orders", limit=limit, cursor=cursor)
    return {**page, "next_cursor": cursor}, 200, {"Link": f'<{url}>; rel="next"'}


@blueprint.get("/orders/<uuid:order_id>")
@requires("orders:read")
@blueprint.doc(**docs.GET_ORDER)
@blueprint.etag
@blueprint.response(200, TrackedOrderSchema)
def get_order(order_id: UUID) -> dict[str, Any]:
    """Show one of my orders, and how far its event is on its way to the topic."""
    found = db.session.execute(_my_orders().where(Order.id == order_id)).one_or_none()
    if found is None:
        raise OrderNotFound("There is no such order.")
    order, row = found
    return _tracked(order, row)


@blueprint.get("/products")
@blueprint.doc(**docs.LIST_PRODUCTS)
@blueprint.response(200, ProductListSchema)
def get_products() -> dict[str, Any]:
    """List what can be ordered."""
    return {"items": db.session.scalars(select(Product).order_by(Product.sku)).all()}


def _traceparent() -> str | None:
    """Return the trace the client is in; what is none is not handed on."""
    given = request.headers.get("traceparent", "")
    return given if TRACEPARENT.fullmatch(given) else None


def _my_orders() -> Select[Order, OutboxRow]:
    return (
        select(Order, OutboxRow)
        .outerjoin(OutboxRow, OutboxRow.aggregateid == cast(Order.id, String))
        .where(Order.user_id == g.principal.user_id)
    )


def _tracked(order: Order, row: OutboxRow | None) -> dict[str, Any]:
    return {**vars(order), "event": row}
