"""Faults that only show in the long run (faults.toml, F-M1 and F-M2)."""

import math
import statistics
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager

import psutil
import pytest
from confluent_kafka import Consumer

from deploy.embedded.ports import HOST
from tests.support.mail_side import GROUP, TOPIC, MailSide, once
from tests.support.proxy import Pass, Refuse
from tests.support.records import Row, order, orders
from tests.support.scale import scaled
from tests.support.service import Service

LONG_SECONDS = 3_600
MEGABYTE = 1_000_000
MAILS = 100_000
WARM_UP_SHARE = 0.3
REPLICA_BYTES = 120 * MEGABYTE
MOST_BYTES_PER_MAIL = 100
SAMPLE_SECONDS = 0.2
MAILS_PER_SECOND_AT_LEAST = 50

CYCLES = 1_000
REPLICAS = 4
PARTITIONS = 8
SLOTS = 2
# One gives partitions up, one hands them out, and one takes them back when the visitor has left.
REBALANCES_PER_VISIT = 3
ATTEMPTS = 5
ATTEMPT_SECONDS = 10.0
REBALANCE_SECONDS = 30.0
POLL_SECONDS = 0.1
# As many as SQLAlchemy's larger pool keeps, and one for each slot.
KEPT_CONNECTIONS = 5 + SLOTS
# Kafka clients start one now and then; a leak would be one a cycle and more.
KAFKA_THREADS = 4


@pytest.mark.fault("F-M1")
@pytest.mark.timeout(LONG_SECONDS)
def test_memory_is_flat(side: MailSide) -> None:
    """Once warm, a replica needs no more for the last mail than for the first."""
    count = scaled(MAILS)
    side.send(orders(count))
    with side.running() as replica:
        process = psutil.Process(replica.pid)
        samples: list[tuple[int, int]] = []
        deadline = time.monotonic() + count / MAILS_PER_SECOND_AT_LEAST
        while not samples or samples[-1][0] < count:
            assert time.monotonic() < deadline, samples[-1:]
            samples.append((side.sink.counters().mails, process.memory_info().rss))
            time.sleep(SAMPLE_SECONDS)
        side.wait_until_sent(count)
        assert replica.pid == process.pid
    warm = [sample for sample in samples if sample[0] >= count * WARM_UP_SHARE]
    assert max(size for _, size in samples) <= REPLICA_BYTES
    assert statistics.linear_regression(*zip(*warm, strict=True)).slope <= MOST_BYTES_PER_MAIL
    assert side.copies() == dict.fromkeys((f"order-{number}" for number in range(count)), 1)


@pytest.mark.fault("F-M2")
@pytest.mark.timeout(LONG_SECONDS)
def test_breaker_and_rebalances_leave_nothing_behind(side: MailSide) -> None:
    """What they opened and started is closed and ended; no mail is lost, none twice unexplained."""
    side.reset(partitions=PARTITIONS)
    with ExitStack() as up:
        replicas = [
            up.enter_context(side.running(MAIL_CONCURRENCY=str(SLOTS))) for _ in range(REPLICAS)
        ]
        side.wait_for(lambda: len(side.members()) == REPLICAS and all(side.members().values()))
        sent = fail_and_heal(side, replicas, "warm-up")
        before = [held_by(replica) for replica in replicas]
        with rebalancing(side, math.ceil(scaled(CYCLES) / REPLICAS / REBALANCES_PER_VISIT)):
            for cycle in range(scaled(CYCLES) // REPLICAS):
                sent += fail_and_heal(side, replicas, str(cycle))
        side.wait_until_sent(len(sent))
        opened = [len(breaker_changes(replica)) // 2 for replica in replicas]
        assert sum(opened) >= scaled(CYCLES)
        side.wait_for(lambda: all(map(has_let_go, replicas, before)))
    mails, copies = side.mails(), side.copies()
    assert copies.keys() == once(sent).keys()
    # Its link was cut between the dot and the answer.
    assert [each for each in copies if copies[each] > 1 + mails[str(each)]["unknown_count"]] == []


def fail_and_heal(side: MailSide, replicas: Sequence[Service], cycle: str) -> list[Row]:
    """Take the relay away until every breaker is open, and back until every one is closed.

    Each partition gets a mail for either, so that each replica has one to fail and one to probe.
    What a replica has given back another may have sent: then there are new ones.
    """
    sent: list[Row] = []
    for step, mode, is_open in (("down", Refuse(), 1), ("up", Pass(), 0)):
        side.smtp.set(mode)
        for attempt in range(ATTEMPTS):
            records = [
                {**order(f"{cycle}-{step}-{attempt}-{partition}"), "partition": partition}
                for partition in range(PARTITIONS)
            ]
            side.send(records)
            sent += records
            if all_become(replicas, is_open, within_seconds=ATTEMPT_SECONDS):
                break
        else:
            raise AssertionError(f"{cycle}, {step}: not every breaker became {is_open}")
    return sent


def all_become(replicas: Sequence[Service], is_open: int, *, within_seconds: float) -> bool:
    """Wait until all breakers are so; say whether they became so in time."""
    deadline = time.monotonic() + within_seconds
    while any(replica.metric("mail_breaker_is_open") != is_open for replica in replicas):
        if time.monotonic() > deadline:
            return False
        time.sleep(POLL_SECONDS)
    return True


@contextmanager
def rebalancing(side: MailSide, times: int) -> Iterator[Counter[str]]:
    """Have one more member join the group and leave it so often; the block ends after that."""
    counts: Counter[str] = Counter()

    def come_and_go() -> None:
        for _ in range(times):
            properties = {
                "bootstrap.servers": f"{HOST}:{side.kafka.port}",
                "group.id": GROUP,
                "client.id": "visitor",
                "partition.assignment.strategy": "cooperative-sticky",
                "enable.auto.commit": False,
                "heartbeat.interval.ms": 500,
            }
            with closing(Consumer(properties)) as visitor:
                visitor.subscribe([TOPIC])
                deadline = time.monotonic() + REBALANCE_SECONDS
                while not visitor.assignment():
                    assert time.monotonic() < deadline, "no partition came"
                    visitor.poll(POLL_SECONDS)
                counts["joined"] += 1

    thread = threading.Thread(target=come_and_go)
    thread.start()
    try:
        yield counts
    finally:
        thread.join()
    assert counts["joined"] == times


def breaker_changes(replica: Service) -> list[bool]:
    return [line["is_open"] for line in replica.logged("breaker.changed")]


def held_by(replica: Service) -> tuple[int, int]:
    """Return how many threads and descriptors a process has."""
    process = psutil.Process(replica.pid)
    return process.num_threads(), process.num_fds()


def has_let_go(replica: Service, before: tuple[int, int]) -> bool:
    """Whether it has no more than before, but for connections that it keeps."""
    threads, descriptors = held_by(replica)
    return threads <= before[0] + KAFKA_THREADS and descriptors <= before[1] + KEPT_CONNECTIONS
