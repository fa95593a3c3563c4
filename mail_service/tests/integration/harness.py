"""What integration tests share: the ledger as rows, the topic, the real command."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Self, TypeVar

from confluent_kafka import ConsumerGroupTopicPartitions, Producer, TopicPartition
from confluent_kafka.admin import AdminClient, NewTopic, OffsetSpec
from sink import Sink
from sqlalchemy import Engine, text

from mail_service.kafka import GROUP, TOPIC

Environment = dict[str, str]
Row = dict[str, Any]
T = TypeVar("T")

COMMAND = Path(sys.executable).with_name("mail-service")
PARTITIONS = 3
POLL_SECONDS = 0.05
WAIT_SECONDS = 30.0
KAFKA_SECONDS = 10.0
STOP_SECONDS = 10.0


def run(environment: Environment, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a command of the service to its end."""
    return subprocess.run(
        [COMMAND, *arguments], env=environment, capture_output=True, text=True, check=False
    )


def wait_for(
    what: Callable[[], T], is_good: Callable[[T], object], *, seconds: float = WAIT_SECONDS
) -> T:
    """Look again and again until what is seen is good; fail with what was seen last."""
    give_up_at = time.monotonic() + seconds
    while not is_good(seen := what()):
        assert time.monotonic() < give_up_at, f"after {seconds} s: {seen}"
        time.sleep(POLL_SECONDS)
    return seen


class Ledger:
    """The ledger's tables, read as an operator would."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    def clear(self) -> None:
        """Empty every table."""
        for table in ("deliveries", "dead_letters", "positions", "replicas"):
            self.change(f"DELETE FROM {table}")

    def change(self, statement: str, **values: object) -> int:
        """Run a statement in a transaction of its own; return how many rows it hit."""
        with self.engine.begin() as connection:
            return connection.execute(text(statement), values).rowcount

    def rows(self, statement: str, **values: object) -> list[Row]:
        """Return what a query finds."""
        with self.engine.connect() as connection:
            return [dict(row._mapping) for row in connection.execute(text(statement), values)]

    def mails(self) -> dict[str, Row]:
        """Return the deliveries by order."""
        return {row["order_id"]: row for row in self.rows("SELECT * FROM deliveries")}

    def mail(self, order_id: str) -> Row:
        """Return an order's delivery; an empty row when there is none."""
        return self.mails().get(order_id, {})

    def states(self) -> dict[str, int]:
        """Return how many deliveries are in each state."""
        counts = self.rows("SELECT state, count(*) AS count FROM deliveries GROUP BY state")
        return {row["state"]: row["count"] for row in counts}

    def dead_letters(self) -> list[Row]:
        """Return the dead letters in the order of the log."""
        return self.rows('SELECT * FROM dead_letters ORDER BY partition, "offset"')

    def positions(self) -> dict[int, int]:
        """Return the next offset of each partition."""
        found = self.rows("SELECT partition, next_offset FROM positions")
        return {row["partition"]: row["next_offset"] for row in found}


class Topic:
    """The topic order-created, written by a producer that has nothing to do with ours."""

    def __init__(self, bootstrap_servers: str) -> None:
        self._admin = AdminClient({"bootstrap.servers": bootstrap_servers})
        self._producer = Producer({"bootstrap.servers": bootstrap_servers, "linger.ms": 0})

    def recreate(self) -> None:
        """Make the topic anew, and with it its id."""
        if self.exists():
            self.delete()
        self.create()

    def delete(self) -> None:
        """Delete the topic."""
        self._admin.delete_topics([TOPIC])[TOPIC].result(KAFKA_SECONDS)
        wait_for(self.exists, lambda exists: not exists)

    def create(self) -> None:
        """Make the topic; any time stamp is taken, as brokers before 4.0 do."""
        settings = {"message.timestamp.after.max.ms": str(2**63 - 1)}
        new = NewTopic(TOPIC, PARTITIONS, 1, config=settings)
        self._admin.create_topics([new])[TOPIC].result(KAFKA_SECONDS)
        wait_for(self.exists, bool)

    def exists(self) -> bool:
        """Say whether the topic is there, with all its partitions."""
        topics = self._admin.list_topics(timeout=KAFKA_SECONDS).topics
        return TOPIC in topics and len(topics[TOPIC].partitions) == PARTITIONS

    def send(self, records: Iterable[Row]) -> list[tuple[int, int]]:
        """Write records and return partition and offset of each, when all are there."""
        reports: list[tuple[int, int]] = []

        def note(error: object, message: Any) -> None:
            assert error is None, error
            reports.append((message.partition(), message.offset()))

        for record in records:
            self._producer.produce(TOPIC, on_delivery=note, **record)
            self._producer.poll(0)
        assert self._producer.flush(KAFKA_SECONDS) == 0
        return reports

    def ends(self) -> dict[int, int]:
        """Return the end offset of each partition."""
        asked = {TopicPartition(TOPIC, number): OffsetSpec.latest() for number in range(PARTITIONS)}
        found = self._admin.list_offsets(asked)
        return {where.partition: end.result(KAFKA_SECONDS).offset for where, end in found.items()}

    def commits(self) -> dict[int, int]:
        """Return the group's committed offsets."""
        asked = ConsumerGroupTopicPartitions(GROUP)
        found = self._admin.list_consumer_group_offsets([asked])[GROUP].result(KAFKA_SECONDS)
        return {where.partition: where.offset for where in found.topic_partitions}

    def rewind(self) -> None:
        """Set the group's commits to the start, which needs a group without members."""
        starts = [TopicPartition(TOPIC, number, 0) for number in range(PARTITIONS)]
        asked = ConsumerGroupTopicPartitions(GROUP, starts)
        done = self._admin.alter_consumer_group_offsets([asked])[GROUP].result(KAFKA_SECONDS)
        assert not any(where.error for where in done.topic_partitions)

    def forget_group(self) -> None:
        """Delete the group and its commits."""
        self._admin.delete_consumer_groups([GROUP])[GROUP].result(KAFKA_SECONDS)

    def members(self) -> dict[str, set[int]]:
        """Return the partitions of each member of the group, by its client id."""
        group = self._admin.describe_consumer_groups([GROUP])[GROUP].result(KAFKA_SECONDS)
        return {
            member.client_id: {where.partition for where in member.assignment.topic_partitions}
            for member in group.members
        }


