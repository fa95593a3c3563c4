"""What the benchmarks share: our processes, their CPU, an order, how figures are written."""

import json
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime

import psutil

from benchmarks.load import Job, Sample
from deploy.embedded.jars import REPOSITORY
from deploy.embedded.services import Pair

ORDER_PYTHON = REPOSITORY / ".venv/order/bin/python"
COMMAND_SECONDS = 120.0


def tokens(pair: Pair, users: int) -> list[str]:
    """Return a bearer token for each of so many users."""
    argv = [str(ORDER_PYTHON), "-m", "benchmarks.tokens", str(users)]
    return run(argv, env=pair.order_environment).split()


def backlog_order(order_id: str, number: int) -> dict[str, object]:
    """Return an order of three lines, no two of them at one price."""
    items = [
        {
            "sku": f"TEA-{line}",
            "name": f"녹차 {line}호 Green tea",
            "quantity": line,
            "unitPrice": str(8_000 + 3 * number + line),
        }
        for line in (1, 2, 3)
    ]
    return {
        "orderId": order_id,
        "userId": "benchmark",
        "amount": str(sum((8_000 + 3 * number + line) * line for line in (1, 2, 3))),
        "currency": "KRW",
        "email": f"customer-{number}@example.com",
        "locale": "ko",
        "orderedAt": datetime.now(UTC).isoformat(),
        "items": items,
    }


def load(job: Job) -> Sample:
    """Send a load from a process of its own."""
    argv = [sys.executable, "-m", "benchmarks.load"]
    return Sample(**json.loads(run(argv, stdin=json.dumps(asdict(job)))))


def run(argv: Sequence[str], *, env: Mapping[str, str] | None = None, stdin: str = "") -> str:
    """Run a command to its end and return what it printed."""
    done = subprocess.run(  # noqa: S603 - our own commands
        argv,
        cwd=REPOSITORY,
        env=env,
        input=stdin,
        stdout=subprocess.PIPE,
        text=True,
        timeout=COMMAND_SECONDS,
        check=True,
    )
    return done.stdout


def cpu_seconds(process: psutil.Process) -> float:
    """Return the CPU time of a process and its children, ended ones included."""
    return sum(sum(one.cpu_times()[:4]) for one in [process, *process.children(recursive=True)])


def spread(values: Sequence[float], digits: int = 0) -> str:
    """Write the least, the median and the most."""
    parts = (min(values), statistics.median(values), max(values))
    return " / ".join(f"{part:.{digits}f}" for part in parts)
