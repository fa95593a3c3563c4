"""Runs the suites, each in a pytest process of its own and two at a time, and sums them up.

A test that failed beside another suite is heard again alone: docs/decisions/0014.
"""

import json
import subprocess
import sys
import tempfile
import threading
import time
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from subprocess import STDOUT

from rich.console import Console
from rich.table import Table

REPOSITORY = Path(__file__).parent.parent
PRINTING = threading.Lock()
PYTEST = ("-m", "pytest", "-q", "--no-header")


@dataclass(frozen=True)
class Suite:
    """Tests of one project: whose environment they run in, and which parts they need."""

    name: str
    environment: str
    folder: str
    parts: str = ""

    def command(self, folder: Path, *tests: str) -> list[str]:
        """Return how to run these tests of it, or all, with a report and a cache in the folder."""
        python = str(REPOSITORY / ".venv" / self.environment / "bin/python")
        stack = [str(REPOSITORY / ".venv/tools/bin/python"), "-m", "deploy.embedded", "with"]
        up = [*stack, "--fresh", self.parts, "--"] if self.parts else []
        # Of its own: a session makes the common one private again while others are at work in it.
        temporary = f"--basetemp={folder / 'pytest'}"
        kept = [f"--junit-xml={folder / 'report.xml'}", "-o", f"cache_dir={folder / 'cache'}"]
        return [*up, python, *PYTEST, *(tests or [self.folder]), *kept, temporary]


UNIT = (
    Suite("order unit", "order", "order_service/tests/unit"),
    Suite("mail unit", "mail", "mail_service/tests/unit"),
    Suite("contract", "tools", "tests/contract"),
)
# The longest first: they mostly wait, and two of them share the cores well.
ALL = (
    Suite("mail faults", "tools", "tests/faults/mail"),
    Suite("order faults", "tools", "tests/faults/order"),
    Suite("compose", "tools", "tests/compose"),
    Suite("mail integration", "mail", "mail_service/tests/integration", "kafka,mail-db"),
    Suite("order integration", "order", "order_service/tests/integration", "kafka,order-db"),
    Suite("end to end", "tools", "tests/end_to_end"),
    Suite("order API", "tools", "tests/api"),
    Suite("stack", "tools", "tests/embedded"),
    Suite("browser", "tools", "tests/browser"),
    *UNIT,
)
AT_ONCE = 2
# More that fail are no accident.
MOST_HEARD_AGAIN = 3
HEARINGS = 3
# pytest's exit code for it; others are of a run that did not come to its end.
TESTS_FAILED = 1


@dataclass(frozen=True)
class Result:
    """How a suite ended; what failed is named as pytest takes it."""

    suite: Suite
    code: int
    seconds: float
    tests: int
    skipped: int
    failed: Sequence[str]
    unsteady: Sequence[str] = ()

    @property
    def is_good(self) -> bool:
        """Whether there were tests, and no other failed than such as passed alone."""
        if self.unsteady:
            return self.code == TESTS_FAILED and set(self.failed) == set(self.unsteady)
        return self.code == 0 and self.tests > 0

    @property
    def counts(self) -> tuple[int, int, int]:
        """Return how many passed, failed and were skipped."""
        return self.tests - self.skipped - len(self.failed), len(self.failed), self.skipped


def run(suite: Suite, console: Console, *tests: str) -> Result:
    """Run one suite, or some of its tests, and print what it said when it has ended."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        # PostgreSQL runs as another user where we are root.
        folder.chmod(0o755)
        output = folder / "output"
        console.print(f"{suite.name} begins", style="dim")
        began_at = time.monotonic()
        with output.open("wb") as written:
            code = subprocess.run(
                suite.command(folder, *tests),
                cwd=REPOSITORY,
                stdout=written,
                stderr=STDOUT,
                check=False,
            ).returncode
        seconds = time.monotonic() - began_at
        with PRINTING:
            console.rule(suite.name)
            sys.stdout.write(output.read_text(encoding="utf-8", errors="replace"))
            sys.stdout.flush()
        count = skipped = 0
        if (report := folder / "report.xml").exists():
            (totals,) = ET.parse(report).getroot().iter("testsuite")
            count, skipped = int(totals.get("tests", 0)), int(totals.get("skipped", 0))
        failed: list[str] = []
        if (cached := folder / "cache/v/cache/lastfailed").exists():
            # Named from the folder that has pytest's settings, the first of the path.
            root = Path(suite.folder).parts[0]
            failed = [f"{root}/{test}" for test in json.loads(cached.read_text())]
    return Result(suite, code, seconds, count, skipped, failed)


def hear_again(result: Result, console: Console) -> Result:
    """Run what failed with nothing beside it; what passes each time is unsteady, not broken."""
    for _ in range(HEARINGS):
        if run(result.suite, console, *result.failed).code:
            return result
    return replace(result, unsteady=result.failed)


def main(arguments: Sequence[str]) -> int:
    """Run all suites, or `unit`; return 0 when every one is good."""
    console = Console(highlight=False)
    suites = UNIT if "unit" in arguments else ALL
    with ThreadPoolExecutor(AT_ONCE) as pool:
        results = list(pool.map(lambda suite: run(suite, console), suites))
    if sum(len(result.failed) for result in results) <= MOST_HEARD_AGAIN:
        results = [
            hear_again(each, console) if each.failed and each.suite not in UNIT else each
            for each in results
        ]
    table = Table("suite", "seconds", "passed", "failed", "skipped", "")
    for result in results:
        mark = ("unsteady" if result.unsteady else "ok") if result.is_good else "FAILED"
        counts = map(str, result.counts)
        table.add_row(result.suite.name, f"{result.seconds:.1f}", *counts, mark)
    console.print(table)
    passed, failed, skipped = map(sum, zip(*(result.counts for result in results), strict=True))
    console.print(f"{passed} passed, {failed} failed, {skipped} skipped")
    for result in results:
        for test in result.failed:
            told = "failed, passed alone" if test in result.unsteady else "FAILED"
            console.print(f"{told}: {test}", style="bold", markup=False, soft_wrap=True)
    return 0 if all(result.is_good for result in results) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
