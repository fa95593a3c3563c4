"""What second terminals ask of a running stack: one change at a time, and nothing outlives it."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from deploy.embedded.control import Control
from deploy.embedded.errors import NotRunningError, StackError, WrongUsageError
from deploy.embedded.part import Command, Part
from deploy.embedded.ports import HOST, Ports
from deploy.embedded.remote import ask
from deploy.embedded.services import Pair
from deploy.embedded.stack import Phase, Stack
from tests.support.world import eventually

REPOSITORY = Path(__file__).parents[2]
# What never is ready is waited for so long.
SLOW_SECONDS = 6.0
END_SECONDS = 20.0
PAIR = Pair(api_url="", order_environment={}, mail_environment={})


@contextmanager
def listening(root: Path) -> Iterator[Stack]:
    """Give a stack of one part that is up and one that takes for ever to start, with its ear."""
    with Stack(root) as stack:
        for name, is_ready in (("quick", True), ("slow", False)):
            stack.add(sleeping_part(stack, name, is_ready=is_ready))
        stack.start("quick")
        with Control(stack, Ports(use_defaults=False), PAIR, {"API": "here"}).listening():
            yield stack


def test_others_are_answered_while_a_part_starts(root: Path) -> None:
    """`ps` answers at once; a change waits for its turn and is then done."""
    with listening(root / "busy") as stack, ThreadPoolExecutor() as pool:
        start = pool.submit(ask, stack.state.root, "start", parts=["slow"])
        eventually(lambda: stack.phases["slow"] is Phase.STARTING, within_seconds=SLOW_SECONDS)
        stop = pool.submit(ask, stack.state.root, "stop", parts=["quick"])
        began_at = time.monotonic()
        assert phases(stack.state.root) == {"quick": "ready", "slow": "starting"}
        assert time.monotonic() - began_at < SLOW_SECONDS / 2
        assert not start.done()
        with pytest.raises(StackError, match=f"slow is not ready after {SLOW_SECONDS:g} s"):
            start.result(END_SECONDS)
        assert stop.result(END_SECONDS) == {"done": ["quick"]}
        assert phases(stack.state.root) == {"quick": "stopped", "slow": "failed"}


def test_the_end_gives_up_a_start_and_leaves_nothing(root: Path) -> None:
    """A stack that ends while a part starts leaves no process and no note."""
    with ThreadPoolExecutor() as pool:
        with listening(root / "ending") as stack:
            stack.part("slow").ready_seconds = 60
            start = pool.submit(ask, stack.state.root, "start", parts=["slow"])
            eventually(lambda: stack.part("slow").is_running, within_seconds=END_SECONDS)
            family = psutil.Process(stack.part("slow").pid), psutil.Process(stack.part("quick").pid)
            began_at = time.monotonic()
        assert time.monotonic() - began_at < END_SECONDS
        with pytest.raises(StackError, match="stopping"):
            start.result(END_SECONDS)
    assert not any(process.is_running() for process in family)
    assert not stack.state.control.exists()
    with pytest.raises(NotRunningError, match="make run"):
        ask(stack.state.root, "ps")


def test_who_says_nothing_keeps_nobody_waiting(root: Path) -> None:
    """Connections that are silent or garbled cost the others nothing."""
    with listening(root / "silent") as stack:
        port = json.loads(stack.state.control.read_text())["port"]
        with (
            socket.create_connection((HOST, port)),
            socket.create_connection((HOST, port)) as noisy,
        ):
            noisy.sendall(b"\xff\xfe{\n")
            assert "error" in json.loads(noisy.makefile("rb").readline())
            assert phases(stack.state.root)["quick"] == "ready"


def test_only_who_may_read_the_state_is_heard(root: Path) -> None:
    """The note is its owner's alone, and without its secret nothing is done."""
    with listening(root / "secret") as stack:
        note = json.loads(stack.state.control.read_text())
        assert stack.state.control.stat().st_mode & 0o777 == 0o600
        for secret in ("", "guess", None, note["secret"] + "é"):
            request = {"secret": secret, "request": {"verb": "stop", "parts": ["quick"]}}
            assert "secret" in say(note["port"], request)["error"]
        assert stack.part("quick").is_running


@pytest.mark.parametrize(
    ("verb", "details", "message"),
    [
        ("stop", {"parts": ["quick", "quik"]}, "there is no part quik; there are quick, slow"),
        ("scale", {"part": "quick", "count": 2}, "quick cannot be scaled"),
        ("scale", {"part": "mail", "count": 1000}, "from 0 to 16"),
        ("dance", {}, "does not know"),
    ],
)
def test_what_makes_no_sense_changes_nothing(
    root: Path, verb: str, details: dict[str, Any], message: str
) -> None:
    """The answer says what there is, and all parts are as they were."""
    with listening(root / "nonsense") as stack:
        with pytest.raises(WrongUsageError, match=message):
            ask(stack.state.root, verb, **details)
        assert stack.part("quick").is_running


def test_a_killed_part_comes_back_and_a_stopped_one_cannot_be_killed(root: Path) -> None:
    """`kill` is a crash; of what is stopped there is nothing to kill."""
    with listening(root / "killed") as stack:
        before = stack.part("quick").pid
        ask(stack.state.root, "kill", parts=["quick"])
        eventually(lambda: phases(stack.state.root)["quick"] == "ready", within_seconds=10)
        assert stack.part("quick").pid != before
        ask(stack.state.root, "stop", parts=["quick"])
        with pytest.raises(StackError, match="not running: quick"):
            ask(stack.state.root, "kill", parts=["quick"])
        assert phases(stack.state.root)["quick"] == "stopped"


def test_the_note_of_a_killed_run_is_no_running_stack(root: Path) -> None:
    """After a SIGKILL of the stack its note names a port where nobody listens."""
    script = (
        "from tests.embedded.test_control import Path, listening, time\n"
        f"with listening(Path({str(root / 'stale')!r})): print('up', flush=True); time.sleep(60)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True
    ) as run:
        assert run.stdout is not None
        assert run.stdout.readline() == "up\n"
        os.kill(run.pid, signal.SIGKILL)
    assert (root / "stale/control.json").exists()
    with pytest.raises(NotRunningError):
        ask(root / "stale", "ps")
    with listening(root / "stale") as stack:
        assert phases(stack.state.root)["quick"] == "ready"


def sleeping_part(stack: Stack, name: str, *, is_ready: bool) -> Part:
    """Describe a part that does nothing, and is ready at once or never."""
    command = Command(argv=["sleep", "60"], log_path=stack.state.log(name))
    return Part(
        name=name,
        command=command,
        pid_path=stack.state.pid(name),
        is_ready=lambda: is_ready,
        ready_seconds=SLOW_SECONDS,
    )


def phases(root: Path) -> dict[str, str]:
    """Return what `ps` says."""
    return {part["name"]: part["phase"] for part in ask(root, "ps")["parts"]}


def say(port: int, request: object) -> dict[str, Any]:
    """Send a request as it is and return the answer."""
    with socket.create_connection((HOST, port)) as connection:
        connection.sendall(json.dumps(request).encode() + b"\n")
        answer: dict[str, Any] = json.loads(connection.makefile("rb").readline())
    return answer
