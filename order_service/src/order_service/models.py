"""The tables."""

import math
import time
from datetime import datetime
from decimal import Decimal
from typing import Any
from uuid import UUID

from flask_sqlalchemy import SQLAlchemy
from sqlalchemy import (
    JSON,
    BigInteger,
    CheckConstraint,
    DateTime,
    Engine,
    ForeignKey,
    Index,
    Numeric,
    create_engine,
    event,
    func,
    text,
)
from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.exc import InvalidatePoolError
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship
from sqlalchemy.pool import ConnectionPoolEntry

# No scale: a price keeps the digits its currency has, 12000 for KRW, 8.25 for USD.
MONEY = Numeric()
INSTANT = DateTime(timezone=True)

# A statement that takes longer than this has gone wrong: better 503 than a thread that hangs.
STATEMENT_TIMEOUT_MS = 5_000
LOCK_TIMEOUT_MS = 2_000
IDLE_IN_TRANSACTION_TIMEOUT_MS = 10_000

# One for each thread of a gunicorn worker: a request never waits for a connection for long.
POOL_SIZE = 8
POOL_TIMEOUT_SECONDS = 2.0

ENGINE_OPTIONS: dict[str, Any] = {
    # An error's text must not hold a customer's address.
    "hide_parameters": True,
    "pool_pre_ping": True,
    "pool_size": POOL_SIZE,
    "max_overflow": 0,
    "pool_timeout": POOL_TIMEOUT_SECONDS,
    "connect_args": {
        "connect_timeout": 5,
        # A database whose host vanished in silence is given up on within seconds.
        "keepalives_idle": 5,
        "keepalives_interval": 2,
        "keepalives_count": 3,
        "tcp_user_timeout": 10_000,
        "options": f"-c statement_timeout={STATEMENT_TIMEOUT_MS} -c lock_timeout={LOCK_TIMEOUT_MS}"
        f" -c idle_in_transaction_session_timeout={IDLE_IN_TRANSACTION_TIMEOUT_MS}",
    },
}

API_ENGINE_OPTIONS: dict[str, Any] = {
    **ENGINE_OPTIONS,
    # A transaction writes its own BEGIN and COMMIT; reads need none.
    "isolation_level": "AUTOCOMMIT",
    "pool_pre_ping": False,  # see ping_after_a_pause
}
# Under load a ping before each use would be a round trip in six.
PAUSE_SECONDS = 1.0


class Base(DeclarativeBase):
    """What Alembic compares with the database."""


db = SQLAlchemy(model_class=Base, disable_autonaming=True)


def make_engine(database_url: str) -> Engine:
    """Build the engine of a process that serves no requests."""
    return create_engine(database_url, **ENGINE_OPTIONS)


def ping_after_a_pause(engine: Engine) -> None:
    """Let the pool ping a connection that was not used for a second, and replace a dead one."""

    @event.listens_for(engine, "checkin")
    def note(_: Any, record: ConnectionPoolEntry) -> None:
        record.info["used_at"] = time.monotonic()

    @event.listens_for(engine, "checkout")
    def ping(connection: DBAPIConnection, record: ConnectionPoolEntry, _: Any) -> None:
        if time.monotonic() - record.info.get("used_at", math.inf) > PAUSE_SECONDS:
            try:
                engine.dialect.do_ping(connection)
            except engine.dialect.loaded_dbapi.Error as error:
                raise InvalidatePoolError from error


class Product(Base):
    """What can be ordered, and for how much."""

    __tablename__ = "products"

    sku: Mapped[str] = mapped_column(primary_key=True)
    name_ko: Mapped[str]
    name_en: Mapped[str]
    unit_price: Mapped[Decimal] = mapped_column(MONEY)
    currency: Mapped[str]


class OrderItem(Base):
    """One line of an order; name and unit price as they were when it was placed."""

    __tablename__ = "order_items"

    order_id: Mapped[UUID] = mapped_column(ForeignKey("orders.id"), primary_key=True)
    line: Mapped[int] = mapped_column(primary_key=True)
    sku: Mapped[str]
    name: Mapped[str]
    quantity: Mapped[int]
    unit_price: Mapped[Decimal] = mapped_column(MONEY)


class Order(Base):
    """An accepted order."""

    __tablename__ = "orders"
    __table_args__ = (
        Index("orders_user", "user_id", "ordered_at", "id"),
        Index("orders_recipient", text("lower(email)"), "ordered_at"),
    )

    id: Mapped[UUID] = mapped_column(primary_key=True)
    user_id: Mapped[str]
    email: Mapped[str]
    locale: Mapped[str]
    currency: Mapped[str]
    amount: Mapped[Decimal] = mapped_column(MONEY)
    ordered_at: Mapped[datetime] = mapped_column(INSTANT)
    items: Mapped[list[OrderItem]] = relationship(order_by=OrderItem.line, lazy="selectin")


class OutboxRow(Base):
    """One event on its way to the topic; the first columns are named as Debezium's router does."""

    __tablename__ = "outbox"
    __table_args__ = (
        CheckConstraint("state IN ('INIT', 'PUBLISHED', 'COMPLETED', 'FAILED')", name="state"),
        Index("outbox_init", "id", postgresql_where=text("state = 'INIT'")),
        Index("outbox_published", "id", postgresql_where=text("state = 'PUBLISHED'")),
        Index("outbox_failed", "id", postgresql_where=text("state = 'FAILED'")),
        Index("outbox_aggregateid", "aggregateid"),
    )

    id: Mapped[UUID] = mapped_column(primary_key=True)
    aggregatetype: Mapped[str]
    aggregateid: Mapped[str]
    type: Mapped[str]
    payload: Mapped[bytes]
    # json, not jsonb: the names keep the order in which they were encoded.
    headers: Mapped[dict[str, str]] = mapped_column(JSON)
    occurred_at: Mapped[datetime] = mapped_column(INSTANT)
    state: Mapped[str] = mapped_column(server_default="INIT")
    due_at: Mapped[datetime] = mapped_column(INSTANT, server_default=func.now())
    republished_count: Mapped[int] = mapped_column(server_default="0")
    topic_id: Mapped[str | None]
    partition: Mapped[int | None]
    offset: Mapped[int | None] = mapped_column(BigInteger)
    published_at: Mapped[datetime | None] = mapped_column(INSTANT)
    completed_at: Mapped[datetime | None] = mapped_column(INSTANT)
    reason: Mapped[str | None]


class IdempotencyKey(Base):
    """A key a client used, and the order it stands for."""

    __tablename__ = "idempotency_keys"
    __table_args__ = (Index("idempotency_keys_age", "created_at"),)

    principal: Mapped[str] = mapped_column(primary_key=True)
    operation: Mapped[str] = mapped_column(primary_key=True)
    key: Mapped[str] = mapped_column(primary_key=True)
    fingerprint: Mapped[bytes]
    order_id: Mapped[UUID]
    created_at: Mapped[datetime] = mapped_column(INSTANT, server_default=func.now())


class Position(Base):
    """How far the read-back has read a partition; `next_offset` is the first one not read."""

    __tablename__ = "readback_positions"

    topic_id: Mapped[str] = mapped_column(primary_key=True)
    partition: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    next_offset: Mapped[int] = mapped_column(BigInteger)
