"""What integration tests share: the ledger as rows, the topic, the real command."""

import hashlib
import json
import os
import pty
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, Self, TypeVar
from urllib.error import HTTPError
from urllib.request import urlopen

from confluent_kafka import (
    ConsumerGroupTopicPartitions,
    KafkaException,
    Producer,
    TopicCollection,
    TopicPartition,
)
from confluent_kafka.admin import (
    AdminClient,
    AlterConfigOpType,
    ConfigEntry,
    ConfigResource,
    NewTopic,
    OffsetSpec,
    ResourceType,
)
from forked import Forked
from records import Row
from sink import Sink
from sqlalchemy import Engine, text

from mail_service.kafka import GROUP, TOPIC

Environment = dict[str, str]
T = TypeVar("T")

COMMAND = Path(sys.executable).with_name("mail-service")
PARTITIONS = 3
TABLES = ("deliveries", "campaigns", "dead_letters", "positions", "replicas", "gaps")
CLOSED = ("SENT", "ERASED")
POLL_SECONDS = 0.05
LEADER_ATTEMPTS = 20
WAIT_SECONDS = 30.0
KAFKA_SECONDS = 10.0
STOP_SECONDS = 10.0


def run(
    environment: Environment, *arguments: str, told: str = ""
) -> subprocess.CompletedProcess[str]:
    """Run a command of the service to its end, with what it is told on standard input."""
    return subprocess.run(
        [COMMAND, *arguments],
        env=environment,
        input=told,
        capture_output=True,
        text=True,
        check=False,
    )


