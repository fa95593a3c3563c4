"""The tables."""

from datetime import datetime
from typing import Any
from uuid import UUID

from flask_sqlalchemy import SQLAlchemy
from sqlalchemy import (
    JSON,
    BigInteger,
    CheckConstraint,
    DateTime,
    Engine,
    Identity,
    Index,
    UniqueConstraint,
    create_engine,
    func,
    text,
)
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

INSTANT = DateTime(timezone=True)

# A statement that takes longer than this has gone wrong: better an error than a thread that hangs.
STATEMENT_TIMEOUT_MS = 10_000
LOCK_TIMEOUT_MS = 5_000
IDLE_IN_TRANSACTION_TIMEOUT_MS = 10_000

ENGINE_OPTIONS: dict[str, Any] = {
    # An error's text must not hold a customer's address.
    "hide_parameters": True,
    "pool_pre_ping": True,
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


class Base(DeclarativeBase):
    """What Alembic compares with the database."""


db = SQLAlchemy(model_class=Base, disable_autonaming=True)


def make_engine(database_url: str) -> Engine:
    """Build the engine of a process; every thread opens connections of its own from it."""
    return create_engine(database_url, **ENGINE_OPTIONS)


class Delivery(Base):
    """The ledger: one row for each mail, known by kind, order and campaign.

    `event` is the record's value as it came; it is there as long as the row is open.
    """

    __tablename__ = "deliveries"
    __table_args__ = (
        UniqueConstraint("kind", "order_id", "campaign"),
        CheckConstraint(
            "state IN ('SENDING', 'RETRY', 'UNKNOWN', 'HELD', 'DEAD', 'SENT', 'ERASED')",
            name="state",
        ),
        CheckConstraint("(event IS NULL) = (state IN ('SENT', 'ERASED'))", name="event"),
        Index("deliveries_due", "due_at", postgresql_where=text("state IN ('RETRY', 'UNKNOWN')")),
        Index("deliveries_sending", "owner", postgresql_where=text("state = 'SENDING'")),
    )

    id: Mapped[int] = mapped_column(BigInteger, Identity(always=True), primary_key=True)
    kind: Mapped[str]
    order_id: Mapped[str]
    campaign: Mapped[str]
    state: Mapped[str]
    message_id: Mapped[str]
    event: Mapped[bytes | None]
    event_at: Mapped[datetime] = mapped_column(INSTANT)
    topic_id: Mapped[str]
    partition: Mapped[int]
    offset: Mapped[int] = mapped_column(BigInteger)
    taken_in_at: Mapped[datetime] = mapped_column(INSTANT, server_default=func.now())
    give_up_at: Mapped[datetime] = mapped_column(INSTANT)
    due_at: Mapped[datetime | None] = mapped_column(INSTANT)
    owner: Mapped[UUID | None]
    attempts: Mapped[int] = mapped_column(server_default="0")
    unknown_count: Mapped[int] = mapped_column(server_default="0")
    reason: Mapped[str | None]
    sent_at: Mapped[datetime | None] = mapped_column(INSTANT)
    sent_by: Mapped[str | None]
    reply: Mapped[str | None]


class DeadLetter(Base):
    """A record that cannot be read; `value` is capped, `value_sha256` is of the whole."""

    __tablename__ = "dead_letters"
    __table_args__ = (UniqueConstraint("topic_id", "partition", "offset"),)

    id: Mapped[int] = mapped_column(BigInteger, Identity(always=True), primary_key=True)
    topic_id: Mapped[str]
    partition: Mapped[int]
    offset: Mapped[int] = mapped_column(BigInteger)
    key: Mapped[bytes | None]
    value: Mapped[bytes | None]
    value_sha256: Mapped[str]
    headers: Mapped[list[list[str]]] = mapped_column(JSON)
    reason: Mapped[str]
    taken_in_at: Mapped[datetime] = mapped_column(INSTANT, server_default=func.now())


class Position(Base):
    """How far a partition was taken in; `epoch` is raised by an operator who moves it."""

    __tablename__ = "positions"

    topic_id: Mapped[str] = mapped_column(primary_key=True)
    partition: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    cluster_id: Mapped[str]
    next_offset: Mapped[int] = mapped_column(BigInteger)
    epoch: Mapped[int] = mapped_column(server_default="0")


class Replica(Base):
    """One process that sends; its rows are its own while the lease runs."""

    __tablename__ = "replicas"

    id: Mapped[UUID] = mapped_column(primary_key=True)
    name: Mapped[str]
    lease_until: Mapped[datetime] = mapped_column(INSTANT)
