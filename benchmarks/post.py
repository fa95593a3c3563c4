"""POST /v1/orders beside its limits, in one run (`make bench`; docs/performance.md)."""

import argparse
import platform
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import psutil
import psycopg2
from rich.console import Console
from rich.table import Table

from benchmarks.load import CONNECTIONS, HOST, Job, Sample
from benchmarks.measure import ORDER_PYTHON, cpu_seconds, load, spread, tokens
from deploy.embedded.infrastructure import add_infrastructure
from deploy.embedded.jars import REPOSITORY
from deploy.embedded.part import Command, Part
from deploy.embedded.ports import Ports, is_answering
from deploy.embedded.services import add_pair
from deploy.embedded.stack import Stack
from deploy.embedded.state import fresh_root

# Of the pair only these run: a relay would share the two cores with what is measured.
PARTS = ("order-db", "order-migrate", "order-products", "order-api", "bare")
USERS = 1_000
WARM_UP_REQUESTS = 500
CREATE_ROWS = """
    CREATE TABLE benchmark_rows (
        id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, email text NOT NULL, body bytea NOT NULL
    )
"""


@dataclass(frozen=True)
class Subject:
    """Something to be measured: a route, and the process tree that serves it."""

    name: str
    port: int
    path: str
    server: psutil.Process


@dataclass(frozen=True)
class Round:
    """One measurement of one subject; CPU in ms a request."""

    sample: Sample
    server_cpu_ms: float
    database_cpu_ms: float


@dataclass(frozen=True)
class Bench:
    """All subjects, with the database and the users they share."""

    subjects: Sequence[Subject]
    database: psutil.Process
    tokens: Sequence[str]

    def measure(self, subject: Subject, requests: int) -> Round:
        """Load one subject once, while the others are idle."""
        servers_before, database_before = cpu_seconds(subject.server), cpu_seconds(self.database)
        sample = load(Job(subject.port, subject.path, requests, self.tokens))
        return Round(
            sample,
            1_000 * (cpu_seconds(subject.server) - servers_before) / requests,
            1_000 * (cpu_seconds(self.database) - database_before) / requests,
        )


def main(arguments: Sequence[str]) -> None:
    """Measure in interleaved rounds, and print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.post", description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--requests", type=int, default=2_000, help="of each route in a round")
    options = parser.parse_args(arguments)
    console = Console(highlight=False, width=150)
    rounds: dict[str, list[Round]] = {}
    with fresh_root(REPOSITORY / ".run") as root, _running(root) as bench:
        for subject in bench.subjects:
            bench.measure(subject, WARM_UP_REQUESTS)
        for number in range(options.rounds):
            for subject in bench.subjects:
                measured = bench.measure(subject, options.requests)
                rounds.setdefault(subject.name, []).append(measured)
            console.print(f"round {number + 1} of {options.rounds}", style="dim")
    _show(console, rounds, options.requests)


@contextmanager
def _running(root: Path) -> Iterator[Bench]:
    ports = Ports(use_defaults=False)
    with Stack(root) as stack:
        addresses = add_infrastructure(stack, ports, ("kafka", "order-db", "mail-db"))
        pair = add_pair(stack, ports, addresses, mail_replicas=0)
        bare_port = ports.choose(0)
        stack.add(_bare_part(stack, bare_port, addresses.order_database_url), ["order-migrate"])
        stack.start(*PARTS)
        _execute(addresses.order_database_url, CREATE_ROWS)
        bare = psutil.Process(stack.part("bare").pid)
        api_port = int(pair.order_environment["HTTP_PORT"])
        yield Bench(
            subjects=(
                Subject("bare Flask route", bare_port, "/route", bare),
                Subject("with INSERT, COMMIT", bare_port, "/insert", bare),
                Subject(
                    "POST /v1/orders",
                    api_port,
                    "/v1/orders",
                    psutil.Process(stack.part("order-api").pid),
                ),
            ),
            database=psutil.Process(stack.part("order-db").pid),
            tokens=tokens(pair, USERS),
        )


def _bare_part(stack: Stack, port: int, database_url: str) -> Part:
    state = stack.state
    metrics = state.data("bare-metrics")
    metrics.mkdir()
    argv = [str(ORDER_PYTHON), "-m", "gunicorn", "--config=python:order_service.gunicorn_conf"]
    argv += [f"--bind={HOST}:{port}", f"--env=PROMETHEUS_MULTIPROC_DIR={metrics}"]
    return Part(
        name="bare",
        command=Command(
            argv=[*argv, "benchmarks.bare:create_app()"],
            log_path=state.log("bare"),
            cwd=REPOSITORY,
            env={"DATABASE_URL": database_url},
        ),
        pid_path=state.pid("bare"),
        is_ready=lambda: is_answering(port),
    )


def _execute(url: str, statement: str) -> None:
    connection = psycopg2.connect(url.replace("+psycopg2", ""))
    try:
        with connection, connection.cursor() as cursor:
            cursor.execute(statement)
    finally:
        connection.close()


def _show(console: Console, rounds: Mapping[str, Sequence[Round]], requests: int) -> None:
    now = datetime.now(UTC)
    console.print(
        f"\n{now:%Y-%m-%d}, {platform.machine()}, {psutil.cpu_count()} cores, "
        f"Python {platform.python_version()}; {CONNECTIONS} kept connections, "
        f"{requests} requests of each in a round; min / median / max"
    )
    table = Table("", "requests/s", "p50 ms", "p99 ms", "server CPU ms", "PostgreSQL", "load")
    for name, measured in rounds.items():
        table.add_row(
            name,
            spread([one.sample.requests_per_second for one in measured], 0),
            spread([one.sample.p50_ms for one in measured], 1),
            spread([one.sample.p99_ms for one in measured], 1),
            spread([one.server_cpu_ms for one in measured], 2),
            spread([one.database_cpu_ms for one in measured], 2),
            spread([one.sample.load_cpu_ms for one in measured], 2),
        )
    console.print(table)
    _, limit, ours = rounds.values()
    pairs = list(zip(ours, limit, strict=True))
    per_second = [a.sample.requests_per_second / b.sample.requests_per_second for a, b in pairs]
    cpu = [a.server_cpu_ms / b.server_cpu_ms for a, b in pairs]
    console.print(f"POST against INSERT, COMMIT: {spread(per_second, 2)} of its requests/s")
    console.print(f"                             {spread(cpu, 2)} times its CPU")
    console.print("reach: 0.5 of its requests/s, then 0.7 (design §9)")


if __name__ == "__main__":
    main(sys.argv[1:])
