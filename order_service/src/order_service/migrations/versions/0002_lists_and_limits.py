"""Indexes for a user's list of orders and for counting a user's and a recipient's."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    op.create_index("orders_user", "orders", ["user_id", "ordered_at", "id"])
    op.create_index("orders_recipient", "orders", [sa.text("lower(email)"), "ordered_at"])
    op.create_index("idempotency_keys_age", "idempotency_keys", ["created_at"])


def downgrade() -> None:
    op.drop_index("idempotency_keys_age", "idempotency_keys")
    op.drop_index("orders_recipient", "orders")
    op.drop_index("orders_user", "orders")
