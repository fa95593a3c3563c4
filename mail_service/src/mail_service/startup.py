"""What must be so before this release may work, each with a clear message when it is not."""

from collections.abc import Sequence
from pathlib import Path

from sqlalchemy import Connection, text

# Revisions are numbered, so the higher is the newer.
NEWEST_REVISION = max(
    path.stem[:4] for path in (Path(__file__).parent / "migrations/versions").glob("[0-9]*.py")
)
# A 250 that is written down must outlive a crash of the database's host.
DURABLE = ("fsync", "full_page_writes", "synchronous_commit")

_SETTINGS_OFF = text("""
    SELECT name FROM pg_settings WHERE name = ANY(:names) AND setting = 'off' ORDER BY name
""")
_IS_READ_ONLY = text("SELECT current_setting('transaction_read_only') = 'on'")
_HAS_SCHEMA = text("SELECT to_regclass('alembic_version') IS NOT NULL")
_REVISION = text("SELECT version_num FROM alembic_version")


# Closed rows are kept at least so long, and in any case until their records are gone.
CLOSED_ROWS_DAYS = 400
DAY_MS = 24 * 60 * 60 * 1000


class StartUpRefused(Exception):
    """Something is not as it must be, and a person has to decide; the message says what."""


def require(faults: Sequence[str]) -> None:
    """Raise StartUpRefused when there is a fault."""
    if faults:
        raise StartUpRefused("\n".join(faults))


def ledger_faults(connection: Connection) -> list[str]:
    """Compare the ledger's database with what this release needs.

    A schema that is newer than the code is fine: it is expanded first and contracted a release
    later.
    """
    faults = [
        f"ledger: {name} is off: a mail could be sent again after a crash"
        for name in connection.execute(_SETTINGS_OFF, {"names": list(DURABLE)}).scalars()
    ]
    if connection.execute(_IS_READ_ONLY).scalar_one():
        faults.append("ledger: its database takes no writes: a standby, or set to read only")
    if not connection.execute(_HAS_SCHEMA).scalar_one():
        return [*faults, "ledger: it has no tables yet; run `mail-service migrate`"]
    found = connection.execute(_REVISION).scalar_one_or_none() or "none"
    if found == "none" or found < NEWEST_REVISION:
        faults.append(
            f"ledger: its schema is {found}, older than {NEWEST_REVISION};"
            " run `mail-service migrate`"
        )
    return faults


def retention_faults(retention_ms: int | None) -> list[str]:
    """Compare how long the topic keeps records with how long the ledger remembers their mails.

    What is read again after its row was purged would be mailed again.
    """
    if retention_ms is None or retention_ms < CLOSED_ROWS_DAYS * DAY_MS:
        return []
    return [
        (
            f"topic: it keeps records for {retention_ms / DAY_MS:g} days and the ledger closed"
            f" rows for {CLOSED_ROWS_DAYS}: a replay could mail an order again"
        )
    ]
