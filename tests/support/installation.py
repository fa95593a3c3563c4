"""The pair as those who run it have it: parts to stop and start, backups, a shell with commands.

The API is always up; relay and replicas are started by the tests, each as a process of its own.
The SMTP relay wants a password, and journals what it accepts.
"""

import itertools
import os
import signal
import subprocess
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import httpx
import psycopg2
from confluent_kafka import (
    ConsumerGroupTopicPartitions,
    Producer,
    TopicCollection,
    TopicPartition,
)
from confluent_kafka.admin import AdminClient, OffsetSpec

from deploy.embedded.infrastructure import add_infrastructure
from deploy.embedded.ports import Ports
from deploy.embedded.services import MAIL_SERVICE, ORDER_SERVICE, add_pair
from deploy.embedded.shell import write_shell
from deploy.embedded.stack import Stack
from tests.support import backlog, mail_side, order_side
from tests.support.backup import back_up, put_back
from tests.support.records import Row
from tests.support.service import Service, running_service
from tests.support.sink import Settings, Sink
from tests.support.world import World, eventually, place

TOPIC = "order-created"
GROUP = "mail-service"
PARTS = ("kafka", "order-db", "mail-db")
JOBS = ("order-migrate", "order-topics", "order-products", "mail-migrate")
KAFKA_SECONDS = 10.0
COMMAND_SECONDS = 90.0
PATIENCE_SECONDS = 60.0

RELAY_USER, PASSWORD = "shop", "correct-horse"
RELAY = Settings(user=RELAY_USER, password=PASSWORD, tls="starttls", is_tls_required=True)


@dataclass(frozen=True, slots=True)
class Done:
    """A line that was run in a shell."""

    line: str
    code: int
    out: str
    err: str