class Operator:
    """Somebody without a terminal who runs commands of the service."""

    def __init__(self, environment: Environment, forked: Forked) -> None:
        self._environment = environment
        self.forked = forked

    def run(
        self, *arguments: object, told: str = "", **changes: str
    ) -> subprocess.CompletedProcess[str]:
        """Run a command to its end, with changes of the environment."""
        with TemporaryFile() as said, TemporaryFile() as out, TemporaryFile() as error:
            said.write(told.encode())
            said.seek(0)
            environment, words = {**self._environment, **changes}, list(map(str, arguments))
            code = self.forked.run(words, environment, [said, out, error])
            seen = [file.seek(0) or file.read().decode() for file in (out, error)]
        return subprocess.CompletedProcess(words, code, *seen)

    def ask(self, *arguments: object, code: int = 0, **changes: str) -> Any:
        """Return the one JSON document of a command that ends with this code."""
        ended = self.run(*arguments, "--json", **changes)
        assert ended.returncode == code, ended.stderr
        return json.loads(ended.stdout)

    def at_once(self, *commands: Sequence[object]) -> list[subprocess.CompletedProcess[str]]:
        """Run commands at the same time to their ends."""
        with ThreadPoolExecutor(len(commands)) as threads:
            return list(threads.map(lambda command: self.run(*command), commands))

    def begin(self, *arguments: object) -> subprocess.Popen[bytes]:
        """Start a command whose end is not waited for."""
        return subprocess.Popen(
            [COMMAND, *map(str, arguments)],
            env=self._environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    def at_a_terminal(self, *arguments: object, told: str = "") -> tuple[int, str]:
        """Run a command on a terminal and return its code, and all that was seen there."""
        ours, theirs = pty.openpty()
        with subprocess.Popen(
            [COMMAND, *map(str, arguments)],
            env={**self._environment, "TERM": "xterm"},
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
        ) as process:
            os.close(theirs)
            os.write(ours, told.encode())
            seen = b""
            # The kernel says EIO when nobody is left at the other end.
            with suppress(OSError):
                while more := os.read(ours, 65536):
                    seen += more
        os.close(ours)
        return process.returncode, seen.decode()


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
        for table in TABLES:
            self.change(f"DELETE FROM {table}")
        self.change("UPDATE control SET is_paused = false, reason = NULL, tokens = 0")

    def change(self, statement: str, **values: object) -> int:
        """Run a statement in a transaction of its own; return how many rows it hit."""
        with self.engine.begin() as connection:
            return connection.execute(text(statement), values).rowcount

    def put(self, order_id: str, state: str = "SENT", **changes: object) -> None:
        """Put a mail there, as if it had been taken in from somewhere."""
        now = datetime.now(UTC)
        row = {
            "kind": "order-confirmation",
            "order_id": order_id,
            "campaign": "",
            "state": state,
            "message_id": f"<order-confirmation.{order_id}@shop.example>",
            "event": None if state in CLOSED else event_of(order_id),
            "event_at": now,
            "topic_id": "elsewhere",
            "partition": 0,
            "offset": 0,
            "give_up_at": now + timedelta(hours=1),
            "attempts": 1,
            "sent_at": now if state == "SENT" else None,
            **changes,
        }
        self._insert("deliveries", row)

    def put_letter(self, value: bytes | None, **changes: object) -> int:
        """Put a dead letter there and return its id."""
        row = {
            "topic_id": "elsewhere",
            "partition": 0,
            "offset": len(self.dead_letters()),
            "key": None,
            "value": value,
            "value_sha256": hashlib.sha256(value or b"").hexdigest(),
            "headers": "[]",
            "reason": "not JSON: ValueError",
            **changes,
        }
        self._insert("dead_letters", row)
        return int(self.rows("SELECT max(id) AS id FROM dead_letters")[0]["id"])

    def read_up_to(self, topic: "Topic", next_offsets: Mapping[int, int]) -> None:
        """Have partitions of the topic taken in up to these offsets."""
        for partition, next_offset in next_offsets.items():
            row = {
                "cluster_id": topic.cluster_id(),
                "topic_id": topic.id(),
                "partition": partition,
                "next_offset": next_offset,
            }
            self._insert("positions", row)

    def take_in(
        self, topic: "Topic", records: Sequence[Row], *, state: str = "SENT", **changes: object
    ) -> dict[str, tuple[int, int]]:
        """Write records to the topic and have their mails in a state; return where they are."""
        places = topic.place(records)
        topic_id = topic.id()
        for record in records:
            order_id = json.loads(record["value"])["orderId"]
            partition, offset = places[order_id]
            where = {"topic_id": topic_id, "partition": partition, "offset": offset}
            kept = {} if state in CLOSED else {"event": record["value"].encode()}
            self.put(order_id, state, **{**where, **kept, **changes})
        self.change("DELETE FROM positions")
        self.read_up_to(topic, topic.ends())
        return places

    def _insert(self, table: str, row: Row) -> None:
        names = ", ".join(f'"{name}"' for name in row)
        values = ", ".join(f":{name}" for name in row)
        self.change(f"INSERT INTO {table} ({names}) VALUES ({values})", **row)

    def everything(self) -> dict[str, list[Row]]:
        """Return every table, so that it can be said that nothing changed."""
        return {name: self.rows(f"SELECT * FROM {name}") for name in (*TABLES, "control")}

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
        self._bootstrap_servers = bootstrap_servers
        self._admin = AdminClient({"bootstrap.servers": bootstrap_servers})
        self._producer = self._new_producer()

    def _new_producer(self) -> Producer:
        return Producer({"bootstrap.servers": self._bootstrap_servers, "linger.ms": 0})

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
        # One that has heard there is no topic refuses records for a while.
        self._producer = self._new_producer()

    def configure(self, settings: dict[str, str]) -> None:
        """Change settings of the topic."""
        entries = [
            ConfigEntry(name, value, incremental_operation=AlterConfigOpType.SET)
            for name, value in settings.items()
        ]
        asked = ConfigResource(ResourceType.TOPIC, TOPIC, incremental_configs=entries)
        self._admin.incremental_alter_configs([asked])[asked].result(KAFKA_SECONDS)

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

    def place(self, records: Iterable[Row]) -> dict[str, tuple[int, int]]:
        """Write records one after the other and return where each order's is."""
        return {json.loads(each["value"])["orderId"]: self.send([each])[0] for each in records}

    def id(self) -> str:
        """Return the topic's id."""
        asked = TopicCollection([TOPIC])
        found = self._admin.describe_topics(asked)[TOPIC].result(KAFKA_SECONDS)
        return str(found.topic_id)

    def cluster_id(self) -> str:
        """Return the cluster's id."""
        return str(self._admin.describe_cluster().result(KAFKA_SECONDS).cluster_id)

    def delete_before(self, partition: int, offset: int) -> None:
        """Let a partition's first records expire."""
        where = TopicPartition(TOPIC, partition, offset)
        self._admin.delete_records([where])[where].result(KAFKA_SECONDS)

    def ends(self) -> dict[int, int]:
        """Return the end offset of each partition, once each has a leader."""
        asked = {TopicPartition(TOPIC, number): OffsetSpec.latest() for number in range(PARTITIONS)}
        for attempt in range(LEADER_ATTEMPTS):
            found = self._admin.list_offsets(asked)
            try:
                return {
                    where.partition: end.result(KAFKA_SECONDS).offset
                    for where, end in found.items()
                }
            except KafkaException:
                if attempt == LEADER_ATTEMPTS - 1:
                    raise
                time.sleep(POLL_SECONDS)
        return {}

    def commits(self) -> dict[int, int]:
        """Return the group's committed offsets."""
        asked = ConsumerGroupTopicPartitions(GROUP)
        found = self._admin.list_consumer_group_offsets([asked])[GROUP].result(KAFKA_SECONDS)
        return {where.partition: where.offset for where in found.topic_partitions}

    def rewind(self, offset: int = 0) -> None:
        """Set the group's commits, to the start, which needs a group without members."""
        starts = [TopicPartition(TOPIC, number, offset) for number in range(PARTITIONS)]
        asked = ConsumerGroupTopicPartitions(GROUP, starts)

        def set_back() -> list[TopicPartition]:
            done = self._admin.alter_consumer_group_offsets([asked])[GROUP].result(KAFKA_SECONDS)
            return [where for where in done.topic_partitions if where.error]

        # A cluster that is new has nobody yet who keeps the commits.
        wait_for(set_back, lambda errors: not errors)

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

    def status(self, probe: str) -> int:
        """Return what a probe answers."""
        (port,) = (line["port"] for line in self.logged() if line["event"] == "probes.served")
        try:
            with urlopen(f"http://127.0.0.1:{port}/{probe}", timeout=STOP_SECONDS) as answer:
                return int(answer.status)
        except HTTPError as error:
            with error:
                return error.code

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


def event_of(order_id: str, **changes: object) -> bytes:
    """Return an order's event, as in a record's value."""
    event = {"orderId": order_id, "userId": "u", "amount": "1", "email": f"{order_id}@example.com"}
    return json.dumps(event | changes).encode()


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


def run_until_sent(replicas: Replicas, ledger: Ledger, count: int) -> None:
    """Let a replica work until so many mails are SENT, and end it."""
    replica = replicas.start()
    wait_until_sent(ledger, count, replica)
    replica.terminate()
