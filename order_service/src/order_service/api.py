"""The routes: HTTP in, HTTP out, no rules, no SQL."""

from typing import Any
from uuid import UUID

from flask import current_app, g, request, url_for
from flask_smorest import Blueprint
from sqlalchemy import select

from order_service import idempotency
from order_service.auth import requires
from order_service.errors import OrderNotFound
from order_service.models import Order, OutboxRow, Product, db
from order_service.orders import OrderRequest, place_order
from order_service.schemas import (
    OrderRequestSchema,
    OrderSchema,
    ProductListSchema,
    TrackedOrderSchema,
)
from order_service.settings import Settings

PLACE_ORDER = "POST /v1/orders"

blueprint = Blueprint("orders", __name__, url_prefix="/v1", description="Orders and products")


@blueprint.post("/orders")
@requires("orders:write")
@blueprint.arguments(OrderRequestSchema)
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
    )
    placement = place_order(db.engine, order_request, use)
    headers = {"Location": url_for("orders.get_order", order_id=placement.order.id)}
    if placement.is_replayed:
        headers["Idempotent-Replayed"] = "true"
    return placement.order, 201, headers


@blueprint.get("/orders/<uuid:order_id>")
@requires("orders:read")
@blueprint.response(200, TrackedOrderSchema)
def get_order(order_id: UUID) -> dict[str, Any]:
    """Show one of my orders, and how far its event is on its way to the topic."""
    found = db.session.execute(
        select(Order, OutboxRow)
        .outerjoin(OutboxRow, OutboxRow.aggregateid == str(order_id))
        .where(Order.id == order_id, Order.user_id == g.principal.user_id)
    ).one_or_none()
    if found is None:
        raise OrderNotFound("There is no such order.")
    order, row = found
    return {**vars(order), "event": row}


@blueprint.get("/products")
@blueprint.response(200, ProductListSchema)
def get_products() -> dict[str, Any]:
    """List what can be ordered."""
    return {"items": db.session.scalars(select(Product).order_by(Product.sku)).all()}
