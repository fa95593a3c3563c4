"""The order service on parts that can be broken: proxies before broker and database, failpoints.

Relays and the API are started by the tests, each with what it is to suffer.
"""

import subprocess
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psycopg2
from confluent_kafka import Consumer, TopicCollection, TopicPartition
from confluent_kafka.admin import AdminClient, OffsetSpec
from psycopg2.extensions import connection

from deploy.embedded.infrastructure import Addresses, add_infrastructure
from deploy.embedded.ports import HOST, Ports
from deploy.embedded.services import ORDER_SERVICE, add_pair
from deploy.embedded.stack import Stack
from tests.support import backlog
from tests.support.proxy import Pass, Proxy
from tests.support.service import Service, run_command, running_service
from tests.support.world import eventually

TOPIC = "order-created"
PARTITIONS = (0, 1, 2)
# Without an ACL everybody may do everything: a test can take a right away.
BROKER_SETTINGS = {
    "authorizer.class.name": "org.apache.kafka.metadata.authorizer.StandardAuthorizer",
    "allow.everyone.if.no.acl.found": "true",
}
JOBS = ("order-migrate", "order-topics", "order-products")
TABLES = ("order_items", "orders", "outbox", "idempotency_keys", "readback_positions")
ADMIN_SECONDS = 10.0
SILENCE_SECONDS = 10.0
# The ways of a state while nothing is lost.
FORWARD = {("INIT", "PUBLISHED"), ("INIT", "COMPLETED"), ("PUBLISHED", "COMPLETED")}
_NOTE_MOVES = """
    CREATE TABLE moves (id uuid, was text, became text);
    CREATE FUNCTION note_moves() RETURNS trigger LANGUAGE plpgsql AS $$
        BEGIN
            INSERT INTO moves SELECT id, earlier.state, later.state
                                FROM earlier JOIN later USING (id);
            RETURN NULL;
        END $$;
    CREATE TRIGGER note_moves AFTER UPDATE ON outbox
        REFERENCING OLD TABLE AS earlier NEW TABLE AS later
        FOR EACH STATEMENT EXECUTE FUNCTION note_moves();
"""


@dataclass(frozen=True, slots=True)
class Seen:
    """A record of the topic as any consumer sees it."""

    partition: int
    offset: int
    order_id: str
    event_id: str


