"""The mail service: drain, CPU and memory a mail, latency from POST to the 250 (`make bench`).

The relay is the sink of the tests, in a process of its own and without fsync: what is measured
is the replica. docs/performance.md has the figures.
"""

import argparse
import json
import platform
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

import httpx
import psutil
import psycopg2
from confluent_kafka import Producer
from confluent_kafka.admin import AdminClient, NewTopic
from rich.console import Console
from rich.table import Table

from benchmarks.measure import backlog_order, cpu_seconds, run, spread, tokens
from deploy.embedded.infrastructure import Addresses, add_infrastructure
from deploy.embedded.jars import REPOSITORY
from deploy.embedded.ports import Ports
from deploy.embedded.services import MAIL_SERVICE, Pair, add_pair
from deploy.embedded.stack import Stack
from deploy.embedded.state import fresh_root
from tests.support.mail_side import members_of_the_group
from tests.support.service import running_service
from tests.support.sink import Delay, Rule, Sink
from tests.support.world import eventually

MAIL_PYTHON = REPOSITORY / ".venv/mail/bin/python"
ORDER_SIDE = ("order-db", "order-migrate", "order-products", "order-topics")
BEFORE = ("kafka", "mail-db", "mail-migrate", *ORDER_SIDE)
TOPIC = "order-created"
# What the relay insists on.
TOPIC_SETTINGS = {"retention.ms": str(63 * 24 * 3600 * 1000)}
KAFKA_SECONDS = 30.0
ROUND_SECONDS = 600.0
POLL_SECONDS = 0.05
TABLES = ("deliveries", "positions", "replicas", "gaps")
ALONE_MAILS = 5_000


@dataclass(frozen=True)
class Drain:
    """One backlog that was mailed; CPU in µs a mail of all replicas' processes."""

    mails_per_second: float
    replica_cpu_us: float
    database_cpu_us: float
    sink_cpu_us: float
    resident_mb: float


