"""The mail service beside its peers, in turns, with the same mail and relay (`make bench-peers`).

Celery as its documentation has it, Celery with kept connections and `email.mime`, FastStream at
most once with both: none of them has an outbox, a ledger, authentication or idempotency. Needs
redis-server; the peers' packages go into an environment of their own.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil
from rich.console import Console
from rich.table import Table

from benchmarks.mail import MAIL_PYTHON, Bench, running
from benchmarks.measure import backlog_order, run, spread
from deploy.embedded.jars import REPOSITORY
from deploy.embedded.part import Attempt, Command, Part
from deploy.embedded.ports import HOST, is_answering
from deploy.embedded.state import State, fresh_root

HERE = Path(__file__).parent
ENVIRONMENT = REPOSITORY / ".venv/peers"
UV = REPOSITORY / ".venv/tools/bin/uv"
MAILS = 4_000
OUR_MAILS = 12_000
ORDERS_BY_SECOND = 20
START_SECONDS = 30.0
END_SECONDS = 30.0
WORKER = ("celery", "-A", "celery_peer", "worker", "--concurrency", "8", "--loglevel", "INFO")
ENQUEUE = """
import json, sys
import celery_peer
for line in sys.stdin:
    getattr(celery_peer, sys.argv[1]).delay(json.loads(line))
"""


@dataclass(frozen=True)
class Peers:
    """What the peers run on: our relay and broker, a Redis, and the words of our mail."""

    bench: Bench
    redis_port: int
    web_port: int
    words: Path

    def celery(self, task: str) -> tuple[float, float]:
        """Return mails a second and CPU in µs a mail of eight worker processes."""
        self.bench.sink.forget()
        orders = (backlog_order(f"order-{number}", number) for number in range(MAILS))
        subprocess.run(  # noqa: S603 - our own command
            [_installed("python"), "-c", ENQUEUE, task],
            cwd=HERE,
            env=self._celery_environment,
            input="\n".join(map(json.dumps, orders)),
            text=True,
            check=True,
        )
        with self._begun(WORKER, self._celery_environment) as worker:
            return self._middle(worker)

    def faststream(self) -> tuple[float, float]:
        """Return mails a second and CPU in µs a mail of a consumer of our topic."""
        self.bench.begin_anew(3)
        self.bench.fill(MAILS)
        environment = {**self._environment, "BROKER": self.bench.addresses.kafka_bootstrap_servers}
        with self._begun(("faststream", "run", "faststream_peer:app"), environment) as consumer:
            return self._middle(consumer)

    def celery_latencies(self, orders: int) -> list[float]:
        """Return the ms from each POST, which stores nothing, to its mail's 250."""
        self.bench.sink.forget()
        web = ("gunicorn", "-w", "2", "--threads", "4", "-b", f"{HOST}:{self.web_port}")
        with (
            self._begun(WORKER, self._celery_environment),
            self._begun((*web, "celery_peer:web"), self._celery_environment, self.web_port),
            httpx.Client(base_url=f"http://{HOST}:{self.web_port}", timeout=10) as client,
        ):

            def place(number: int) -> httpx.Response:
                return client.post("/orders", json=backlog_order("", number))

            # The workers start in the time that this one takes.
            place(0).raise_for_status()
            self.bench.wait_for(1)
            return self.bench.to_the_250(place, orders, per_second=ORDERS_BY_SECOND)

    def _middle(self, process: psutil.Process) -> tuple[float, float]:
        rate, (cpu_us,) = self.bench.middle_of(MAILS, [process])
        return rate, cpu_us

    @contextmanager
    def _begun(
        self, command: Sequence[str], environment: Mapping[str, str], port: int | None = None
    ) -> Iterator[psutil.Process]:
        """Run a peer until the block ends; with a port, begin the block when that answers."""
        argv = [_installed(command[0]), *command[1:]]
        with _process(self.bench.stack.state, argv, environment, port) as process:
            yield process

    @property
    def _environment(self) -> dict[str, str]:
        relay = {"SMTP_PORT": str(self.bench.sink.port), "PEER_MAIL": str(self.words)}
        return {**os.environ, **relay}

    @property
    def _celery_environment(self) -> dict[str, str]:
        return {**self._environment, "BROKER": f"redis://{HOST}:{self.redis_port}/0"}


