"""Find the rows that were taken in long ago."""

from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    op.create_index("deliveries_taken_in", "deliveries", ["taken_in_at"], postgresql_using="brin")


def downgrade() -> None:
    op.drop_index("deliveries_taken_in", "deliveries")
