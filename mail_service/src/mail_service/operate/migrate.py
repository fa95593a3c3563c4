"""`migrate`: the database's schema, up to this release."""

from pathlib import Path

import click
from alembic import command
from alembic.config import Config
from alembic.util import CommandError
from sqlalchemy import text

from mail_service.models import make_engine
from mail_service.operate.output import CannotBeDone, examples
from mail_service.settings import Settings

MIGRATIONS = Path(__file__).parent.parent / "migrations"
# One migration at a time, however many jobs are started at once.
LOCK_KEYS = {"first": 0x6D61, "second": 0x6D69}

_NO_HURRY = text("""
    SELECT set_config('statement_timeout', '0', true), set_config('lock_timeout', '60s', true)
""")


@click.command(epilog=examples("mail-service migrate", "mail-service migrate --check"))
@click.option("--check", is_flag=True, help="Change nothing; fail when tables and code differ.")
def migrate(*, check: bool) -> None:
    """Bring the database to the schema of this release."""
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS))
    with make_engine(Settings.from_environment().database_url).begin() as connection:
        connection.execute(_NO_HURRY)
        connection.execute(text("SELECT pg_advisory_xact_lock(:first, :second)"), LOCK_KEYS)
        config.attributes["connection"] = connection
        try:
            if check:
                command.check(config)
            else:
                command.upgrade(config, "head")
        except CommandError as error:
            kind = click.ClickException if check else CannotBeDone
            raise kind(str(error)) from error
    click.echo("tables and code agree" if check else "migrated")
