"""The mail service on parts that can be broken: a scripted relay, proxies, failpoints.

Replicas are started by the tests, each with what it is to suffer.
"""

import subprocess
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg2
import psycopg2.extras
from confluent_kafka import ConsumerGroupTopicPartitions, Producer, TopicPartition
from confluent_kafka.admin import AdminClient, NewTopic, OffsetSpec
from psycopg2.extensions import connection

from deploy.embedded.infrastructure import Addresses, add_infrastructure
from deploy.embedded.ports import HOST, Ports
from deploy.embedded.services import MAIL_SERVICE, add_pair
from deploy.embedded.stack import Stack
from tests.support import backup
from tests.support.proxy import Pass, Proxy
from tests.support.records import Row
from tests.support.service import Service, begun_command, run_command, running_service
from tests.support.sink import Accepted, Sink
from tests.support.world import eventually

TOPIC = "order-created"
GROUP = "mail-service"
PARTITIONS = 3
SLOTS = 8
# A replica claims as many more as it has slots.
MOST_IN_HAND = 2 * SLOTS
# Of the test profile: earlier than this after a lost answer nothing is resent.
UNKNOWN_DELAY_SECONDS = 2.0
TABLES = ("deliveries", "campaigns", "dead_letters", "positions", "replicas", "gaps")
KAFKA_SECONDS = 10.0
TOPIC_SETTINGS = {
    # A producer may write any time stamp, as before Kafka 4.0.
    "message.timestamp.after.max.ms": str(2**63 - 1),
    # 63 days, as declared: last month's orders do not expire in the middle of a test.
    "retention.ms": "5443200000",
}


def members_of_the_group(admin: AdminClient) -> dict[str, set[int]]:
    """Return the partitions of each member, by its client id (name-host-pid)."""
    group = admin.describe_consumer_groups([GROUP])[GROUP].result(KAFKA_SECONDS)
    return {
        member.client_id: {where.partition for where in member.assignment.topic_partitions}
        for member in group.members
    }


