"""The relay with its read-back: throughput, cost against the outbox's size, and idle.

`make bench` runs it; docs/performance.md has the figures.
"""

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import psutil
import psycopg2
from psycopg2.extensions import ISOLATION_LEVEL_REPEATABLE_READ, connection
from rich.console import Console
from rich.table import Table

from benchmarks.load import Job
from benchmarks.measure import ORDER_PYTHON, cpu_seconds, load, run, spread, tokens
from deploy.embedded.infrastructure import add_infrastructure
from deploy.embedded.jars import REPOSITORY
from deploy.embedded.ports import Ports
from deploy.embedded.services import Pair, add_pair
from deploy.embedded.stack import Stack
from deploy.embedded.state import fresh_root
from tests.support import backlog

BEFORE = ("kafka", "order-db", "order-migrate", "order-topics", "order-products")
USERS = 1_000
POST_REQUESTS = 3_000
ROUND_SECONDS = 600.0
POLL_SECONDS = 0.05

# As the read-back leaves them; the positions say that it has seen the topic to its end.
COMPLETE = """
    UPDATE outbox SET state = 'COMPLETED', topic_id = %s, partition = 0, "offset" = 0,
           published_at = now(), completed_at = now()
     WHERE state = 'INIT'
"""
IS_DONE = """
    SELECT NOT EXISTS (SELECT FROM outbox WHERE state = 'INIT')
       AND NOT EXISTS (SELECT FROM outbox WHERE state = 'PUBLISHED')
"""


@dataclass(frozen=True)
class Round:
    """One backlog taken from INIT to COMPLETED; CPU in µs an event."""

    events_per_second: float
    relay_cpu_us: float
    database_cpu_us: float


@dataclass(frozen=True)
class Bench:
    """The order service without its mail, the relay stopped."""

    stack: Stack
    pair: Pair
    database_url: str

    @contextmanager
    def database(self) -> Iterator[connection]:
        """Open a session of our own."""
        with closing(psycopg2.connect(self.database_url.replace("+psycopg2", ""))) as opened:
            yield opened

    def insert(self, rows: int) -> None:
        """Add orders with their events in INIT."""
        with self.database() as opened, opened:
            backlog.insert(opened, rows)

    def insert_completed(self, rows: int) -> None:
        """Add orders with their events in COMPLETED."""
        argv = [str(ORDER_PYTHON.with_name("order-service")), "topics", "describe", "--json"]
        topic_id = json.loads(run(argv, env=self.pair.order_environment))["topic_id"]
        with self.database() as opened, opened, opened.cursor() as cursor:
            backlog.insert(opened, rows)
            cursor.execute(COMPLETE, [topic_id])

    def execute(self, statement: str) -> None:
        """Run a statement in a transaction of its own, or none for VACUUM."""
        with self.database() as opened, opened.cursor() as cursor:
            opened.autocommit = True
            cursor.execute(statement)

    def measure(self, rows: int) -> Round:
        """Let a relay take a backlog of this size to COMPLETED."""
        self.insert(rows)
        self.execute("VACUUM ANALYZE outbox")
        database = psutil.Process(self.stack.part("order-db").pid)
        self.stack.start("order-relay")
        relay = psutil.Process(self.stack.part("order-relay").pid)
        database_before, began = cpu_seconds(database), time.perf_counter()
        self._wait_until_done()
        seconds = time.perf_counter() - began
        # The process's start is part of its CPU, as it is of the seconds: some 0.5 s.
        used = Round(
            rows / seconds,
            1e6 * cpu_seconds(relay) / rows,
            1e6 * (cpu_seconds(database) - database_before) / rows,
        )
        self.stack.stop("order-relay")
        return used

    def idle(self, seconds: float) -> float:
        """Return the share of one core that a relay with nothing to do takes."""
        self.stack.start("order-relay")
        time.sleep(5.0)
        relay = psutil.Process(self.stack.part("order-relay").pid)
        before, began = cpu_seconds(relay), time.perf_counter()
        time.sleep(seconds)
        share = (cpu_seconds(relay) - before) / (time.perf_counter() - began)
        self.stack.stop("order-relay")
        return share

    def post(self) -> float:
        """Return orders a second by POST, the relay stopped."""
        self.stack.start("order-api")
        port = int(self.pair.order_environment["HTTP_PORT"])
        sample = load(Job(port, "/v1/orders", POST_REQUESTS, tokens(self.pair, USERS)))
        self.stack.stop("order-api")
        self.execute("DELETE FROM outbox WHERE state = 'INIT'")
        return sample.requests_per_second

    def _wait_until_done(self) -> None:
        deadline = time.monotonic() + ROUND_SECONDS
        with self.database() as opened, opened.cursor() as cursor:
            opened.autocommit = True
            while time.monotonic() < deadline:
                cursor.execute(IS_DONE)
                if cursor.fetchone() == (True,):
                    return
                time.sleep(POLL_SECONDS)
        raise TimeoutError(f"the backlog was not COMPLETED within {ROUND_SECONDS:g} s")