class Replica:
    """One process of `mail-service consume`."""

    def __init__(self, environment: Environment, log: Path) -> None:
        self._log = log
        self._read_from = 0
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                [COMMAND, "consume"], env=environment, stdout=output, stderr=subprocess.STDOUT
            )

    @property
    def pid(self) -> int:
        """Return the process id, which is part of the replica's name."""
        return self.process.pid

    def forget(self) -> None:
        """Take the log so far for another test's."""
        self._read_from = self._log.stat().st_size

    def logged(self) -> list[Row]:
        """Return the log so far."""
        whole = self._log.read_bytes()[self._read_from :].rpartition(b"\n")[0]
        return [json.loads(line) for line in whole.splitlines() if line.startswith(b"{")]

    def output(self) -> str:
        """Return the end of what the process wrote."""
        return self._log.read_text(encoding="utf-8")[-3000:]

    def wait_until_placed(self, partitions: int = PARTITIONS) -> None:
        """Return when this replica reads so many partitions."""
        wait_for(
            lambda: sum(line.get("event") == "partition.placed" for line in self.logged()),
            lambda count: count >= partitions or self.process.poll() is not None,
        )
        assert self.process.poll() is None, self.output()

    def terminate(self) -> int:
        """SIGTERM it and return its exit code."""
        self.process.terminate()
        return self.process.wait(STOP_SECONDS)

    def kill(self) -> None:
        """SIGKILL it, which works on a stopped process as well."""
        with suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        self.process.wait(STOP_SECONDS)


class Replicas:
    """Starts replicas; none outlives the test."""

    def __init__(self, environment: Environment, directory: Path) -> None:
        self._environment = environment
        self._directory = directory
        self._started: list[Replica] = []

    def __enter__(self) -> Self:
        """Nothing runs yet."""
        return self

    def __exit__(self, *_: object) -> None:
        """Stop what still runs."""
        self.stop()

    def running(self) -> Replica | None:
        """Return the replica started last, when it still runs."""
        last = self._started[-1] if self._started else None
        return last if last and last.process.poll() is None else None

    def stop(self) -> None:
        """End what still runs, in an orderly way so that the group forgets it at once."""
        for replica in self._started:
            if replica.process.poll() is None:
                replica.process.terminate()
        for replica in self._started:
            try:
                replica.process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                replica.kill()

    def start(self, **changes: str) -> Replica:
        """Start one."""
        log = self._directory / f"replica-{len(self._started)}.log"
        replica = Replica({**self._environment, **changes}, log)
        self._started.append(replica)
        return replica


def order(number: int | str, **changes: object) -> Row:
    """Return a record of an order, as the order service writes it but for its headers."""
    order_id = f"order-{number}"
    value = {
        "orderId": order_id,
        "userId": "user-7",
        "amount": "57000",
        "email": f"customer-{number}@example.com",
        **changes,
    }
    return {"key": order_id, "value": json.dumps(value)}


def orders(count: int) -> list[Row]:
    """Return records of so many orders, order-0 and up."""
    return [order(number) for number in range(count)]


def ids(records: Sequence[Row]) -> set[str]:
    """Return the orders of records."""
    return {json.loads(record["value"])["orderId"] for record in records}


def mailed(sink: Sink) -> Counter[str | None]:
    """Return how many mails of each order the relay accepted."""
    return Counter(mail.order_id for mail in sink.accepted())


def once(records: list[Row]) -> Counter[str | None]:
    """Return one mail for each order."""
    return Counter(ids(records))


def wait_until_sent(ledger: Ledger, count: int, replica: Replica) -> None:
    """Return when so many mails are SENT; fail as soon as the replica has ended."""

    def is_good(states: dict[str, int]) -> bool:
        assert replica.process.poll() is None, replica.output()
        return states.get("SENT") == count

    wait_for(ledger.states, is_good)
