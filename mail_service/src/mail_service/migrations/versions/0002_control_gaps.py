"""The pause and the rate of the group, gaps, and when a mail was first suspected."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    op.add_column("deliveries", sa.Column("suspected_at", sa.DateTime(timezone=True)))
    op.create_table(
        "gaps",
        sa.Column("id", sa.BigInteger, sa.Identity(always=True), primary_key=True),
        sa.Column("topic_id", sa.String, nullable=False),
        sa.Column("partition", sa.Integer, nullable=False),
        sa.Column("first_offset", sa.BigInteger, nullable=False),
        sa.Column("end_offset", sa.BigInteger),
        sa.Column("reason", sa.String, nullable=False),
        sa.Column(
            "found_at", sa.DateTime(timezone=True), nullable=False, server_default=sa.func.now()
        ),
        sa.Column("accepted_at", sa.DateTime(timezone=True)),
        sa.UniqueConstraint("topic_id", "partition", "first_offset"),
    )
    op.create_table(
        "control",
        sa.Column("id", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("is_paused", sa.Boolean, nullable=False, server_default=sa.false()),
        sa.Column("reason", sa.String),
        sa.Column("tokens", sa.Float, nullable=False, server_default="0"),
        sa.Column(
            "refilled_at", sa.DateTime(timezone=True), nullable=False, server_default=sa.func.now()
        ),
        sa.CheckConstraint("id = 1", name="one"),
    )
    op.execute("INSERT INTO control (id) VALUES (1)")


def downgrade() -> None:
    op.drop_table("control")
    op.drop_table("gaps")
    op.drop_column("deliveries", "suspected_at")
