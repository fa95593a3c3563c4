"""The database's schema: up, checked, down, up again."""

from alembic import command
from alembic.config import Config
from harness import Environment, Ledger, run
from sqlalchemy import Engine, inspect

from mail_service.models import Base
from mail_service.operate.migrate import MIGRATIONS


def tables(engine: Engine) -> set[str]:
    """Return the tables of the database, Alembic's own apart."""
    return set(inspect(engine).get_table_names()) - {"alembic_version"}


def downgrade(engine: Engine) -> None:
    """Undo every migration."""
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS))
    with engine.begin() as connection:
        config.attributes["connection"] = connection
        command.downgrade(config, "base")


def test_the_migrations_make_the_tables_of_the_code(
    base_environment: Environment, engine: Engine
) -> None:
    """What a deployment migrates to is what this release was written for."""
    assert tables(engine) == set(Base.metadata.tables)

    checked = run(base_environment, "migrate", "--check")

    assert checked.returncode == 0, checked.stderr


def test_migrating_twice_changes_nothing(
    base_environment: Environment, ledger_rows: Ledger
) -> None:
    """A migration job may run again, and rows stay."""
    ledger_rows.change(
        "INSERT INTO positions (topic_id, partition, cluster_id, next_offset)"
        " VALUES ('t', 0, 'c', 7)"
    )

    assert run(base_environment, "migrate").returncode == 0

    assert ledger_rows.positions() == {0: 7}


def test_a_table_that_differs_is_found(base_environment: Environment, ledger_rows: Ledger) -> None:
    """The check is one: a column that the code does not know fails it."""
    ledger_rows.change("ALTER TABLE replicas ADD COLUMN extra text")
    try:
        checked = run(base_environment, "migrate", "--check")
    finally:
        ledger_rows.change("ALTER TABLE replicas DROP COLUMN extra")

    assert checked.returncode == 1
    assert "extra" in checked.stderr


def test_the_migrations_can_be_undone_and_done_again(
    base_environment: Environment, engine: Engine
) -> None:
    """A release can be taken back, and put in place again."""
    try:
        downgrade(engine)
        assert tables(engine) == set()
    finally:
        again = run(base_environment, "migrate")

    assert again.returncode == 0, again.stderr
    assert tables(engine) == set(Base.metadata.tables)
