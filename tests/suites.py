"""Runs the suites, each in a pytest process of its own and two at a time, and sums them up."""

import subprocess
import sys
import tempfile
import threading
import time
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
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

    def command(self, report: Path) -> list[str]:
        """Return how to run it, with a report for the summary."""
        python = str(REPOSITORY / ".venv" / self.environment / "bin/python")
        stack = [str(REPOSITORY / ".venv/tools/bin/python"), "-m", "deploy.embedded", "with"]
        up = [*stack, "--fresh", self.parts, "--"] if self.parts else []
        # Of its own: a session makes the common one private again while others are at work in it.
        temporary = f"--basetemp={report.parent / 'pytest'}"
        return [*up, python, *PYTEST, self.folder, f"--junit-xml={report}", temporary]


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


@dataclass(frozen=True)
class Result:
    """How a suite ended."""

    name: str
    seconds: float
    passed: int
    failed: int
    skipped: int
    is_good: bool


def run(suite: Suite, console: Console) -> Result:
    """Run one suite; one that found no test has failed, one whose tests say why not has not."""
    with tempfile.TemporaryDirectory() as folder:
        # PostgreSQL runs as another user where we are root.
        Path(folder).chmod(0o755)
        report, output = Path(folder) / "report.xml", Path(folder) / "output"
        console.print(f"{suite.name} begins", style="dim")
        began_at = time.monotonic()
        with output.open("wb") as written:
            code = subprocess.run(
                suite.command(report), cwd=REPOSITORY, stdout=written, stderr=STDOUT, check=False
            ).returncode
        seconds = time.monotonic() - began_at
        tests = failed = skipped = 0
        if report.exists():
            (totals,) = ET.parse(report).getroot().iter("testsuite")
            tests, skipped = int(totals.get("tests", 0)), int(totals.get("skipped", 0))
            failed = int(totals.get("failures", 0)) + int(totals.get("errors", 0))
        with PRINTING:
            console.rule(suite.name)
            sys.stdout.write(output.read_text(encoding="utf-8", errors="replace"))
            sys.stdout.flush()
    passed = tests - failed - skipped
    return Result(suite.name, seconds, passed, failed, skipped, code == 0 and tests > 0)


def main(arguments: Sequence[str]) -> int:
    """Run all suites, or `unit`; return 0 when every one is good."""
    console = Console(highlight=False)
    suites = UNIT if "unit" in arguments else ALL
    with ThreadPoolExecutor(AT_ONCE) as pool:
        results = list(pool.map(lambda suite: run(suite, console), suites))
    table = Table("suite", "seconds", "passed", "failed", "skipped", "")
    for result in results:
        counts = (result.passed, result.failed, result.skipped)
        mark = "ok" if result.is_good else "FAILED"
        table.add_row(result.name, f"{result.seconds:.1f}", *map(str, counts), mark)
    console.print(table)
    passed = sum(result.passed for result in results)
    failed = sum(max(result.failed, not result.is_good) for result in results)
    skipped = sum(result.skipped for result in results)
    console.print(f"{passed} passed, {failed} failed, {skipped} skipped")
    return 0 if all(result.is_good for result in results) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