def main(arguments: Sequence[str]) -> None:
    """Measure a small outbox and a large one, and print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.relay", description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rows", type=int, default=100_000, help="events of a round")
    parser.add_argument("--completed", type=int, default=1_000_000, help="rows of the large one")
    parser.add_argument("--idle-seconds", type=float, default=60.0)
    options = parser.parse_args(arguments)
    console = Console(highlight=False, width=150)
    with fresh_root(REPOSITORY / ".run") as root, _running(root) as bench:
        posted = bench.post()
        console.print(f"POST: {posted:.0f}/s", style="dim")
        idle = bench.idle(options.idle_seconds)
        console.print(f"idle: {idle:.2%} of a core", style="dim")
        small = []
        for _ in range(options.rounds):
            small.append(bench.measure(options.rows))
            console.print(f"small: {small[-1]}", style="dim")
        large = []
        with _grown(bench, options.completed):
            for _ in range(options.rounds):
                large.append(bench.measure(options.rows))
                console.print(f"large: {large[-1]}", style="dim")
    _show(console, options, posted, idle, {"small": small, "large": large})


@contextmanager
def _running(root: Path) -> Iterator[Bench]:
    ports = Ports(use_defaults=False)
    with Stack(root) as stack:
        addresses = add_infrastructure(stack, ports, ("kafka", "order-db", "mail-db"))
        pair = add_pair(stack, ports, addresses, mail_replicas=0)
        stack.start(*BEFORE)
        yield Bench(stack, pair, addresses.order_database_url)


@contextmanager
def _grown(bench: Bench, rows: int) -> Iterator[None]:
    """Add completed rows, hold a snapshot, and make every one a dead version that it still sees."""
    step = 100_000
    for _ in range(0, rows, step):
        bench.insert_completed(min(step, rows))
    with bench.database() as held, held.cursor() as cursor:
        held.set_isolation_level(ISOLATION_LEVEL_REPEATABLE_READ)
        cursor.execute("SELECT count(*) FROM outbox")
        bench.execute("UPDATE outbox SET reason = 'touched' WHERE state = 'COMPLETED'")
        yield


def _show(
    console: Console,
    options: argparse.Namespace,
    posted: float,
    idle: float,
    rounds: dict[str, list[Round]],
) -> None:
    console.print(
        f"\n{datetime.now(UTC):%Y-%m-%d}, {platform.machine()}, {psutil.cpu_count()} cores, "
        f"Python {platform.python_version()}; {options.rows} events a round, "
        f"large: {options.completed} completed rows, as many dead versions, an open snapshot; "
        "min / median / max"
    )
    table = Table("outbox", "events/s to COMPLETED", "relay CPU µs", "PostgreSQL CPU µs")
    for name, measured in rounds.items():
        table.add_row(
            name,
            spread([one.events_per_second for one in measured]),
            spread([one.relay_cpu_us for one in measured]),
            spread([one.database_cpu_us for one in measured]),
        )
    console.print(table)
    small, large = (
        statistics.median(one.events_per_second for one in measured) for measured in rounds.values()
    )
    console.print(f"against POST ({posted:.0f}/s): {small / posted:.1f} times   (reach 5, then 10)")
    console.print(f"large against small: {large / small:.2f}   (reach 0.8)")
    console.print(f"idle: {idle:.2%} of a core   (reach 1 %)")


if __name__ == "__main__":
    main(sys.argv[1:])
