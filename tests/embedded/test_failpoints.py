"""Failpoints: they act where they say, they leave a line, and none is silently not there."""

import signal
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from tests.support.failpoint import FOLDER, armed, disarm, hits
from tests.support.failpoints.sitecustomize import CATALOGUE
from tests.support.world import eventually

REPOSITORY = Path(__file__).parents[2]
PYTHON = REPOSITORY / ".venv/order/bin/python"
TIMEOUT_SECONDS = 20.0

# What has no database fails behind the seam, if it gets that far.
MARK = """
from order_service import outbox

def mark():
    try:
        outbox.mark_published(None, topic_id="t", reports={})
    except Exception as error:
        print(repr(error), flush=True)
"""
REACHED = """AttributeError("'NoneType' object has no attribute 'execute'")"""
ACK = "relay.after_ack"


@pytest.fixture
def journal(tmp_path: Path) -> Path:
    return tmp_path / "hits.jsonl"


def test_kill_at_the_second_hit(journal: Path) -> None:
    """The first call goes through, the second ends the process, and its line is on the disk."""
    began_at = time.time()
    done = python(MARK + "mark(), mark(), mark()", f"{ACK}=kill@2", journal=journal)
    assert (done.returncode, done.stdout.splitlines()) == (-signal.SIGKILL, [REACHED])
    (hit,) = hits(journal)
    assert (hit.name, hit.action, hit.hit) == (ACK, "kill", 2)
    assert began_at < hit.at < time.time()


def test_raise_before_and_after(journal: Path) -> None:
    """Before the call its body does not run; after it, it has; a call that fails returns nothing.

    Both are of one function, each with its own count.
    """
    script = MARK + (
        "from unittest.mock import Mock\n"
        "connection = Mock()\n"
        "for _ in range(3):\n"
        "    try:\n"
        '        outbox.mark_published(connection, topic_id="t", reports={})\n'
        "    except OSError as error:\n"
        "        print(error, connection.execute.call_count)\n"
        "mark()"
    )
    error = "raise:builtins.OSError"
    done = python(script, f"{ACK}={error}@1", f"relay.after_mark={error}@1", journal=journal)
    printed = [f"failpoint {ACK} 0", "failpoint relay.after_mark 1", REACHED]
    assert done.stdout.splitlines() == printed
    assert [(hit.name, hit.hit) for hit in hits(journal)] == [(ACK, 1), ("relay.after_mark", 1)]


def test_sleep_at_every_hit(journal: Path) -> None:
    """Two hits, two lines, twice the time."""
    script = (
        f"{MARK}\nimport time\nt = time.monotonic()\nmark(), mark()\nprint(time.monotonic() - t)"
    )
    done = python(script, f"{ACK}=sleep:200", journal=journal)
    assert float(done.stdout.splitlines()[-1]) >= 0.4
    first, second = hits(journal)
    assert (first.hit, second.hit) == (1, 2)
    assert second.monotonic - first.monotonic >= 0.2


def test_exit_until_disarmed(journal: Path) -> None:
    """A process that is started anew counts anew, and dies again until the test disarms."""
    for code in (7, 7, 0):
        assert python(MARK + "mark()", f"{ACK}=exit:7@1", journal=journal).returncode == code
        if len(hits(journal)) == 2:
            disarm(journal)
    assert [hit.hit for hit in hits(journal)] == [1, 1]


def test_stop(journal: Path) -> None:
    """The process stands still with its line written, and goes on when told."""
    environment = armed({}, f"{ACK}=stop", journal=journal)
    with subprocess.Popen(
        [PYTHON, "-c", MARK + "mark()"], env=environment, stdout=subprocess.PIPE, text=True
    ) as child:
        try:
            state = psutil.Process(child.pid)
            eventually(
                lambda: state.status() == psutil.STATUS_STOPPED, within_seconds=TIMEOUT_SECONDS
            )
            assert [hit.pid for hit in hits(journal)] == [child.pid]
            child.send_signal(signal.SIGCONT)
            assert child.communicate(timeout=TIMEOUT_SECONDS)[0].strip() == REACHED
        finally:
            child.kill()


def test_a_fork_and_another_program_in_its_place_have_them_too(journal: Path) -> None:
    """A forked worker hits by itself; so does what execv puts in the place of its parent."""
    script = MARK + (
        "import os, sys\n"
        "if os.fork() == 0:\n"
        "    mark()\n"
        "    os._exit(0)\n"
        "os.wait()\n"
        "if sys.argv[1:] != ['again']:\n"
        "    print(os.getpid(), flush=True)\n"
        "    os.execv(sys.executable, [sys.executable, '-c', sys.orig_argv[2], 'again'])\n"
        "mark()"
    )
    done = python(script, f"{ACK}=sleep:0", journal=journal)
    parent = int(done.stdout.splitlines()[1])
    pids = [hit.pid for hit in hits(journal)]
    assert len(set(pids)) == 3
    assert pids[2] == parent
    assert [hit.hit for hit in hits(journal)] == [1, 1, 1]


def test_a_method_counts_only_with_something_to_do(journal: Path) -> None:
    """Publishing nothing is no hit: the relay does it every second."""
    script = (
        "from order_service.kafka import Publisher\n"
        "for records in ([], ['record']):\n"
        "    try:\n"
        "        Publisher.publish(None, records=records)\n"
        "    except AttributeError:\n"
        "        print('reached', flush=True)"
    )
    done = python(script, "relay.before_produce=exit:9@1", journal=journal)
    assert (done.returncode, done.stdout.splitlines()) == (9, ["reached"])


