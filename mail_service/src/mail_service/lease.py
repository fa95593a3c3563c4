"""A replica's right to the rows it claimed, renewed while it lives."""

import time
from datetime import datetime, timedelta
from uuid import UUID

from sqlalchemy import Connection

from mail_service import ledger
from mail_service.ledger import Renewal

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
        self._renewal: Renewal | None = None
        self.term = 0

    def renew(self, connection: Connection) -> Renewal:
        """Write the lease; when that is committed call `renewed`.

        Raises StartUpRefused when the ledger was set back.
        """
        if self._renewal is None:
            return ledger.take_lease(
                connection, replica_id=self.replica_id, name=self.name, lease_seconds=self.seconds
            )
        return ledger.renew_lease(
            connection,
            replica_id=self.replica_id,
            lease_seconds=self.seconds,
            known_until=self._renewal.until,
        )

    @property
    def until(self) -> datetime:
        """Return until when the lease runs by the ledger's clock, as was confirmed last."""
        return self._confirmed.until

    def now(self) -> float:
        """Return the clock that the lease is measured by."""
        return time.clock_gettime(self.CLOCK)

    def ledger_now(self) -> datetime:
        """Return the ledger's time: a mail's times are all of one clock, whoever judges it."""
        return self._confirmed.at + timedelta(seconds=self.now() - self._renewed_at)

    def renewed(self, at: float, renewal: Renewal) -> None:
        """Note a renewal that was committed; `at` was read before it was sent.

        One that came too late begins a new term: rows of the old one may be another's by now.
        """
        if self.now() - self._renewed_at >= self.seconds:
            self.term += 1
        self._renewed_at, self._renewal = at, renewal

    def is_held(self, term: int) -> bool:
        """Say whether the lease has surely been running without a break since `term` was read."""
        return term == self.term and self.now() - self._renewed_at < self.seconds

    def is_due(self) -> bool:
        """Say whether it is time to renew."""
        return self.now() - self._renewed_at > self.seconds / RENEWALS_A_LEASE

    @property
    def _confirmed(self) -> Renewal:
        if self._renewal is None:
            raise RuntimeError("the lease was not taken yet")
        return self._renewal
