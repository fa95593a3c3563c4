"""An index for the few events that cannot be published."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    op.create_index("outbox_failed", "outbox", ["id"], postgresql_where=sa.text("state = 'FAILED'"))


def downgrade() -> None:
    op.drop_index("outbox_failed", "outbox")
