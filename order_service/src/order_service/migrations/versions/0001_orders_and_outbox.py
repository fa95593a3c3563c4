"""Products, orders, outbox, idempotency keys, read-back positions."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


def upgrade() -> None:
    op.create_table(
        "products",
        sa.Column("sku", sa.String, primary_key=True),
        sa.Column("name_ko", sa.String, nullable=False),
        sa.Column("name_en", sa.String, nullable=False),
        sa.Column("unit_price", sa.Numeric, nullable=False),
        sa.Column("currency", sa.String, nullable=False),
    )
    op.create_table(
        "orders",
        sa.Column("id", sa.Uuid, primary_key=True),
        sa.Column("user_id", sa.String, nullable=False),
        sa.Column("email", sa.String, nullable=False),
        sa.Column("locale", sa.String, nullable=False),
        sa.Column("currency", sa.String, nullable=False),
        sa.Column("amount", sa.Numeric, nullable=False),
        sa.Column("ordered_at", sa.DateTime(timezone=True), nullable=False),
    )
    op.create_table(
        "order_items",
        sa.Column("order_id", sa.Uuid, sa.ForeignKey("orders.id"), primary_key=True),
        sa.Column("line", sa.Integer, primary_key=True),
        sa.Column("sku", sa.String, nullable=False),
        sa.Column("name", sa.String, nullable=False),
        sa.Column("quantity", sa.Integer, nullable=False),
        sa.Column("unit_price", sa.Numeric, nullable=False),
    )
    op.create_table(
        "outbox",
        sa.Column("id", sa.Uuid, primary_key=True),
        sa.Column("aggregatetype", sa.String, nullable=False),
        sa.Column("aggregateid", sa.String, nullable=False),
        sa.Column("type", sa.String, nullable=False),
        sa.Column("payload", sa.LargeBinary, nullable=False),
        sa.Column("headers", sa.JSON, nullable=False),
        sa.Column("occurred_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("state", sa.String, nullable=False, server_default="INIT"),
        sa.Column(
            "due_at", sa.DateTime(timezone=True), nullable=False, server_default=sa.func.now()
        ),
        sa.Column("republished_count", sa.Integer, nullable=False, server_default="0"),
        sa.Column("topic_id", sa.String),
        sa.Column("partition", sa.Integer),
        sa.Column("offset", sa.BigInteger),
        sa.Column("published_at", sa.DateTime(timezone=True)),
        sa.Column("completed_at", sa.DateTime(timezone=True)),
        sa.Column("reason", sa.String),
        sa.CheckConstraint("state IN ('INIT', 'PUBLISHED', 'COMPLETED', 'FAILED')", name="state"),
    )
    op.create_index("outbox_init", "outbox", ["id"], postgresql_where=sa.text("state = 'INIT'"))
    op.create_index(
        "outbox_published", "outbox", ["id"], postgresql_where=sa.text("state = 'PUBLISHED'")
    )
    op.create_index("outbox_aggregateid", "outbox", ["aggregateid"])
    op.create_table(
        "idempotency_keys",
        sa.Column("principal", sa.String, primary_key=True),
        sa.Column("operation", sa.String, primary_key=True),
        sa.Column("key", sa.String, primary_key=True),
        sa.Column("fingerprint", sa.LargeBinary, nullable=False),
        sa.Column("order_id", sa.Uuid, nullable=False),
        sa.Column(
            "created_at", sa.DateTime(timezone=True), nullable=False, server_default=sa.func.now()
        ),
    )
    op.create_table(
        "readback_positions",
        sa.Column("topic_id", sa.String, primary_key=True),
        sa.Column("partition", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("next_offset", sa.BigInteger, nullable=False),
    )


def downgrade() -> None:
    for table in (
        "readback_positions",
        "idempotency_keys",
        "outbox",
        "order_items",
        "orders",
        "products",
    ):
        op.drop_table(table)
