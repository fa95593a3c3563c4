"""The directory in which a stack keeps everything: data, logs, secrets, its lock."""

import contextlib
import fcntl
import os
import secrets
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

from deploy.embedded import leftovers
from deploy.embedded.errors import StackError
from deploy.embedded.jars import REPOSITORY

RUN_DIRECTORY = REPOSITORY / ".run"
KEPT = RUN_DIRECTORY / "stack"
FRESH_PREFIX = "fresh-"


@dataclass(frozen=True)
class State:
    """Where things are below the state directory."""

    root: Path

    def data(self, name: str) -> Path:
        """Return the directory that belongs to a part alone."""
        return self.root / name

    def log(self, name: str) -> Path:
        """Return the file with a part's output."""
        return self.root / "logs" / f"{name}.log"

    def pid(self, name: str) -> Path:
        """Return the file that names a part's process while it runs."""
        return self.root / "pids" / f"{name}.json"

    @property
    def control(self) -> Path:
        """The file that says where a running stack listens to second terminals, and its secret."""
        return self.root / "control.json"

    def secret(self, name: str) -> str:
        """Return the secret of this name, made at the first call and kept from then on."""
        path = self.root / "secrets" / name
        path.parent.mkdir(mode=0o700, exist_ok=True)
        path.touch(mode=0o600)
        if not path.read_text():
            path.write_text(secrets.token_urlsafe(24))
        return path.read_text()

    @contextlib.contextmanager
    def hold(self) -> Iterator[None]:
        """Keep every other run off this directory, and end what a killed one left running."""
        self.root.mkdir(parents=True, exist_ok=True)
        with (self.root / "lock").open("a+") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                lock.seek(0)
                message = f"{self.root} is in use by another run, process {lock.read()}"
                raise StackError(message) from error
            lock.truncate(0)
            lock.write(str(os.getpid()))
            lock.flush()
            leftovers.end_all(self.root / "pids")
            self._set_old_logs_aside()
            yield

    def _set_old_logs_aside(self) -> None:
        for log in (self.root / "logs").glob("*.log"):
            log.replace(log.with_suffix(".log.1"))


@contextlib.contextmanager
def fresh_root(directory: Path) -> Iterator[Path]:
    """Give an empty state directory, removed afterwards.

    After a failure it stays until the next run, because the message names a log in it.
    """
    _remove_abandoned(directory)
    root = directory / f"{FRESH_PREFIX}{os.getpid()}"
    is_kept = False
    try:
        yield root
    except StackError:
        is_kept = True
        raise
    finally:
        if not is_kept:
            shutil.rmtree(root, ignore_errors=True)


def _remove_abandoned(directory: Path) -> None:
    """Remove states named by a run's process id whose run has ended, and end what it left."""
    for root in sorted(directory.glob(f"{FRESH_PREFIX}*")):
        if not psutil.pid_exists(int(root.name.removeprefix(FRESH_PREFIX))):
            leftovers.end_all(root / "pids")
            shutil.rmtree(root, ignore_errors=True)
