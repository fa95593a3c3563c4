"""SIGTERM, SIGINT and SIGHUP as an exception, once."""

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType

ENDING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class InterruptedBySignal(SystemExit):
    """A signal asked this process to end; unhandled, it ends with the code a shell would show."""

    def __init__(self, number: int) -> None:
        """Keep the signal, for handing it on."""
        super().__init__(128 + number)
        self.number = number


@contextlib.contextmanager
def raised() -> Iterator[None]:
    """Raise at the first ending signal; ignore every further one, and all after the block.

    Entered inside the block of a stack it leaves the stack's clean-up undisturbed.
    """
    for number in ENDING:
        signal.signal(number, _raise)
    try:
        yield
    finally:
        _ignore()


def _raise(number: int, _: FrameType | None) -> None:
    _ignore()
    raise InterruptedBySignal(number)


def _ignore() -> None:
    for number in ENDING:
        signal.signal(number, signal.SIG_IGN)
