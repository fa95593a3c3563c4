"""The README's walk-through, pasted into a shell beside `make run`."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from deploy.embedded.state import fresh_root

REPOSITORY = Path(__file__).parents[2]
WALK_THROUGH = re.compile(r"<!-- walk-through.*?-->\n```sh\n(.*?)```", re.DOTALL)
START_SECONDS = 60
STOP_SECONDS = 60


@pytest.fixture
def run() -> Iterator[tuple[Path, str]]:
    """Keep `make run`'s command up on a state of its own; give the state and what it printed."""
    with fresh_root(REPOSITORY / ".run/readme") as root:
        process = subprocess.Popen(
            [sys.executable, "-m", "deploy.embedded", "run", "--state", str(root)],
            cwd=REPOSITORY,
            stdout=subprocess.PIPE,
            text=True,
        )
        with process:
            assert process.stdout is not None
            printed = ""
            try:
                for line in process.stdout:
                    printed += line
                    if "Up until Ctrl-C" in line:
                        break
                yield root, printed
            finally:
                process.send_signal(signal.SIGINT)
                assert process.wait(STOP_SECONDS) == 0


def test_the_walk_through_works_as_pasted(run: tuple[Path, str]) -> None:
    """Token, order, replay, hops and mail come out of the README's own lines."""
    root, printed = run
    assert "INIT → PUBLISHED, partition" in printed
    blocks = WALK_THROUGH.findall((REPOSITORY / "README.md").read_text())
    script = "set -eu\n" + "sleep 10\n".join(blocks).replace(".run/stack", str(root))
    done = subprocess.run(
        ["sh", "-c", script],
        cwd=REPOSITORY,
        env={"PATH": os.environ["PATH"]},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    for expected in (
        "201 CREATED",
        "TEA-GREEN-50",
        "COMPLETED",
        "SENT",
        "Thank you for your order",
    ):
        assert expected in done.stdout
