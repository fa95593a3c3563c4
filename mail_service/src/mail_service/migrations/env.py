"""What Alembic runs; the connection comes from `mail-service migrate`."""

from alembic import context

from mail_service.models import Base

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=Base.metadata,
    compare_server_default=True,
    transaction_per_migration=False,
)
context.run_migrations()