@dataclass(frozen=True)
class Installation(World):
    """The running pair, and what an operator may do to it."""

    ports: Ports
    admin: AdminClient
    password_file: Path
    customer: httpx.Client
    _up: ExitStack = field(default_factory=ExitStack)
    _services: list[Service] = field(default_factory=list)
    _number: Iterator[int] = field(default_factory=lambda: itertools.count(1))

    def reset(self) -> None:
        """End relay and replicas, empty both databases, make the topic anew, mend the relay."""
        for service in self._services:
            if service.part.is_running:
                service.signal(signal.SIGTERM)
        self._services.clear()
        self._up.close()
        self.password_file.write_text(f"{PASSWORD}\n")
        if not self.sink.is_running:
            self.sink.start()
        self.sink.forget()
        for table in order_side.TABLES:
            self.change_orders(f"DELETE FROM {table}")
        for table in mail_side.TABLES:
            self.change_ledger(f"DELETE FROM {table}")
        self.change_ledger("UPDATE control SET is_paused = false, reason = NULL, tokens = 0")
        self.delete_topic()
        self.sh("order-service topics ensure")

    # Its processes

    def relay(self) -> Service:
        """Start the order service's relay."""
        return self._start("relay", ORDER_SERVICE, "relay", self.pair.order_environment)

    def replica(self, *, is_waited_for: bool = True, **environment: str) -> Service:
        """Start a replica of the mail service, with settings of its own."""
        settings = {**self.pair.mail_environment, **environment}
        return self._start(
            "replica", MAIL_SERVICE, "consume", settings, is_waited_for=is_waited_for
        )

    def _start(
        self,
        name: str,
        program: Path,
        command: str,
        environment: Mapping[str, str],
        *,
        is_waited_for: bool = True,
    ) -> Service:
        service = self._up.enter_context(
            running_service(
                self.stack.state,
                self.ports,
                f"{name}-{next(self._number)}",
                [str(program), command],
                environment,
                is_waited_for=is_waited_for,
            )
        )
        self._services.append(service)
        return service

    def sh(self, line: str, **variables: str) -> Done:
        """Run a line as it stands, in a shell that has both services' commands."""
        root = self.stack.state.root
        done = subprocess.run(
            ["sh", "-uc", line],
            cwd=root,
            env={"PATH": f"{root / 'bin'}:{os.environ['PATH']}", **variables},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=COMMAND_SECONDS,
            check=False,
        )
        return Done(line, done.returncode, done.stdout, done.stderr)

    # Orders

    def place(self, count: int = 1, **changes: Any) -> list[str]:
        """Place so many orders; return their ids."""
        answers = [place(self.customer, **changes) for _ in range(count)]
        assert {answer.status_code for answer in answers} == {201}
        return [answer.json()["id"] for answer in answers]

    def add_orders(self, count: int) -> list[str]:
        """Add many orders with their events at once; return their ids."""
        with closing(psycopg2.connect(_plain(self.addresses.order_database_url))) as session:
            order_ids = backlog.insert(session, count)
            session.commit()
        return order_ids

    def make_older(self, order_ids: Sequence[str], by: timedelta) -> None:
        """Have orders been placed earlier, of which the relay does not know yet."""
        self.change_orders(
            """
            UPDATE outbox
               SET occurred_at = occurred_at - %s,
                   headers = jsonb_set(headers::jsonb, '{ce_time}',
                                       to_jsonb(to_char((occurred_at - %s) AT TIME ZONE 'UTC',
                                                'YYYY-MM-DD"T"HH24:MI:SS.US"Z"')))::json
             WHERE aggregateid = ANY(%s)
            """,
            by,
            by,
            list(order_ids),
        )

    def wait_until_completed(self, order_ids: Sequence[str]) -> None:
        """Wait until these orders' events were seen in the topic."""
        statement = (
            "SELECT count(*) FROM outbox WHERE state = 'COMPLETED' AND aggregateid = ANY(%s)"
        )
        self.wait_for(
            lambda: self.order_sql(statement, list(order_ids)) == [(len(order_ids),)],
        )

    def change_orders(self, statement: str, *values: object) -> int:
        """Change the order database past the service; return how many rows."""
        return _change(self.addresses.order_database_url, statement, values)

    def back_up_orders(self) -> Path:
        """Back the order database up, as it is at this moment."""
        return back_up(self.addresses.order_database_url, self.stack.state.root / "orders.dump")

    def restore_orders(self, backup: Path) -> None:
        """Put the order database back to what it was then."""
        put_back(self.addresses.order_database_url, backup)

    # Mails

    def states(self, order_ids: Sequence[str] | None = None) -> Counter[str]:
        """Return how many mails, of these orders or of all, there are in each state."""
        return Counter(
            state
            for order_id, state in self.mail_sql("SELECT order_id, state FROM deliveries")
            if order_ids is None or order_id in order_ids
        )

    def wait_until_sent(self, order_ids: Sequence[str]) -> None:
        """Wait until these orders' mails are SENT."""
        self.wait_for(lambda: self.states(order_ids) == {"SENT": len(order_ids)})

    def copies(self, order_ids: Iterable[str] | None = None) -> Counter[str | None]:
        """Return how many mails of each order, of these or of all, the relay has accepted."""
        found = Counter(mail.order_id for mail in self.sink.accepted())
        if order_ids is None:
            return found
        return Counter({order_id: found[order_id] for order_id in order_ids if found[order_id]})

    def change_ledger(self, statement: str, *values: object) -> int:
        """Change the ledger past the service; return how many rows."""
        return _change(self.addresses.mail_database_url, statement, values)

    def back_up_ledger(self) -> Path:
        """Back the ledger up, as it is at this moment."""
        return back_up(self.addresses.mail_database_url, self.stack.state.root / "ledger.dump")

    def restore_ledger(self, backup: Path) -> None:
        """Put the ledger back to what it was then."""
        put_back(self.addresses.mail_database_url, backup)

    # The topic

    def send(self, *records: Row) -> None:
        """Write records as any producer could."""
        errors: list[object] = []
        producer = Producer({"bootstrap.servers": self.addresses.kafka_bootstrap_servers})
        for record in records:
            producer.produce(
                TOPIC, on_delivery=lambda error, _: error and errors.append(error), **record
            )
        assert producer.flush(KAFKA_SECONDS) == 0
        assert errors == []

    def delete_topic(self) -> None:
        """Delete the topic, as far as it is there."""
        if self._partitions():
            self.admin.delete_topics([TOPIC])[TOPIC].result(KAFKA_SECONDS)
            self.wait_for(lambda: not self._partitions())

    def expire(self, order_id: str) -> tuple[int, int]:
        """Let an order's record expire, and those before it; return partition and offset."""
        row = self.outbox(order_id)
        where = TopicPartition(TOPIC, row["partition"], row["offset"] + 1)
        self.admin.delete_records([where])[where].result(KAFKA_SECONDS)
        return row["partition"], row["offset"]

    def ends(self) -> dict[int, int]:
        """Return where each partition ends."""
        asked = [TopicPartition(TOPIC, number) for number in self._partitions()]
        found = self.admin.list_offsets(dict.fromkeys(asked, OffsetSpec.latest()))
        return {where.partition: end.result(KAFKA_SECONDS).offset for where, end in found.items()}

    def commits(self) -> dict[int, int]:
        """Return the committed offsets of the mail service's group."""
        asked = ConsumerGroupTopicPartitions(GROUP)
        found = self.admin.list_consumer_group_offsets([asked])[GROUP].result(KAFKA_SECONDS)
        return {where.partition: where.offset for where in found.topic_partitions}

    def wait_until_read(self) -> None:
        """Wait until the mail service has read all there is."""
        statement = "SELECT partition, next_offset FROM positions WHERE topic_id = %s"
        ends, topic_id = self.ends(), self.topic_id()
        self.wait_for(lambda: dict(self.mail_sql(statement, topic_id)) == ends)

    def topic_id(self) -> str:
        """Return the topic's id, which none of this name made later has."""
        topics = self.admin.describe_topics(TopicCollection([TOPIC]))
        return str(topics[TOPIC].result(KAFKA_SECONDS).topic_id)

    def _partitions(self) -> list[int]:
        topics = self.admin.list_topics(timeout=KAFKA_SECONDS).topics
        return sorted(topics[TOPIC].partitions) if TOPIC in topics else []

    def wait_for(self, is_so: Callable[[], object], *, seconds: float = PATIENCE_SECONDS) -> None:
        """Wait until something is so."""
        eventually(is_so, within_seconds=seconds)

    def logs(self) -> Iterator[Path]:
        """Yield every log file of the run."""
        return (self.stack.state.root / "logs").glob("*")