@dataclass
class MailSide:
    """The mail service's parts while they are up; `kafka`, `database`, `smtp` are their proxies."""

    stack: Stack
    ports: Ports
    addresses: Addresses
    environment: dict[str, str]
    kafka: Proxy
    database: Proxy
    smtp: Proxy
    sink: Sink
    _admin: AdminClient
    _started: int = 0

    def reset(self, *, partitions: int = PARTITIONS) -> None:
        """Empty the ledger, mend the links, forget the relay's rules, and make the topic anew."""
        for proxy in (self.kafka, self.database, self.smtp):
            proxy.triggers = []
            proxy.set(Pass())
        if not self.sink.is_running:
            self.sink.start()
        self.sink.forget()
        for table in TABLES:
            self.sql(f"DELETE FROM {table}")
        self.sql("UPDATE control SET is_paused = false, tokens = 0")
        self.recreate_topic(partitions=partitions)

    # The ledger

    @contextmanager
    def session(self) -> Iterator[connection]:
        """Open a session of our own, past the proxy."""
        with closing(psycopg2.connect(self._url)) as opened:
            yield opened

    def sql(self, statement: str, *values: object) -> list[Row]:
        """Run a statement in a transaction of its own; return its rows."""
        factory = psycopg2.extras.RealDictCursor
        with (
            self.session() as session,
            session,
            session.cursor(cursor_factory=factory) as cursor,
        ):
            cursor.execute(statement, values or None)
            return [dict(row) for row in cursor.fetchall()] if cursor.description else []

    def states(self) -> Counter[str]:
        """Return how many mails there are in each state."""
        rows = self.sql("SELECT state, count(*) AS count FROM deliveries GROUP BY state")
        return Counter({row["state"]: row["count"] for row in rows})

    def mails(self) -> dict[str, Row]:
        """Return the ledger's rows by order id."""
        return {row["order_id"]: row for row in self.sql("SELECT * FROM deliveries")}

    def dead_letters(self) -> list[Row]:
        """Return the dead letters in the order of the log."""
        return self.sql('SELECT * FROM dead_letters ORDER BY partition, "offset"')

    def positions(self) -> dict[int, int]:
        """Return the next offset of each partition of the present topic."""
        rows = self.sql("SELECT partition, next_offset FROM positions ORDER BY partition")
        return {row["partition"]: row["next_offset"] for row in rows}

    def dump(self) -> Path:
        """Back the ledger up, as it is at this moment."""
        return backup.back_up(self._url, self.stack.state.root / "ledger.dump")

    def restore(self, dump: Path) -> None:
        """Put the ledger back to what it was then."""
        backup.put_back(self._url, dump)

    def lose_ledger(self) -> None:
        """Leave a database without a table."""
        for row in self.sql("SELECT tablename FROM pg_tables WHERE schemaname = 'public'"):
            self.sql(f"DROP TABLE {row['tablename']} CASCADE")

    @property
    def _url(self) -> str:
        return self.addresses.mail_database_url.replace("+psycopg2", "")

    # The topic

    def recreate_topic(self, *, partitions: int = PARTITIONS) -> None:
        """Make the topic anew, and with it its id."""
        if self._partitions():
            self._admin.delete_topics([TOPIC])[TOPIC].result(KAFKA_SECONDS)
            eventually(lambda: not self._partitions(), within_seconds=KAFKA_SECONDS)
        new = NewTopic(TOPIC, partitions, 1, config=TOPIC_SETTINGS)
        self._admin.create_topics([new])[TOPIC].result(KAFKA_SECONDS)
        eventually(lambda: len(self._partitions()) == partitions, within_seconds=KAFKA_SECONDS)

    def send(self, records: Iterable[Row]) -> list[tuple[int, int]]:
        """Write records as any producer could; return partition and offset of each."""
        reports: list[tuple[int, int]] = []

        def note(error: object, message: Any) -> None:
            assert error is None, error
            reports.append((message.partition(), message.offset()))

        producer = Producer({"bootstrap.servers": f"{HOST}:{self.kafka.port}", "linger.ms": 0})
        for record in records:
            producer.produce(TOPIC, on_delivery=note, **record)
            producer.poll(0)
        assert producer.flush(KAFKA_SECONDS) == 0
        return reports

    def ends(self) -> dict[int, int]:
        """Return where each partition ends."""
        asked = [TopicPartition(TOPIC, number) for number in self._partitions()]
        found = self._admin.list_offsets(dict.fromkeys(asked, OffsetSpec.latest()))
        return {where.partition: end.result(KAFKA_SECONDS).offset for where, end in found.items()}

    def expire_before(self, partition: int, offset: int) -> None:
        """Let a partition's first records expire."""
        where = TopicPartition(TOPIC, partition, offset)
        self._admin.delete_records([where])[where].result(KAFKA_SECONDS)

    def commits(self) -> dict[int, int]:
        """Return the group's committed offsets."""
        asked = ConsumerGroupTopicPartitions(GROUP)
        found = self._admin.list_consumer_group_offsets([asked])[GROUP].result(KAFKA_SECONDS)
        return {where.partition: where.offset for where in found.topic_partitions}

    def forget_group(self) -> None:
        """Delete the group and its commits, which needs a group without members."""
        self._admin.delete_consumer_groups([GROUP])[GROUP].result(KAFKA_SECONDS)

    def members(self) -> dict[str, set[int]]:
        """Return the partitions of each member of the group, by its client id (name-host-pid)."""
        return members_of_the_group(self._admin)

    def _partitions(self) -> list[int]:
        """Return the numbers of the topic's partitions; none when it is not there."""
        topics = self._admin.list_topics(timeout=KAFKA_SECONDS).topics
        return sorted(topics[TOPIC].partitions) if TOPIC in topics else []

    # The relay

    def copies(self) -> Counter[str | None]:
        """Return how many mails of each order the relay has accepted."""
        return Counter(mail.order_id for mail in self.sink.accepted())

    def accepted_of(self, fault_at: float) -> list[Accepted]:
        """Return what was accepted up to a fault, and the dots that were on their way then.

        These arrive after it; resends do not before the delay.
        """
        return [m for m in self.sink.accepted() if m.at < fault_at + UNKNOWN_DELAY_SECONDS]

    def unexplained(self, *, accepted: Iterable[Accepted], sent: Iterable[str]) -> list[str | None]:
        """Return orders with more copies than faults explain.

        `accepted` is what the relay had journaled, and `sent` the orders that the ledger called
        SENT, both read at the moment of the fault: only mails that were accepted and not yet
        SENT then may come once more, each.
        """
        open_then = Counter(mail.order_id for mail in accepted)
        for order_id in sent:
            open_then.pop(order_id, None)
        return [
            order_id
            for order_id, copies in self.copies().items()
            if copies > 1 + (order_id in open_then)
        ]

    # The replicas

    @contextmanager
    def running(
        self, *failpoints: str, is_waited_for: bool = True, **environment: str
    ) -> Iterator[Service]:
        """Run a replica until the block ends, with failpoints and settings of its own."""
        self._started += 1
        with running_service(
            self.stack.state,
            self.ports,
            f"mail-{self._started}",
            [str(MAIL_SERVICE), "consume"],
            {**self.environment, **environment},
            *failpoints,
            is_waited_for=is_waited_for,
        ) as service:
            yield service

    def command(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run an operator's command to its end."""
        return run_command(MAIL_SERVICE, self.environment, *arguments, check=check)

    @contextmanager
    def begun(self, *arguments: str) -> Iterator[subprocess.Popen[str]]:
        """Begin an operator's command; one that has not ended with the block is killed."""
        with begun_command(MAIL_SERVICE, self.environment, *arguments) as process:
            yield process

    def wait_for(self, is_so: Callable[[], object], *, seconds: float = 30.0) -> None:
        """Wait until something is so."""
        eventually(is_so, within_seconds=seconds)

    def wait_until_sent(self, count: int, *, seconds: float = 30.0) -> None:
        """Wait until so many mails are SENT."""
        self.wait_for(lambda: self.states()["SENT"] == count, seconds=seconds)


@contextmanager
def running(root: Path) -> Iterator[MailSide]:
    """Start broker, ledger and relay behind their proxies, with the schema."""
    ports = Ports(use_defaults=False)
    kafka_port, database_port = ports.choose(0), ports.choose(0)
    with ExitStack() as up:
        kafka = up.enter_context(Proxy(port=kafka_port))
        database = up.enter_context(Proxy(port=database_port))
        sink = up.enter_context(Sink(root / "sink"))
        smtp = up.enter_context(Proxy(sink.port))
        stack = up.enter_context(Stack(root))
        addresses = add_infrastructure(
            stack,
            ports,
            ("kafka", "order-db", "mail-db"),
            broker_settings={"advertised.listeners": f"PLAINTEXT://{HOST}:{kafka_port}"},
        )
        pair = add_pair(stack, ports, addresses, app_env="test", mail_replicas=0)
        kafka.target = int(addresses.kafka_bootstrap_servers.rpartition(":")[2])
        url = addresses.mail_database_url
        database.target = int(url.rpartition(":")[2].partition("/")[0])
        stack.start("kafka", "mail-db", "mail-migrate")
        yield MailSide(
            stack,
            ports,
            addresses,
            {
                **pair.mail_environment,
                "KAFKA_BOOTSTRAP_SERVERS": f"{HOST}:{kafka_port}",
                "DATABASE_URL": url.replace(f":{database.target}/", f":{database_port}/"),
                "SMTP_PORT": str(smtp.port),
                "MAIL_CONCURRENCY": str(SLOTS),
            },
            kafka,
            database,
            smtp,
            sink,
            AdminClient({"bootstrap.servers": f"{HOST}:{kafka_port}"}),
        )


def once(records: Iterable[Row]) -> Counter[str | None]:
    """Return one mail for each order, to compare with `copies`."""
    return Counter({record["key"] for record in records})
