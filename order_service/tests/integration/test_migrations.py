from collections.abc import Callable, Iterator
from subprocess import CompletedProcess

import pytest
from alembic import command
from alembic.config import Config
from sqlalchemy import Connection, create_engine, inspect, text

from order_service.operate.migrate import MIGRATIONS
from order_service.settings import Settings
from order_service.startup import NEWEST_REVISION

TABLES = {
    "alembic_version",
    "idempotency_keys",
    "order_items",
    "orders",
    "outbox",
    "products",
    "readback_positions",
}


@pytest.fixture
def scratch(settings: Settings) -> Iterator[Connection]:
    """Give a connection on an empty schema that goes away with the test."""
    engine = create_engine(
        settings.database_url, connect_args={"options": "-c search_path=scratch"}
    )
    with engine.connect() as connection:
        connection.execute(text("CREATE SCHEMA scratch"))
        yield connection
        connection.rollback()
    engine.dispose()


@pytest.fixture
def config(scratch: Connection) -> Config:
    """Give what `migrate` gives Alembic, on the empty schema."""
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS))
    config.attributes["connection"] = scratch
    return config


def tables(connection: Connection) -> set[str]:
    return set(inspect(connection).get_table_names(schema="scratch"))


def test_up_makes_every_table(scratch: Connection, config: Config) -> None:
    """From nothing, all tables are there."""
    command.upgrade(config, "head")
    assert tables(scratch) == TABLES


def test_down_leaves_nothing(scratch: Connection, config: Config) -> None:
    """Every migration can be taken back, to the first."""
    command.upgrade(config, "head")
    command.downgrade(config, "base")
    assert tables(scratch) == {"alembic_version"}


def test_down_and_up_again_works(scratch: Connection, config: Config) -> None:
    """What was taken back can be made again."""
    command.upgrade(config, "head")
    command.downgrade(config, "base")
    command.upgrade(config, "head")
    assert tables(scratch) == TABLES


def test_migrating_twice_changes_nothing(run: Callable[..., "CompletedProcess[str]"]) -> None:
    """The job may run at every deployment."""
    again = run("migrate")
    assert (again.returncode, again.stdout) == (0, "migrated\n")


def test_tables_and_code_agree(run: Callable[..., "CompletedProcess[str]"]) -> None:
    """The models are what the migrations make."""
    checked = run("migrate", "--check")
    assert (checked.returncode, checked.stdout.splitlines()[-1]) == (0, "tables and code agree")


def test_a_schema_that_is_newer_is_left_alone(
    run: Callable[..., "CompletedProcess[str]"], query: Callable[..., object]
) -> None:
    """The job of an older release cannot know what to do with it: exit 3."""
    query("UPDATE alembic_version SET version_num = '9999'")
    try:
        failed = run("migrate")
    finally:
        query("UPDATE alembic_version SET version_num = :newest", newest=NEWEST_REVISION)
    assert (failed.returncode, "9999" in failed.stderr) == (3, True)


def test_a_table_that_differs_is_named(
    run: Callable[..., "CompletedProcess[str]"], query: Callable[..., object]
) -> None:
    """The check fails when the database has a column that the code does not know."""
    query("ALTER TABLE orders ADD COLUMN surprise text")
    try:
        checked = run("migrate", "--check")
    finally:
        query("ALTER TABLE orders DROP COLUMN surprise")
    assert (checked.returncode, "surprise" in checked.stderr) == (1, True)
