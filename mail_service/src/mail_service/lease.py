"""A replica's right to the rows it claimed, renewed while it lives."""

import time
from uuid import UUID

from sqlalchemy import Connection

from mail_service import ledger

# A third of the lease: two renewals may fail before it ends.
RENEWALS_A_LEASE = 3


class Lease:
    """The replica's right to finish what it claimed, checked without a query.

    The clock counts while the machine sleeps (on macOS CLOCK_MONOTONIC does): a frozen replica
    must not take an old lease for a fresh one.
    """

    CLOCK = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)

    def __init__(self, replica_id: UUID, *, name: str, seconds: float) -> None:
        self.replica_id = replica_id
        self.name = name
        self.seconds = seconds
        self._renewed_at = float("-inf")
        self.term = 0

    def renew(self, connection: Connection) -> None:
        """Write the lease in the caller's transaction; after its commit call `renewed`."""
        ledger.renew_lease(
            connection, replica_id=self.replica_id, name=self.name, lease_seconds=self.seconds
        )

    def now(self) -> float:
        """Return the clock that the lease is measured by."""
        return time.clock_gettime(self.CLOCK)

    def renewed(self, at: float) -> None:
        """Note a renewal that was committed; `at` was read before it was sent.

        One that came too late begins a new term: rows of the old one may be another's by now.
        """
        if self.now() - self._renewed_at >= self.seconds:
            self.term += 1
        self._renewed_at = at

    def is_held(self, term: int) -> bool:
        """Say whether the lease has surely been running without a break since `term` was read."""
        return term == self.term and self.now() - self._renewed_at < self.seconds

    def is_due(self) -> bool:
        """Say whether it is time to renew."""
        return self.now() - self._renewed_at > self.seconds / RENEWALS_A_LEASE