@dataclass(frozen=True)
class Bench:
    """The pair's parts, with replicas that are started for each round."""

    stack: Stack
    ports: Ports
    addresses: Addresses
    pair: Pair
    sink: Sink

    def drain(
        self,
        mails: int,
        *,
        slots: int,
        delay_ms: float = 0.0,
        replicas: int = 1,
        partitions: int = 3,
    ) -> Drain:
        """Let replicas mail a backlog; rates are of the middle of it, where all are at work."""
        self.begin_anew(partitions)
        self.sink.script(*([Rule("dot", Delay(delay_ms / 1000))] if delay_ms else []))
        database = psutil.Process(self.stack.part("mail-db").pid)
        sink = psutil.Process(self.sink.pid)
        with ExitStack() as up:
            pids = [up.enter_context(self._replica(slots)) for _ in range(replicas)]
            # Before there is work: who joins a group at work has partitions seconds later.
            self._wait_until_all_read(replicas)
            self.fill(mails)
            processes = [psutil.Process(pid) for pid in pids]
            rate, (*ours, of_database, of_sink) = self.middle_of(
                mails, [*processes, database, sink]
            )
            resident = max(process.memory_info().rss for process in processes)
        return Drain(
            mails_per_second=rate,
            replica_cpu_us=sum(ours),
            database_cpu_us=of_database,
            sink_cpu_us=of_sink,
            resident_mb=resident / 1e6,
        )

    def middle_of(
        self, mails: int, processes: Sequence[psutil.Process]
    ) -> tuple[float, list[float]]:
        """Wait for a backlog; of its middle return mails a second and CPU in µs a mail of each."""
        first = self.wait_for(mails // 5)
        before = [cpu_seconds(process) for process in processes]
        last = self.wait_for(mails * 7 // 10)
        after = [cpu_seconds(process) for process in processes]
        self.wait_for(mails)
        times = sorted(mail.at for mail in self.sink.accepted())
        count = last - first
        return count / (times[last - 1] - times[first - 1]), [
            1e6 * (later - earlier) / count for earlier, later in zip(before, after, strict=True)
        ]

    def latencies(self, orders: int, *, per_second: float) -> list[float]:
        """Place orders at a steady rate; return the ms from each POST to its mail's 250."""
        self.begin_anew(3)
        (token,) = tokens(self.pair, 1)
        headers = {"Authorization": f"Bearer {token}"}
        order = {"items": [{"sku": "TEA-GREEN-50", "quantity": 2}], "locale": "ko"}
        self.stack.start("order-api", "order-relay")
        with (
            self._replica(16),
            httpx.Client(base_url=self.pair.api_url, headers=headers, timeout=10) as client,
        ):

            def place(_: int) -> httpx.Response:
                key = str(uuid.uuid4())
                body = {**order, "email": f"customer-{key}@example.com"}
                return client.post("/v1/orders", json=body, headers={"Idempotency-Key": key})

            latencies = self.to_the_250(place, orders, per_second=per_second)
        self.stack.stop("order-relay")
        self.stack.stop("order-api")
        return latencies

    def to_the_250(
        self, place: Callable[[int], httpx.Response], orders: int, *, per_second: float
    ) -> list[float]:
        """Place orders at a steady rate; return the ms from each to its mail's 250, sorted."""
        already = self.sink.counters().mails
        placed: dict[str, float] = {}
        began = time.monotonic()
        for number in range(orders):
            time.sleep(max(0.0, began + number / per_second - time.monotonic()))
            at = time.time()
            placed[place(number).raise_for_status().json()["id"]] = at
        self.wait_for(already + orders)
        return sorted(
            1e3 * (mail.at - placed[mail.order_id])
            for mail in self.sink.accepted()
            if mail.order_id in placed
        )

    @contextmanager
    def _replica(self, slots: int) -> Iterator[int]:
        """Run a replica with production's logging and timing; give its process id."""
        name = f"replica-{uuid.uuid4().hex[:8]}"
        environment = {**self.pair.mail_environment, "MAIL_CONCURRENCY": str(slots)}
        argv = [str(MAIL_SERVICE), "consume"]
        with running_service(self.stack.state, self.ports, name, argv, environment) as service:
            yield service.pid

    def begin_anew(self, partitions: int) -> None:
        """Empty the relay and the ledger, and make the topic anew."""
        self.sink.forget()
        with (
            closing(
                psycopg2.connect(self.addresses.mail_database_url.replace("+psycopg2", ""))
            ) as db,
            db,
            db.cursor() as cursor,
        ):
            cursor.execute(f"TRUNCATE {', '.join(TABLES)}")
        admin = AdminClient({"bootstrap.servers": self.addresses.kafka_bootstrap_servers})
        admin.delete_topics([TOPIC])[TOPIC].result(KAFKA_SECONDS)
        while TOPIC in admin.list_topics(timeout=KAFKA_SECONDS).topics:
            time.sleep(POLL_SECONDS)
        topic = NewTopic(TOPIC, partitions, 1, config=TOPIC_SETTINGS)
        admin.create_topics([topic])[TOPIC].result(KAFKA_SECONDS)

    def _wait_until_all_read(self, replicas: int) -> None:
        """Wait until each replica has partitions."""
        admin = AdminClient({"bootstrap.servers": self.addresses.kafka_bootstrap_servers})

        def do_all_read() -> bool:
            shares = members_of_the_group(admin).values()
            return len(shares) == replicas and all(shares)

        eventually(do_all_read, within_seconds=KAFKA_SECONDS)

    def fill(self, mails: int) -> None:
        """Write a backlog of events."""
        producer = Producer(
            {"bootstrap.servers": self.addresses.kafka_bootstrap_servers, "linger.ms": 20}
        )
        for number in range(mails):
            order_id = str(uuid.uuid4())
            producer.produce(TOPIC, key=order_id, value=json.dumps(backlog_order(order_id, number)))
            producer.poll(0)
        if producer.flush(KAFKA_SECONDS):
            raise TimeoutError("the broker did not take the backlog")

    def wait_for(self, mails: int) -> int:
        """Wait until so many mails were accepted; return how many."""
        deadline = time.monotonic() + ROUND_SECONDS
        while time.monotonic() < deadline:
            if (accepted := self.sink.counters().mails) >= mails:
                return accepted
            time.sleep(POLL_SECONDS)
        raise TimeoutError(f"no {mails} mails within {ROUND_SECONDS:g} s")


def main(arguments: Sequence[str]) -> None:
    """Measure, and print each figure beside what design §9 asks for."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.mail", description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--mails", type=int, default=20_000, help="of a round without delay")
    parser.add_argument("--orders", type=int, default=1_200, help="for the latency, 20 a second")
    options = parser.parse_args(arguments)
    console = Console(highlight=False, width=150)
    with fresh_root(REPOSITORY / ".run") as root, running(root) as bench:
        rendering = _alone("render", 5_000)["cpu_us"]
        alone = [_alone("smtp", bench.sink.port, ALONE_MAILS) for _ in range(options.rounds)]
        rounds: dict[str, list[Drain]] = {}
        for _ in range(options.rounds):
            for name, drain in _drains(bench, options.mails):
                rounds.setdefault(name, []).append(drain)
                console.print(f"{name}: {drain}", style="dim")
        latencies = bench.latencies(options.orders, per_second=20)
    _show(console, rendering, [one["mails_per_second"] for one in alone], rounds, latencies)


def _drains(bench: Bench, mails: int) -> Iterator[tuple[str, Drain]]:
    yield "16 slots, no delay", bench.drain(mails, slots=16)
    yield "16 slots, 20 ms, 1 partition", bench.drain(8_000, slots=16, delay_ms=20, partitions=1)
    yield "64 slots, 20 ms, 1 partition", bench.drain(20_000, slots=64, delay_ms=20, partitions=1)
    yield "16 slots, 20 ms, 4 partitions", bench.drain(8_000, slots=16, delay_ms=20, partitions=4)
    yield (
        "2 replicas of 16, 20 ms, 4 partitions",
        bench.drain(16_000, slots=16, delay_ms=20, partitions=4, replicas=2),
    )


@contextmanager
def running(root: Path) -> Iterator[Bench]:
    """Run the parts that replicas need, and a sink that is not fsynced."""
    ports = Ports(use_defaults=False)
    with Sink(root / "sink", is_durable=False) as sink, Stack(root / "stack") as stack:
        addresses = add_infrastructure(stack, ports, ("kafka", "order-db", "mail-db"))
        addresses = replace(addresses, smtp_port=sink.port)
        pair = add_pair(stack, ports, addresses, mail_replicas=0)
        stack.start(*BEFORE)
        yield Bench(stack, ports, addresses, pair, sink)


def _alone(*arguments: object) -> dict[str, float]:
    argv = [str(MAIL_PYTHON), "-m", "benchmarks.mail_alone", *map(str, arguments)]
    measured: dict[str, float] = json.loads(run(argv))
    return measured


def _show(
    console: Console,
    rendering: float,
    alone: Sequence[float],
    rounds: dict[str, list[Drain]],
    latencies: Sequence[float],
) -> None:
    console.print(
        f"\n{datetime.now(UTC):%Y-%m-%d}, {platform.machine()}, {psutil.cpu_count()} cores, "
        f"Python {platform.python_version()}; 3 lines a mail; min / median / max"
    )
    table = Table("", "mails/s", "replica CPU µs", "PostgreSQL", "sink", "resident MB")
    for name, drains in rounds.items():
        table.add_row(
            name,
            spread([one.mails_per_second for one in drains]),
            spread([one.replica_cpu_us for one in drains]),
            spread([one.database_cpu_us for one in drains]),
            spread([one.sink_cpu_us for one in drains]),
            spread([one.resident_mb for one in drains]),
        )
    console.print(table)
    fast, few, many, one, two = (
        sorted(drain.mails_per_second for drain in drains)[len(drains) // 2]
        for drains in rounds.values()
    )
    lone = sorted(alone)[len(alone) // 2]
    cpu = [drain.replica_cpu_us for drain in next(iter(rounds.values()))]
    p50, p99 = latencies[len(latencies) // 2], latencies[len(latencies) * 99 // 100]
    console.print(f"drain: {fast / lone:.2f} of our SMTP client alone, {lone:.0f}/s   (reach 0.3)")
    console.print(f"CPU: {spread(cpu)} µs of the replica a mail   (reach 400, then 300)")
    console.print(f"20 ms: {few / 800:.2f} of what 16 slots could   (reach 0.85)")
    console.print(f"       {many / 3200:.2f} of what 64 slots could   (reach 0.75)")
    console.print(f"two replicas: {two / one:.2f} times one   (reach 1.9)")
    console.print(f"rendering: {rendering:.0f} µs   (reach 200, then 120)")
    console.print(
        f"POST to 250, {len(latencies)} orders at 20/s: p50 {p50:.1f} ms, p99 {p99:.1f} ms"
    )
    console.print("Its peers in one run with it: make bench-peers")


if __name__ == "__main__":
    main(sys.argv[1:])
