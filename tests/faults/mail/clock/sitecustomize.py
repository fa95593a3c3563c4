"""A wall clock that a test sets: CLOCK_FILE holds by how many seconds it is off.

Python imports this file at its start when its folder is on PYTHONPATH. The monotonic clocks go on
as they are, and so does the clock of every other process.
"""

import datetime as dt
import os
import time
from pathlib import Path
from typing import Any

FILE = Path(os.environ["CLOCK_FILE"])
NANOSECONDS = 1_000_000_000
REAL_DATETIME = dt.datetime
REAL_TIME = time.time
REAL_CLOCK_GETTIME = time.clock_gettime


def off_seconds() -> float:
    """Return by how much the clock is off now."""
    return float(FILE.read_text(encoding="ascii"))


def shifted_time() -> float:
    """Stand in for time.time."""
    return REAL_TIME() + off_seconds()


def shifted_clock_gettime(clock: int) -> float:
    """Stand in for time.clock_gettime."""
    return REAL_CLOCK_GETTIME(clock) + (off_seconds() if clock == time.CLOCK_REALTIME else 0.0)


class _Kind(type):
    """What C code makes is a datetime as well."""

    def __instancecheck__(cls, instance: object) -> bool:
        return isinstance(instance, REAL_DATETIME)


class ShiftedDatetime(REAL_DATETIME, metaclass=_Kind):
    """Stand in for datetime.datetime."""

    @classmethod
    def now(cls, tz: dt.tzinfo | None = None) -> Any:
        """Return what the clock shows."""
        return REAL_DATETIME.fromtimestamp(shifted_time(), tz)

    @classmethod
    def utcnow(cls) -> Any:
        """Return what the clock shows, without a zone."""
        return cls.now(dt.UTC).replace(tzinfo=None)


time.time = shifted_time
time.time_ns = lambda: int(shifted_time() * NANOSECONDS)
time.clock_gettime = shifted_clock_gettime
dt.datetime = ShiftedDatetime  # type: ignore[misc]