@dataclass
class OrderSide:
    """The order service's parts while they are up; `kafka` and `database` are their proxies."""

    stack: Stack
    ports: Ports
    addresses: Addresses
    environment: dict[str, str]
    kafka: Proxy
    database: Proxy
    _begun_at: dict[int, int] = field(default_factory=dict)
    _started: int = 0

    def reset(self) -> None:
        """Empty the tables, mend the links, and let the read-back begin where the topic ends."""
        for proxy in (self.kafka, self.database):
            proxy.triggers = []
            proxy.set(Pass())
        with self.session() as session, session, session.cursor() as cursor:
            for table in TABLES:
                cursor.execute(f"DELETE FROM {table}")
        topic_id, self._begun_at = self._describe()
        with self.session() as session, session, session.cursor() as cursor:
            for partition, end in self._begun_at.items():
                cursor.execute(
                    "INSERT INTO readback_positions VALUES (%s, %s, %s)",
                    (topic_id, partition, end),
                )

    @contextmanager
    def session(self) -> Iterator[connection]:
        """Open a session of our own, past the proxy."""
        url = self.addresses.order_database_url.replace("+psycopg2", "")
        with closing(psycopg2.connect(url)) as opened:
            yield opened

    def sql(self, statement: str, *values: object) -> list[tuple[Any, ...]]:
        """Run a statement in a transaction of its own; return its rows."""
        with self.session() as session, session, session.cursor() as cursor:
            cursor.execute(statement, values)
            return cursor.fetchall() if cursor.description else []

    def add_orders(self, count: int, *, padding_bytes: int = 0) -> list[str]:
        """Add orders with their events in INIT; return the order ids."""
        with self.session() as session, session:
            return backlog.insert(session, count, padding_bytes=padding_bytes)

    def states(self) -> Counter[str]:
        """Return how many events there are in each state."""
        return Counter(dict(self.sql("SELECT state, count(*) FROM outbox GROUP BY state")))

    def wait_until_completed(self, *, seconds: float = 30.0) -> None:
        """Wait until every event is COMPLETED."""
        eventually(lambda: set(self.states()) <= {"COMPLETED"}, within_seconds=seconds)

    def records(self) -> list[Seen]:
        """Read what came into the topic since the reset, with a group that nobody has used."""
        _, ends = self._describe()
        return self.read({number: self._begun_at.get(number, 0) for number in ends}, ends)

    def read(self, starts: dict[int, int], ends: dict[int, int]) -> list[Seen]:
        """Read the topic between these offsets."""
        wanted = sum(ends[partition] - start for partition, start in starts.items())
        properties = {"bootstrap.servers": f"{HOST}:{self.kafka.port}", "group.id": "test"}
        with closing(Consumer({**properties, "auto.offset.reset": "error"})) as consumer:
            consumer.assign([TopicPartition(TOPIC, *where) for where in starts.items()])
            records: list[Seen] = []
            while len(records) < wanted:
                found = consumer.consume(wanted - len(records), SILENCE_SECONDS)
                assert found, f"only {len(records)} of {wanted} records came"
                for message in found:
                    assert message.error() is None, message.error()
                    headers = {name: bytes(value).decode() for name, value in message.headers()}
                    records.append(
                        Seen(
                            message.partition(),
                            message.offset(),
                            headers["ce_subject"],
                            headers["ce_id"],
                        )
                    )
            return records

    def command(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run an operator's command to its end."""
        return run_command(ORDER_SERVICE, self.environment, *arguments, check=check)

    @contextmanager
    def running(
        self, role: str, *failpoints: str, is_waited_for: bool = True, **environment: str
    ) -> Iterator[Service]:
        """Run a relay or an API until the block ends, with failpoints and settings of its own."""
        self._started += 1
        with running_service(
            self.stack.state,
            self.ports,
            f"{role}-{self._started}",
            [str(ORDER_SERVICE), role],
            {**self.environment, **environment},
            *failpoints,
            is_waited_for=is_waited_for,
        ) as service:
            yield service

    def active_relay(self) -> str | None:
        """Return the application name (PGAPPNAME) of the session that holds the relays' lock."""
        rows = self.sql(
            "SELECT application_name FROM pg_locks JOIN pg_stat_activity USING (pid)"
            " WHERE locktype = 'advisory' AND objsubid = 2 AND granted"
            " AND (classid, objid) = (28530, 27769)"
        )
        return str(rows[0][0]) if rows else None

    @contextmanager
    def moves(self) -> Iterator[Callable[[], Counter[tuple[str, str]]]]:
        """Have the database note which way states went, until the block ends; give the counts."""
        self.sql(_NOTE_MOVES)
        try:
            yield lambda: Counter(
                {
                    (was, became): count
                    for was, became, count in self.sql(
                        "SELECT was, became, count(*) FROM moves GROUP BY was, became"
                    )
                }
            )
        finally:
            self.sql("DROP TABLE moves; DROP FUNCTION note_moves() CASCADE")

    def _describe(self) -> tuple[str, dict[int, int]]:
        """Return the topic's id, and where each partition ends."""
        admin = AdminClient({"bootstrap.servers": f"{HOST}:{self.kafka.port}"})
        topics = admin.describe_topics(TopicCollection([TOPIC]), request_timeout=ADMIN_SECONDS)
        topic = topics[TOPIC].result(ADMIN_SECONDS)
        asked = [TopicPartition(TOPIC, number) for number in range(len(topic.partitions))]
        ends = admin.list_offsets(
            dict.fromkeys(asked, OffsetSpec.latest()), request_timeout=ADMIN_SECONDS
        )
        return str(topic.topic_id), {
            where.partition: end.result(ADMIN_SECONDS).offset for where, end in ends.items()
        }

    def wait_for(self, is_so: Callable[[], object], *, seconds: float = 30.0) -> None:
        """Wait until something is so."""
        eventually(is_so, within_seconds=seconds)


@contextmanager
def running(root: Path) -> Iterator[OrderSide]:
    """Start broker and database behind their proxies, with schema, topic and products."""
    ports = Ports(use_defaults=False)
    kafka_port, database_port = ports.choose(0), ports.choose(0)
    with (
        Proxy(port=kafka_port) as kafka,
        Proxy(port=database_port) as database,
        Stack(root) as stack,
    ):
        addresses = add_infrastructure(
            stack,
            ports,
            ("kafka", "order-db", "mail-db"),
            broker_settings={
                **BROKER_SETTINGS,
                "advertised.listeners": f"PLAINTEXT://{HOST}:{kafka_port}",
            },
        )
        pair = add_pair(stack, ports, addresses, app_env="test", mail_replicas=0)
        kafka.target = int(addresses.kafka_bootstrap_servers.rpartition(":")[2])
        url = addresses.order_database_url
        database.target = int(url.rpartition(":")[2].partition("/")[0])
        stack.start("kafka", "order-db", *JOBS)
        yield OrderSide(
            stack,
            ports,
            addresses,
            {
                **pair.order_environment,
                "KAFKA_BOOTSTRAP_SERVERS": f"{HOST}:{kafka_port}",
                "DATABASE_URL": url.replace(f":{database.target}/", f":{database_port}/"),
            },
            kafka,
            database,
        )


def order_ids(records: Sequence[Seen]) -> Counter[str]:
    """Return how many records each order has."""
    return Counter(record.order_id for record in records)
