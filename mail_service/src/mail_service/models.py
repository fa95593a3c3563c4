"""The tables."""

import math
import time
from collections.abc import Sequence
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
    event,
    false,
    func,
    text,
)
from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.exc import InvalidatePoolError
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from sqlalchemy.pool import ConnectionPoolEntry

INSTANT = DateTime(timezone=True)

# A statement that takes longer than this has gone wrong: better an error than a thread that hangs.
STATEMENT_TIMEOUT_MS = 10_000
LOCK_TIMEOUT_MS = 5_000
IDLE_IN_TRANSACTION_TIMEOUT_MS = 10_000
# Under load a ping before each use would be a round trip in five.
PAUSE_SECONDS = 1.0

ENGINE_OPTIONS: dict[str, Any] = {
    # An error's text must not hold a customer's address.
    "hide_parameters": True,
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
    """Build the engine of a process; threads open connections of their own from it."""
    engine = create_engine(database_url, **ENGINE_OPTIONS)
    _ping_after_a_pause(engine)
    return engine


def at_once(engine: Engine) -> Engine:
    """Build an engine for what is one statement, which is a transaction by itself.

    BEGIN and COMMIT would be two round trips more; to turn a connection of the other engine into
    such a one, and back, was a quarter of the recorder's time.
    """
    options = {**ENGINE_OPTIONS, "isolation_level": "AUTOCOMMIT", "pool_reset_on_return": None}
    alike = create_engine(engine.url, **options)
    _ping_after_a_pause(alike)
    return alike


def _ping_after_a_pause(engine: Engine) -> None:
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
        Index("deliveries_stopped", "id", postgresql_where=text("state IN ('HELD', 'DEAD')")),
        # For the purge: rows come in the order of this time, and a block's range costs nothing.
        Index("deliveries_taken_in", "taken_in_at", postgresql_using="brin"),
    )

    id: Mapped[int] = mapped_column(BigInteger, Identity(always=True), primary_key=True)
    kind: Mapped[str]
    order_id: Mapped[str]
    campaign: Mapped[str]
    state: Mapped[str]
    message_id: Mapped[str]
    event: Mapped[bytes | None]
    event_at: Mapped[datetime] = mapped_column(INSTANT)
    # An order that was erased before it came has no record here.
    topic_id: Mapped[str | None]
    partition: Mapped[int | None]
    offset: Mapped[int | None] = mapped_column(BigInteger)
    taken_in_at: Mapped[datetime] = mapped_column(INSTANT, server_default=func.now())
    give_up_at: Mapped[datetime] = mapped_column(INSTANT)
    due_at: Mapped[datetime | None] = mapped_column(INSTANT)
    owner: Mapped[UUID | None]
    attempts: Mapped[int] = mapped_column(server_default="0")
    unknown_count: Mapped[int] = mapped_column(server_default="0")
    suspected_at: Mapped[datetime | None] = mapped_column(INSTANT)
    reason: Mapped[str | None]
    sent_at: Mapped[datetime | None] = mapped_column(INSTANT)
    sent_by: Mapped[str | None]
    reply: Mapped[str | None]
    release: Mapped[str | None]
    template_digest: Mapped[str | None]


class Campaign(Base):
    """A deliberate second sending: why, and since when."""

    __tablename__ = "campaigns"

    name: Mapped[str] = mapped_column(primary_key=True)
    reason: Mapped[str]
    begun_at: Mapped[datetime] = mapped_column(INSTANT, server_default=func.now())


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
    """How far a partition was taken in; `epoch` is raised by an operator who moves it.

    What lies below `held_until` is taken in as HELD. A commit of the group up to `accepted_until`
    is known and no sign of a lost ledger. After `released_at` mails have the full time again.
    """

    __tablename__ = "positions"

    topic_id: Mapped[str] = mapped_column(primary_key=True)
    partition: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    cluster_id: Mapped[str]
    next_offset: Mapped[int] = mapped_column(BigInteger)
    epoch: Mapped[int] = mapped_column(server_default="0")
    held_until: Mapped[int] = mapped_column(BigInteger, server_default="0")
    accepted_until: Mapped[int] = mapped_column(BigInteger, server_default="0")
    released_at: Mapped[datetime | None] = mapped_column(INSTANT)


class Gap(Base):
    """Offsets of a partition that were never read, from `first_offset` up to `end_offset`."""

    __tablename__ = "gaps"
    __table_args__ = (UniqueConstraint("topic_id", "partition", "first_offset"),)

    id: Mapped[int] = mapped_column(BigInteger, Identity(always=True), primary_key=True)
    topic_id: Mapped[str]
    partition: Mapped[int]
    first_offset: Mapped[int] = mapped_column(BigInteger)
    end_offset: Mapped[int | None] = mapped_column(BigInteger)
    reason: Mapped[str]
    found_at: Mapped[datetime] = mapped_column(INSTANT, server_default=func.now())
    accepted_at: Mapped[datetime | None] = mapped_column(INSTANT)


class Control(Base):
    """The one row that all claims of the group look at: the pause, and the tokens of its rate."""

    __tablename__ = "control"
    __table_args__ = (CheckConstraint("id = 1", name="one"),)

    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    is_paused: Mapped[bool] = mapped_column(server_default=false())
    reason: Mapped[str | None]
    tokens: Mapped[float] = mapped_column(server_default="0")
    refilled_at: Mapped[datetime] = mapped_column(INSTANT, server_default=func.now())


class Replica(Base):
    """One process that sends; its rows are its own while the lease runs."""

    __tablename__ = "replicas"

    id: Mapped[UUID] = mapped_column(primary_key=True)
    name: Mapped[str]
    lease_until: Mapped[datetime] = mapped_column(INSTANT)


def columns(rows: Sequence[Any], kind: type, *, prefix: str = "") -> dict[str, list[Any]]:
    """Turn rows into one list a field, named in the plural, as the statements take them."""
    names: Sequence[str] = kind.__slots__  # type: ignore[attr-defined]
    return {f"{prefix}{name}s": [getattr(row, name) for row in rows] for name in names}
