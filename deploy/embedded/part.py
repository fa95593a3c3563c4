"""One supervised operating-system process, and one command that runs to its end."""

import contextlib
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from deploy.embedded import leftovers
from deploy.embedded.errors import StackError, StoppingError

POLL_SECONDS = 0.05
KILL_SECONDS = 5.0
TAIL_LINES = 15


class Account(NamedTuple):
    """The operating-system user a process runs as."""

    uid: int
    gid: int


@dataclass(frozen=True)
class Attempt:
    """One try to bring something up: it can be given up, and it can say what it is doing."""

    cancelled: threading.Event = field(default_factory=threading.Event)
    say: Callable[[str], None] = lambda _: None

    def pause(self, seconds: float = 0.0) -> None:
        """Wait a moment; raise when the stack is stopping."""
        if self.cancelled.wait(seconds):
            message = "the stack is stopping"
            raise StoppingError(message)


@dataclass(frozen=True, kw_only=True)
class Command:
    """What to execute, as whom, and where its output goes."""

    argv: Sequence[str]
    log_path: Path
    env: Mapping[str, str] | None = None
    cwd: Path | None = None
    account: Account | None = None

    def spawn(self) -> subprocess.Popen[bytes]:
        """Start the process in a session of its own, so that Ctrl-C reaches only us."""
        self.log_path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with self.log_path.open("ab") as log:
                return subprocess.Popen(
                    self.argv,
                    env=self.env,
                    cwd=self.cwd,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                    user=self.account.uid if self.account else None,
                    group=self.account.gid if self.account else None,
                    extra_groups=[] if self.account else None,
                )
        except OSError as error:
            message = f"cannot execute {self.argv[0]}: {error}"
            raise StackError(message) from error

    def failure(self, what: str) -> StackError:
        """Say what went wrong, with the last lines of the log and where the rest is."""
        lines = self.log_path.read_text(errors="replace").splitlines()[-TAIL_LINES:]
        quoted = "".join(f"\n  | {line}" for line in lines)
        return StackError(f"{what}\n  {self.log_path} ends with:{quoted}")


@dataclass(kw_only=True)
class Part:
    """A process that is kept running: started, asked whether it is ready, stopped, killed."""

    name: str
    command: Command
    pid_path: Path
    is_ready: Callable[[], bool]
    prepare: Callable[[Attempt], None] | None = None
    after_ready: Callable[[], None] | None = None
    ready_seconds: float = 30.0
    stop_signal: signal.Signals = signal.SIGTERM
    stop_seconds: float = 10.0
    _process: subprocess.Popen[bytes] | None = field(default=None, init=False, repr=False)
    _started_at: float = field(default=0.0, init=False, repr=False)
    _is_ended: bool = field(default=True, init=False, repr=False)
    _lock: threading.RLock = field(default_factory=threading.RLock, init=False, repr=False)

    @property
    def pid(self) -> int | None:
        """The process id of the last start, alive or not."""
        return self._process.pid if self._process else None

    @property
    def exit_code(self) -> int | None:
        """How the last start ended; None while it runs or before the first."""
        return self._process.poll() if self._process else None

    @property
    def is_running(self) -> bool:
        """Whether the process is alive."""
        return self._process is not None and self._process.poll() is None

    @property
    def age_seconds(self) -> float | None:
        """How long the process has been there; None while there is none."""
        return time.monotonic() - self._started_at if self.is_running else None

    def bring_up(self, attempt: Attempt) -> None:
        """Prepare, start, wait until it answers, and finish what needs an answering process."""
        if self.prepare:
            self.prepare(attempt)
        attempt.say("starting")
        attempt.pause()
        self.start()
        self.wait_ready(attempt)
        if self.after_ready:
            self.after_ready()

    def start(self) -> None:
        """Start the process and note it for whoever cleans up after a crash of ours."""
        with self._lock:
            self.kill()
            self._process = self.command.spawn()
            self._started_at = time.monotonic()
            self._is_ended = False
            leftovers.note(self.pid_path, self._process.pid, self.stop_signal)

    def wait_ready(self, attempt: Attempt) -> None:
        """Wait until the process answers; raise when it ends or stays silent."""
        deadline = time.monotonic() + self.ready_seconds
        while time.monotonic() < deadline:
            if not self.is_running:
                raise self.command.failure(f"{self.name} ended with code {self.exit_code}")
            if self.is_ready():
                return
            attempt.pause(POLL_SECONDS)
        raise self.command.failure(f"{self.name} is not ready after {self.ready_seconds:g} s")

    def stop(self) -> None:
        """Ask the process to end; kill what is left of it when its time is over."""
        if self._process and self.is_running:
            self._process.send_signal(self.stop_signal)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(self.stop_seconds)
        self.kill()

    def kill(self) -> None:
        """End the process and its group at once."""
        with self._lock:
            if self._process and not self._is_ended:
                _end_group(self._process)
                self._is_ended = True
                self.pid_path.unlink(missing_ok=True)


@dataclass(frozen=True, kw_only=True)
class Job:
    """A command that runs to its end, such as a migration."""

    name: str
    command: Command
    timeout_seconds: float = 120.0

    def bring_up(self, attempt: Attempt) -> None:
        """Run it; raise when it fails, lasts too long or the stack stops meanwhile."""
        process = self.command.spawn()
        deadline = time.monotonic() + self.timeout_seconds
        try:
            while process.poll() is None and time.monotonic() < deadline:
                attempt.pause(POLL_SECONDS)
            if process.returncode is None:
                raise self.command.failure(f"{self.name} took over {self.timeout_seconds:g} s")
            if process.returncode != 0:
                raise self.command.failure(f"{self.name} failed with code {process.returncode}")
        finally:
            _end_group(process)


def _end_group(process: subprocess.Popen[bytes]) -> None:
    # The group outlives its leader while a child of it runs. PermissionError is macOS's way to
    # say that only zombies are left in it.
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(KILL_SECONDS)
