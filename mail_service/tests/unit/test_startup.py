"""What a replica refuses to start with, where it needs no parts to say so."""

import pytest

from mail_service.startup import CLOSED_ROWS_DAYS, DAY_MS, retention_faults


@pytest.mark.parametrize(
    ("retention_ms", "is_refused"),
    [
        (63 * DAY_MS, False),
        (CLOSED_ROWS_DAYS * DAY_MS - 1, False),
        (CLOSED_ROWS_DAYS * DAY_MS, True),
        (None, False),
    ],
)
def test_the_ledger_remembers_longer_than_the_topic(
    retention_ms: int | None, *, is_refused: bool
) -> None:
    """A log that is kept for ever never begins later, and then no row is purged."""
    assert bool(retention_faults(retention_ms)) is is_refused
