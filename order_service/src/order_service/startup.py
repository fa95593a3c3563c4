"""What must be so before this release may work, each with a clear message when it is not."""

from collections.abc import Sequence
from pathlib import Path

from sqlalchemy import Connection, text

# Revisions are numbered, so the higher is the newer.
NEWEST_REVISION = max(
    path.stem[:4] for path in (Path(__file__).parent / "migrations/versions").glob("[0-9]*.py")
)
# A committed order must outlive a crash of the database's host.
DURABLE = ("fsync", "full_page_writes", "synchronous_commit")

_SETTINGS = text("""
    SELECT name, setting FROM pg_settings WHERE name = ANY(:names) AND setting = 'off' ORDER BY name
""")
_IS_READ_ONLY = text("SELECT current_setting('transaction_read_only') = 'on'")
_HAS_SCHEMA = text("SELECT to_regclass('alembic_version') IS NOT NULL")
_REVISION = text("SELECT version_num FROM alembic_version")


class StartUpRefused(Exception):
    """Something is not as it must be; the message lists every fault."""


def require(faults: Sequence[str]) -> None:
    """Raise StartUpRefused when there is a fault."""
    if faults:
        raise StartUpRefused("\n".join(faults))


def database_faults(connection: Connection) -> list[str]:
    """Compare the database with what this release needs.

    A schema that is newer than the code is fine: it is expanded first and contracted a release
    later.
    """
    faults = [
        f"database: {row.name} is off: an order answered 201 could be lost in a crash"
        for row in connection.execute(_SETTINGS, {"names": list(DURABLE)})
    ]
    if connection.execute(_IS_READ_ONLY).scalar_one():
        faults.append("database: it takes no writes: a standby, or set to read only")
    if not connection.execute(_HAS_SCHEMA).scalar_one():
        return [*faults, "database: it has no tables yet; run `order-service migrate`"]
    found = connection.execute(_REVISION).scalar_one_or_none() or "none"
    if found == "none" or found < NEWEST_REVISION:
        faults.append(
            f"database: its schema is {found}, older than {NEWEST_REVISION};"
            " run `order-service migrate`"
        )
    return faults
