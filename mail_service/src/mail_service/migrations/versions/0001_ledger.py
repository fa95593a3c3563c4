"""Deliveries, dead letters, positions, replicas."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None

INSTANT = sa.DateTime(timezone=True)


def upgrade() -> None:
    op.create_table(
        "deliveries",
        sa.Column("id", sa.BigInteger, sa.Identity(always=True), primary_key=True),
        sa.Column("kind", sa.String, nullable=False),
        sa.Column("order_id", sa.String, nullable=False),
        sa.Column("campaign", sa.String, nullable=False),
        sa.Column("state", sa.String, nullable=False),
        sa.Column("message_id", sa.String, nullable=False),
        sa.Column("event", sa.LargeBinary),
        sa.Column("event_at", INSTANT, nullable=False),
        sa.Column("topic_id", sa.String, nullable=False),
        sa.Column("partition", sa.Integer, nullable=False),
        sa.Column("offset", sa.BigInteger, nullable=False),
        sa.Column("taken_in_at", INSTANT, nullable=False, server_default=sa.func.now()),
        sa.Column("give_up_at", INSTANT, nullable=False),
        sa.Column("due_at", INSTANT),
        sa.Column("owner", sa.Uuid),
        sa.Column("attempts", sa.Integer, nullable=False, server_default="0"),
        sa.Column("unknown_count", sa.Integer, nullable=False, server_default="0"),
        sa.Column("reason", sa.String),
        sa.Column("sent_at", INSTANT),
        sa.Column("sent_by", sa.String),
        sa.Column("reply", sa.String),
        sa.UniqueConstraint("kind", "order_id", "campaign"),
        sa.CheckConstraint(
            "state IN ('SENDING', 'RETRY', 'UNKNOWN', 'HELD', 'DEAD', 'SENT', 'ERASED')",
            name="state",
        ),
        sa.CheckConstraint("(event IS NULL) = (state IN ('SENT', 'ERASED'))", name="event"),
    )
    op.create_index(
        "deliveries_due",
        "deliveries",
        ["due_at"],
        postgresql_where=sa.text("state IN ('RETRY', 'UNKNOWN')"),
    )
    op.create_index(
        "deliveries_sending",
        "deliveries",
        ["owner"],
        postgresql_where=sa.text("state = 'SENDING'"),
    )
    op.create_table(
        "dead_letters",
        sa.Column("id", sa.BigInteger, sa.Identity(always=True), primary_key=True),
        sa.Column("topic_id", sa.String, nullable=False),
        sa.Column("partition", sa.Integer, nullable=False),
        sa.Column("offset", sa.BigInteger, nullable=False),
        sa.Column("key", sa.LargeBinary),
        sa.Column("value", sa.LargeBinary),
        sa.Column("value_sha256", sa.String, nullable=False),
        sa.Column("headers", sa.JSON, nullable=False),
        sa.Column("reason", sa.String, nullable=False),
        sa.Column("taken_in_at", INSTANT, nullable=False, server_default=sa.func.now()),
        sa.UniqueConstraint("topic_id", "partition", "offset"),
    )
    op.create_table(
        "positions",
        sa.Column("topic_id", sa.String, primary_key=True),
        sa.Column("partition", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("cluster_id", sa.String, nullable=False),
        sa.Column("next_offset", sa.BigInteger, nullable=False),
        sa.Column("epoch", sa.Integer, nullable=False, server_default="0"),
    )
    op.create_table(
        "replicas",
        sa.Column("id", sa.Uuid, primary_key=True),
        sa.Column("name", sa.String, nullable=False),
        sa.Column("lease_until", INSTANT, nullable=False),
    )


def downgrade() -> None:
    for table in ("replicas", "positions", "dead_letters", "deliveries"):
        op.drop_table(table)
