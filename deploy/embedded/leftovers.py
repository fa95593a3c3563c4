"""Processes an earlier run could not stop because it was killed itself."""

import contextlib
import json
import signal
from pathlib import Path

import psutil

from deploy.embedded.errors import StackError

GRACE_SECONDS = 10.0
KILL_SECONDS = 5.0
# The boot time from which a start time is computed moves a little when the clock is set.
SAME_START_SECONDS = 2.0


def note(path: Path, pid: int, stop_signal: signal.Signals) -> None:
    """Write down a process so that it can be told from a later one with the same id."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(psutil.NoSuchProcess):
        started_at = psutil.Process(pid).create_time()
        noted = {"pid": pid, "started_at": started_at, "stop_signal": int(stop_signal)}
        path.write_text(json.dumps(noted))


def end_all(directory: Path) -> None:
    """Stop every process noted in the directory that is still the one noted, then forget it."""
    paths = sorted(directory.glob("*.json"))
    try:
        family = [process for path in paths for process in _ask_to_end(path)]
        _, alive = psutil.wait_procs(family, timeout=GRACE_SECONDS)
        for process in alive:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(alive, timeout=KILL_SECONDS)
    except psutil.AccessDenied as error:
        message = f"process {error.pid} is left from an earlier run of another user"
        raise StackError(message) from error
    for path in paths:
        path.unlink(missing_ok=True)


def _ask_to_end(path: Path) -> list[psutil.Process]:
    with contextlib.suppress(psutil.NoSuchProcess, json.JSONDecodeError):
        noted = json.loads(path.read_text())
        process = psutil.Process(noted["pid"])
        if abs(process.create_time() - noted["started_at"]) <= SAME_START_SECONDS:
            family = [process, *process.children(recursive=True)]
            process.send_signal(noted["stop_signal"])
            return family
    return []
