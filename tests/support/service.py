"""A process of one of our services that a test runs: its probes, its log, its failpoints' hits."""

import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil

from deploy.embedded.part import Attempt, Command, Part
from deploy.embedded.ports import HOST, Ports
from deploy.embedded.state import State
from tests.support.failpoint import Hit, armed, hits

READY_SECONDS = 30.0
STOP_SECONDS = 60.0
PROBE_SECONDS = 5.0
COMMAND_SECONDS = 60.0
SAMPLE_SECONDS = 0.01


@dataclass(frozen=True)
class Service:
    """A process of a service."""

    part: Part
    probe_port: int
    journal: Path

    @property
    def pid(self) -> int:
        """Its process id."""
        assert self.part.pid is not None
        return self.part.pid

    @property
    def hits(self) -> list[Hit]:
        """What its failpoints did."""
        return hits(self.journal)

    def is_ready(self) -> bool:
        """Say whether /readyz is green."""
        return _answers(self.probe_port, "readyz")

    def is_live(self) -> bool:
        """Say whether /livez is green."""
        return _answers(self.probe_port, "livez")

    def metric(self, name: str, **labels: str) -> float:
        """Return a metric's value; 0 when it is not there yet."""
        text = httpx.get(f"http://{HOST}:{self.probe_port}/metrics", timeout=PROBE_SECONDS).text
        inner = ",".join(f'{label}="{value}"' for label, value in sorted(labels.items()))
        wanted = f"{name}{{{inner}}}" if labels else name
        for line in text.splitlines():
            found, _, value = line.rpartition(" ")
            if found == wanted:
                return float(value)
        return 0.0

    def logged(self, event: str) -> list[dict[str, Any]]:
        """Return its log lines of this event."""
        lines = self.part.command.log_path.read_text(errors="replace").splitlines()
        parsed = [json.loads(line) for line in lines if line.startswith("{")]
        return [line for line in parsed if line.get("event") == event]

    def signal(self, number: signal.Signals) -> None:
        """Send it a signal."""
        os.kill(self.pid, number)

    def kill(self) -> None:
        """End it as a crash would, and see that it did."""
        self.signal(signal.SIGKILL)
        assert self.wait_for_end() == -signal.SIGKILL

    def wait_for_end(self, *, seconds: float = 20.0) -> int:
        """Wait until it has ended by itself; return its exit code, negative for a signal."""
        deadline = time.monotonic() + seconds
        while (code := self.part.exit_code) is None:
            assert time.monotonic() < deadline, f"{self.part.name} has not ended"
            time.sleep(0.02)
        return code

    @contextmanager
    def peak_memory(self) -> Iterator[Callable[[], int]]:
        """Watch the process until the block ends; give the most memory it had, in bytes."""
        process = psutil.Process(self.pid)
        found = [process.memory_info().rss]
        is_over = threading.Event()

        def watch() -> None:
            with suppress(psutil.NoSuchProcess):
                while not is_over.wait(SAMPLE_SECONDS):
                    found.append(process.memory_info().rss)

        thread = threading.Thread(target=watch)
        thread.start()
        try:
            yield lambda: max(found)
        finally:
            is_over.set()
            thread.join()


@contextmanager
def running_service(
    state: State,
    ports: Ports,
    name: str,
    argv: list[str],
    environment: Mapping[str, str],
    *failpoints: str,
    is_waited_for: bool = True,
) -> Iterator[Service]:
    """Run one until the block ends; unless told otherwise, begin the block when it is ready."""
    journal = state.root / "journals" / name
    journal.parent.mkdir(exist_ok=True)
    probe_port = ports.choose(0)
    settings = {"PROBE_PORT": str(probe_port), **environment}
    service = Service(
        Part(
            name=name,
            command=Command(
                argv=argv,
                log_path=state.log(name),
                env=armed(settings, *failpoints, journal=journal) if failpoints else settings,
            ),
            pid_path=state.pid(name),
            is_ready=lambda: _answers(probe_port, "readyz"),
            ready_seconds=READY_SECONDS,
            stop_seconds=STOP_SECONDS,
        ),
        probe_port,
        journal,
    )
    service.part.start()
    try:
        if is_waited_for:
            service.part.wait_ready(Attempt())
        yield service
    finally:
        service.part.stop()


def run_command(
    executable: Path, environment: Mapping[str, str], *arguments: str, check: bool = True
) -> subprocess.CompletedProcess[str]:
    """Run an operator's command of a service to its end."""
    done = subprocess.run(
        [executable, *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=COMMAND_SECONDS,
        check=False,
    )
    assert not check or done.returncode == 0, done.stderr
    return done


@contextmanager
def begun_command(
    executable: Path, environment: Mapping[str, str], *arguments: str
) -> Iterator[subprocess.Popen[str]]:
    """Begin an operator's command; one that has not ended with the block is killed."""
    pipe = subprocess.PIPE
    with subprocess.Popen(
        [executable, *arguments], env=environment, stdout=pipe, stderr=pipe, text=True
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def _answers(port: int, probe: str) -> bool:
    try:
        answer = httpx.get(f"http://{HOST}:{port}/{probe}", timeout=PROBE_SECONDS)
    except httpx.HTTPError:
        return False
    return answer.status_code == httpx.codes.OK
