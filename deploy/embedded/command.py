"""`with`: a command that finds some parts up."""

import os
import signal
import subprocess
import sys
from collections.abc import Collection, Sequence
from pathlib import Path

from rich.console import Console

from deploy.embedded import signals
from deploy.embedded.errors import StackError
from deploy.embedded.infrastructure import add_infrastructure
from deploy.embedded.ports import Ports
from deploy.embedded.screen import Screen
from deploy.embedded.stack import Stack

COMMAND_STOP_SECONDS = 10.0


def with_parts(root: Path, parts: Collection[str], argv: Sequence[str], *, ports: Ports) -> int:
    """Run a command while the parts it names are up, and return its exit code."""
    # What the command prints is its own: ours goes to standard error.
    screen = Screen(Console(stderr=True, highlight=False, soft_wrap=True))
    with Stack(root, screen) as stack, signals.raised():
        addresses = add_infrastructure(stack, ports, parts)
        with screen:
            stack.start()
        return run_command(argv, addresses.environment(parts))


def run_command(argv: Sequence[str], variables: dict[str, str]) -> int:
    """Run a command to its end, handing on the signal that asks us to end."""
    try:
        process = subprocess.Popen(argv, env={**os.environ, **variables})
    except OSError as error:
        message = f"cannot execute {argv[0]}: {error}"
        raise StackError(message) from error
    try:
        code = process.wait()
    except signals.InterruptedBySignal as interruption:
        _hand_on(interruption.number, process)
        raise
    return code if code >= 0 else 128 - code


def _hand_on(number: int, process: subprocess.Popen[bytes]) -> None:
    # Ctrl-C in a terminal has reached the command already.
    if number != signal.SIGINT or not sys.stdin.isatty():
        process.send_signal(number)
    try:
        process.wait(COMMAND_STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
