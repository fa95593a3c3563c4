"""What people decide: campaigns, rewinds, accepted gaps, orders erased before they came."""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"

INSTANT = sa.DateTime(timezone=True)
# The planner keeps values of columns as samples: none of these, which hold addresses.
NOT_SAMPLED = (("deliveries", "event"), ("dead_letters", "key"), ("dead_letters", "value"))


def upgrade() -> None:
    for name in ("topic_id", "partition", "offset"):
        op.alter_column("deliveries", name, nullable=True)
    for table, name in NOT_SAMPLED:
        op.execute(f"ALTER TABLE {table} ALTER COLUMN {name} SET STATISTICS 0")
        op.execute(f"ANALYZE {table} ({name})")
    op.add_column("deliveries", sa.Column("release", sa.String))
    op.add_column("deliveries", sa.Column("template_digest", sa.String))
    op.create_index(
        "deliveries_stopped",
        "deliveries",
        ["id"],
        postgresql_where=sa.text("state IN ('HELD', 'DEAD')"),
    )
    op.create_table(
        "campaigns",
        sa.Column("name", sa.String, primary_key=True),
        sa.Column("reason", sa.String, nullable=False),
        sa.Column("begun_at", INSTANT, nullable=False, server_default=sa.func.now()),
    )
    for name in ("held_until", "accepted_until"):
        op.add_column(
            "positions", sa.Column(name, sa.BigInteger, nullable=False, server_default="0")
        )
    op.add_column("positions", sa.Column("released_at", INSTANT))


def downgrade() -> None:
    for name in ("released_at", "accepted_until", "held_until"):
        op.drop_column("positions", name)
    op.drop_table("campaigns")
    op.drop_index("deliveries_stopped", "deliveries")
    op.drop_column("deliveries", "template_digest")
    op.drop_column("deliveries", "release")
    op.execute("DELETE FROM deliveries WHERE topic_id IS NULL")
    for name in ("topic_id", "partition", "offset"):
        op.alter_column("deliveries", name, nullable=False)
    for table, name in NOT_SAMPLED:
        op.execute(f"ALTER TABLE {table} ALTER COLUMN {name} SET STATISTICS -1")