def test_a_result_counts_only_when_it_holds_something(journal: Path) -> None:
    """An empty batch is no hit, neither of rows nor of records."""
    script = (
        "from unittest.mock import MagicMock\n"
        "from order_service import outbox\n"
        "print(outbox.select_init(MagicMock(), after=None, limit=1))"
    )
    done = python(script, "relay.after_claim=kill", journal=journal)
    assert (done.returncode, done.stdout) == (0, "[]\n")
    assert hits(journal) == []
    polled, claimed = CATALOGUE["rb.after_poll"].counts, CATALOGUE["relay.after_claim"].counts
    assert claimed(["row"])
    assert polled(SimpleNamespace(next_offsets={0: 1}))
    assert not polled(SimpleNamespace(next_offsets={}))


@pytest.mark.parametrize("service", ["order", "mail"])
def test_every_seam_of_the_catalogue_is_there(journal: Path, service: str) -> None:
    """A function that was renamed is missed here."""
    seams = {
        name: seam
        for name, seam in CATALOGUE.items()
        if seam.module.startswith(f"{service}_service.")
    }
    modules = sorted({seam.module for seam in seams.values()})
    done = run(
        f"import {', '.join(modules)}",
        armed({}, *(f"{name}=sleep:0" for name in seams), journal=journal),
        python=REPOSITORY / f".venv/{service}/bin/python",
    )
    assert seams
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("", "relay.after_claim: order_service.outbox has no select_init"),
        ("select_init = print", "relay.after_claim: select_init is not a plain function"),
        ("def select_init():\n yield", "relay.after_claim: select_init is not a plain function"),
        (
            "from contextlib import contextmanager\n@contextmanager\ndef select_init():\n yield",
            "relay.after_claim: select_init is not a plain function",
        ),
        (None, "no module order_service.outbox on the path"),
    ],
)
def test_a_seam_that_is_not_there(
    tmp_path: Path, journal: Path, source: str | None, says: str
) -> None:
    """The service has changed behind the catalogue's back: its module is the last that is read."""
    package = tmp_path / "order_service"
    package.mkdir()
    (package / "__init__.py").touch()
    if source is not None:
        (package / "outbox.py").write_text(source)
    done = python(
        "try:\n import order_service.outbox\nexcept BaseException: pass\nprint('went on')",
        "relay.after_claim=kill",
        journal=journal,
        environment={"PYTHONPATH": str(tmp_path)},
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"failpoints: {says}\n"


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"APP_ENV": "production"}, "never in production"),
        ({"FAILPOINT_LOG": ""}, "FAILPOINT_LOG names no file"),
        ({"FAILPOINT_LOG": "/nowhere/hits"}, "FileNotFoundError"),
        ({"FAILPOINTS": "relay.after_lunch=kill"}, "relay.after_lunch is none of http.before_tx,"),
        ({"FAILPOINTS": f"{ACK}=kill;relay.after_lunch=kill"}, "relay.after_lunch is none of"),
        ({"FAILPOINTS": f"{ACK}=faint"}, f"{ACK}: faint is none of kill, stop,"),
        ({"FAILPOINTS": f"{ACK}=kill:9"}, f"{ACK}: kill:9 is none of"),
        ({"FAILPOINTS": f"{ACK}=sleep:1s"}, f"{ACK}: sleep:1s is none of"),
        ({"FAILPOINTS": f"{ACK}=raise:OSError"}, f"{ACK}: raise:OSError is none of"),
        ({"FAILPOINTS": f"{ACK}=kill@0"}, f"'{ACK}=kill@0' is not NAME=ACTION[@HIT]"),
        ({"FAILPOINTS": ACK}, f"'{ACK}' is not NAME=ACTION[@HIT]"),
    ],
)
def test_what_cannot_be_armed_ends_the_process(
    journal: Path, changes: dict[str, str], says: str
) -> None:
    """Before its first line, with 2 and one message."""
    environment = {**armed({}, f"{ACK}=kill", journal=journal), **changes}
    done = run("print('went on')", environment)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("failpoints: ")
    assert says in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("name", ["order_service.errors.Missing", "nowhere.Error", "os.getcwd"])
def test_an_exception_that_is_none_ends_the_process(journal: Path, name: str) -> None:
    """The service must not take it for an error of its own."""
    done = python(MARK + "mark()", f"{ACK}=raise:{name}", journal=journal)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"failpoints: {ACK}: {name}")


def test_without_failpoints_nothing_is_armed() -> None:
    """The folder on the path alone changes nothing, in production neither."""
    script = MARK + "print(hasattr(outbox.mark_published, '__wrapped__'))"
    done = run(script, {"PYTHONPATH": str(FOLDER), "APP_ENV": "production"})
    assert (done.returncode, done.stdout) == (0, "False\n")


def python(
    script: str, *failpoints: str, journal: Path, environment: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a script in the order service's environment, with failpoints, to its end."""
    return run(script, armed(environment or {}, *failpoints, journal=journal))


def run(
    script: str, environment: dict[str, str], *, python: Path = PYTHON
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [python, "-c", script],
        env=environment,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_SECONDS,
        check=False,
    )
