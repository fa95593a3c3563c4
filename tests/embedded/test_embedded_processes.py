"""The embedded stack and its processes: how they begin, and that all of them end."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from deploy.embedded import jars
from deploy.embedded.errors import StackError
from deploy.embedded.infrastructure import add_infrastructure
from deploy.embedded.part import Attempt, Command, Job, Part
from deploy.embedded.ports import Ports
from deploy.embedded.stack import Phase, Stack
from tests.support.world import eventually

REPOSITORY = Path(__file__).parents[2]


def test_the_end_of_a_stack_leaves_no_process(root: Path) -> None:
    """Neither the parts nor their children survive the block."""
    with Stack(root / "ended") as stack:
        add_infrastructure(stack, Ports(use_defaults=False))
        stack.start()
        family = [relative for name in stack.phases for relative in family_of(stack.part(name))]
        assert len(family) > len(stack.phases)
    assert not any(is_alive(process) for process in family)


def test_a_part_that_cannot_start_says_why_and_stops_the_others(root: Path) -> None:
    """The error ends with the part's own words, and what had started is down again."""
    with Stack(root / "failing") as stack:
        add_infrastructure(stack, Ports(use_defaults=False), ["order-db"])
        stack.add(shell_part(stack, "broken", "echo no such luck; exit 3"), after=["order-db"])
        with pytest.raises(StackError, match=r"broken ended with code 3.*(?s:.*)no such luck"):
            stack.start()
        assert not stack.part("order-db").is_running


def test_a_job_runs_before_what_needs_it(root: Path) -> None:
    """A part starts only after the jobs named as needed have succeeded."""
    with Stack(root / "jobs") as stack:
        done = stack.state.root / "done"
        command = Command(argv=["touch", str(done)], log_path=stack.state.log("migrate"))
        stack.add(Job(name="migrate", command=command))
        part = shell_part(stack, "service", f"test -e {done} && exec sleep 60")
        part.is_ready = lambda: part.is_running
        stack.add(part, after=["migrate"])
        stack.start()
        assert stack.phases == {"migrate": Phase.DONE, "service": Phase.READY}


def test_a_second_run_on_the_same_state_is_told_so(root: Path) -> None:
    """The command line ends with 1 and names the process that holds the directory."""
    with Stack(root / "held"):
        result = command_line("with", "--state", str(root / "held"), "inbox", "--", "true")
    assert result.returncode == 1
    assert f"in use by another run, process {os.getpid()}" in result.stderr


def test_a_command_sees_the_addresses_and_its_exit_code_is_passed_on() -> None:
    """The parts named are in the command's environment, the others are not."""
    script = 'test -n "$SMTP_PORT" -a -n "$INBOX_URL" -a -z "$ORDER_DATABASE_URL" && exit 7'
    result = command_line("with", "--fresh", "inbox", "--", "sh", "-c", script)
    assert result.returncode == int(script[-1])


def test_a_signal_reaches_the_command_and_the_parts_stop() -> None:
    """SIGTERM ends the command first, then the parts, and the fresh state is gone."""
    with fresh_inbox() as run:
        root = REPOSITORY / ".run" / f"fresh-{run.pid}"
        family = psutil.Process(run.pid).children(recursive=True)
        run.send_signal(signal.SIGTERM)
        assert run.wait(20) == 128 + signal.SIGTERM
    # The parts' own children end with them, not before.
    eventually(lambda: not any(is_alive(process) for process in family), within_seconds=15)
    assert not root.exists()


def test_what_a_killed_run_left_is_ended_by_the_next() -> None:
    """After a SIGKILL of the stack itself its parts live on until the next run finds them."""
    with fresh_inbox() as run:
        root = REPOSITORY / ".run" / f"fresh-{run.pid}"
        command, inbox = sorted(psutil.Process(run.pid).children(), key=is_of_stack)
        run.kill()
        run.wait()
    assert is_alive(inbox)
    assert command_line("with", "--fresh", "inbox", "--", "true").returncode == 0
    assert not is_alive(inbox)
    assert not root.exists()
    command.kill()


def test_a_failed_download_is_one_message(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a network the first start says what it could not download, and leaves nothing."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(root / "cache"))
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")
    log_path = root / "download.log"
    with pytest.raises(StackError, match=r"cannot download org\.example:absent:1"):
        jars.ensure("org.example:absent:1", log_path, Attempt())
    assert "Traceback" not in log_path.read_text()
    assert not jars.directory("org.example:absent:1").exists()


def shell_part(stack: Stack, name: str, script: str) -> Part:
    """Describe a part that is never ready and runs a shell script."""
    command = Command(argv=["sh", "-c", script], log_path=stack.state.log(name))
    return Part(name=name, command=command, pid_path=stack.state.pid(name), is_ready=lambda: False)


def family_of(part: Part) -> list[psutil.Process]:
    """Return a part's process with everything below it."""
    leader = psutil.Process(part.pid)
    return [leader, *leader.children(recursive=True)]


def is_alive(process: psutil.Process) -> bool:
    """Whether a process runs; one that only waits to be reaped does not."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def is_of_stack(process: psutil.Process) -> bool:
    """Whether this is a part and not the command that was run beside the parts."""
    return os.getsid(process.pid) == process.pid


def command_line(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the stack's command line to its end."""
    argv = [sys.executable, "-m", "deploy.embedded", *arguments]
    return subprocess.run(
        argv, cwd=REPOSITORY, capture_output=True, text=True, timeout=60, check=False
    )


@contextmanager
def fresh_inbox() -> Iterator[subprocess.Popen[str]]:
    """Run a fresh inbox by the command line, with a command beside it that has begun."""
    script = "echo running; exec sleep 60"
    argv = [sys.executable, "-m", "deploy.embedded", "with", "--fresh", "inbox", "--"]
    with subprocess.Popen(
        [*argv, "sh", "-c", script], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True
    ) as run:
        assert run.stdout is not None
        assert run.stdout.readline() == "running\n"
        try:
            yield run
        finally:
            run.terminate()