def main(arguments: Sequence[str]) -> None:
    """Measure all in turns and print how ours compares."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers", description=__doc__)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--orders", type=int, default=1_200, help="for the latency, 20 a second")
    options = parser.parse_args(arguments)
    console = Console(highlight=False, width=120)
    if shutil.which("redis-server") is None:
        sys.exit("redis-server is not installed")
    _install()
    figures: dict[str, list[tuple[float, float]]] = {}
    with fresh_root(REPOSITORY / ".run") as root, _peers(root) as peers:
        for _ in range(options.rounds):
            for name, measure in _subjects(peers).items():
                figures.setdefault(name, []).append(measure())
                console.print(f"{name}: {figures[name][-1]}", style="dim")
        theirs = peers.celery_latencies(options.orders)
        ours = peers.bench.latencies(options.orders, per_second=ORDERS_BY_SECOND)
    _show(console, figures, ours, theirs)


def _subjects(peers: Peers) -> dict[str, Callable[[], tuple[float, float]]]:
    def our_drain(slots: int) -> tuple[float, float]:
        drain = peers.bench.drain(OUR_MAILS, slots=slots)
        return drain.mails_per_second, drain.replica_cpu_us

    return {
        "ours, 16 slots": lambda: our_drain(16),
        "Celery": lambda: peers.celery("as_documented"),
        "ours, 32 slots": lambda: our_drain(32),
        "Celery, kept connections": lambda: peers.celery("on_kept_connection"),
        "FastStream, at most once": peers.faststream,
    }


def _show(
    console: Console,
    figures: dict[str, list[tuple[float, float]]],
    ours: Sequence[float],
    theirs: Sequence[float],
) -> None:
    table = Table("in turns; min / median / max", "mails/s", "CPU µs a mail")
    for name, rounds in figures.items():
        table.add_row(name, spread([each[0] for each in rounds]), spread([e[1] for e in rounds]))
    console.print(table)
    medians = {
        name: sorted(rate for rate, _ in rounds)[len(rounds) // 2]
        for name, rounds in figures.items()
    }
    best = max(rate for name, rate in medians.items() if not name.startswith("ours"))
    for name in ("ours, 16 slots", "ours, 32 slots"):
        console.print(
            f"{name}: {medians[name] / medians['Celery']:.1f} times Celery's (reach 4, then 8), "
            f"{medians[name] / best:.1f} times the best peer's (reach 2)"
        )
    for name, latencies in (("ours", ours), ("Celery", theirs)):
        p50, p99 = latencies[len(latencies) // 2], latencies[len(latencies) * 99 // 100]
        console.print(f"POST to 250 at 20/s, {name}: p50 {p50:.1f} ms, p99 {p99:.1f} ms")
    console.print("(reach: the median below Celery's, p99 twice Celery's at most)")


@contextmanager
def _peers(root: Path) -> Iterator[Peers]:
    words = root / "words.json"
    with running(root) as bench, ExitStack() as up:
        words.write_text(run([str(MAIL_PYTHON), "-m", "benchmarks.mail_alone", "words"]), "utf-8")
        redis_port, web_port = bench.ports.choose(0), bench.ports.choose(0)
        redis = ["redis-server", "--port", str(redis_port), "--bind", HOST, "--dir", str(root)]
        up.enter_context(_process(bench.stack.state, redis, os.environ, redis_port))
        yield Peers(bench, redis_port, web_port, words)


@contextmanager
def _process(
    state: State, argv: Sequence[str], environment: Mapping[str, str], port: int | None
) -> Iterator[psutil.Process]:
    name = Path(argv[0]).name
    part = Part(
        name=name,
        command=Command(argv=argv, log_path=state.log(name), env=environment, cwd=HERE),
        pid_path=state.pid(name),
        is_ready=lambda: port is None or is_answering(port),
        ready_seconds=START_SECONDS,
        stop_seconds=END_SECONDS,
    )
    part.start()
    try:
        part.wait_ready(Attempt())
        yield psutil.Process(part.pid)
    finally:
        part.stop()


def _install() -> None:
    run(
        [
            str(UV),
            "venv",
            "--quiet",
            "--allow-existing",
            "--python",
            sys.executable,
            str(ENVIRONMENT),
        ]
    )
    needed = str(HERE / "requirements.txt")
    run([str(UV), "pip", "install", "--quiet", "--python", _installed("python"), "-r", needed])


def _installed(program: str) -> str:
    return str(ENVIRONMENT / "bin" / program)


if __name__ == "__main__":
    main(sys.argv[1:])