@contextmanager
def running(root: Path) -> Iterator[Installation]:
    """Start everything but relay and replicas."""
    ports = Ports(use_defaults=False)
    with ExitStack() as up:
        sink = up.enter_context(Sink(root / "sink", settings=RELAY))
        stack = up.enter_context(Stack(root / "stack"))
        addresses = add_infrastructure(stack, ports, PARTS)
        addresses = replace(addresses, smtp_port=sink.port)
        pair = add_pair(stack, ports, addresses, app_env="test", mail_replicas=0)
        password_file = stack.state.root / "relay-password"
        mail = {
            **pair.mail_environment,
            "SMTP_TLS": "starttls",
            "SMTP_USER": RELAY_USER,
            "SMTP_PASSWORD_FILE": str(password_file),
            "SSL_CERT_FILE": str(sink.authority),
        }
        pair = replace(pair, mail_environment=mail)
        password_file.write_text(f"{PASSWORD}\n")
        write_shell(stack.state.root, pair, addresses)
        stack.start(*PARTS, *JOBS, "order-api")
        world = World(stack, sink, addresses, pair)
        installation = Installation(
            **vars(world),
            ports=ports,
            admin=AdminClient({"bootstrap.servers": addresses.kafka_bootstrap_servers}),
            password_file=password_file,
            customer=up.enter_context(world.client("customer")),
        )
        with installation._up:
            yield installation


def table(text: str) -> list[dict[str, str]]:
    """Return the rows of a table that a command printed for people."""
    head, *lines = text.partition("\n\n")[0].splitlines()
    starts = [
        place
        for place in range(len(head))
        if head[place] != " " and (not place or head[place - 1] == " ")
    ]
    spans = list(itertools.zip_longest(starts, starts[1:]))
    return [
        {head[start:end].strip(): line[start:end].strip() for start, end in spans} for line in lines
    ]


def _change(url: str, statement: str, values: Sequence[object]) -> int:
    with closing(psycopg2.connect(_plain(url))) as session, session, session.cursor() as cursor:
        cursor.execute(statement, values or None)
        return int(cursor.rowcount)


def _plain(url: str) -> str:
    return url.replace("+psycopg2", "")
