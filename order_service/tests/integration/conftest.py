import contextlib
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any
from uuid import UUID

import jwt
import pytest
from confluent_kafka import Consumer, Message, Producer, TopicPartition
from confluent_kafka.admin import (
    AdminClient,
    AlterConfigOpType,
    ConfigEntry,
    ConfigResource,
    ResourceType,
)
from flask import Flask
from sqlalchemy import Connection, Engine, Row, insert, text
from uuid_utils.compat import uuid7

from order_service import catalogue, cli, events, outbox
from order_service.app import create_app
from order_service.kafka import TOPIC, TOPIC_SETTINGS, KafkaUnavailable, Publisher, Reader, Topic
from order_service.models import OutboxRow, db, make_engine
from order_service.operate.products import read
from order_service.operate.token import KEY_ID, signing_key
from order_service.readback import ReadBack
from order_service.relay import LOCK_KEYS, Relay, publish_batch
from order_service.settings import Settings

COMMAND = Path(sys.executable).with_name("order-service")
PRODUCTS = Path(__file__).parents[3] / "deploy/products.csv"
TIMEOUT_SECONDS = 120
PATIENCE_SECONDS = 15.0
TABLES = ("products", "order_items", "orders", "outbox", "idempotency_keys", "readback_positions")

Query = Callable[..., Sequence[Row[Any]]]
WaitUntil = Callable[..., Any]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Give the tests in this folder the time that real parts take."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.timeout(TIMEOUT_SECONDS))


@pytest.fixture(scope="session")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Give the variables of a service on real parts; without them nothing here can run."""
    needed = ("ORDER_DATABASE_URL", "KAFKA_BOOTSTRAP_SERVERS")
    if missing := [name for name in needed if name not in os.environ]:
        pytest.exit(
            f"{' and '.join(missing)} not set: these tests need PostgreSQL and Kafka. Run them by\n"
            "python -m deploy.embedded with --fresh kafka,order-db -- "
            "python -m pytest order_service/tests/integration",
            returncode=pytest.ExitCode.USAGE_ERROR,
        )
    return {
        "APP_ENV": "test",
        "DATABASE_URL": os.environ["ORDER_DATABASE_URL"],
        "KAFKA_BOOTSTRAP_SERVERS": os.environ["KAFKA_BOOTSTRAP_SERVERS"],
        "AUTH_ISSUER": "urn:order-service:test",
        "AUTH_AUDIENCE": "order-service",
        "AUTH_JWKS": str(tmp_path_factory.mktemp("keys") / "jwks.json"),
    }


@pytest.fixture(scope="session")
def settings(environment: dict[str, str]) -> Settings:
    """Give the settings read from that environment."""
    return Settings.from_environment(environment)


@pytest.fixture(scope="session")
def start(environment: dict[str, str]) -> Callable[..., "subprocess.Popen[str]"]:
    """Give a function that starts the real command."""

    def popen(*arguments: str, **changed: str) -> "subprocess.Popen[str]":
        return subprocess.Popen(
            [COMMAND, *arguments],
            env={"PATH": os.environ["PATH"], **environment, **changed},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    return popen


@pytest.fixture(scope="session")
def run(
    start: Callable[..., "subprocess.Popen[str]"],
) -> Callable[..., "subprocess.CompletedProcess[str]"]:
    """Give a function that runs the real command to its end."""

    def finish(*arguments: str, **changed: str) -> "subprocess.CompletedProcess[str]":
        with start(*arguments, **changed) as process:
            out, err = process.communicate(timeout=60)
        return subprocess.CompletedProcess(arguments, process.returncode, out, err)

    return finish


@pytest.fixture
def command(
    environment: dict[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., "subprocess.CompletedProcess[str]"]:
    """Give a function that runs a command to its end in this process, which takes no second."""

    def finish(*arguments: str, **changed: str) -> "subprocess.CompletedProcess[str]":
        with monkeypatch.context() as patch:
            for name, value in {**environment, **changed}.items():
                patch.setitem(os.environ, name, value)
            patch.setattr(sys, "argv", ["order-service", *arguments])
            # What an API in this process has logged is not the command's.
            capsys.readouterr()
            with pytest.raises(SystemExit) as ended:
                cli.main()
        out, err = capsys.readouterr()
        return subprocess.CompletedProcess(arguments, ended.value.code or 0, out, err)

    return finish


@pytest.fixture(scope="session")
def engine(
    settings: Settings, run: Callable[..., "subprocess.CompletedProcess[str]"]
) -> Iterator[Engine]:
    """Give an engine on the migrated database."""
    run("migrate").check_returncode()
    engine = make_engine(settings.database_url)
    yield engine
    engine.dispose()


@pytest.fixture(scope="module")
def app(settings: Settings, engine: Engine) -> Iterator[Flask]:
    """Give the application on the real database."""
    app = create_app(settings)
    yield app
    with app.app_context():
        db.engine.dispose()


@pytest.fixture(scope="module")
def bearer(settings: Settings) -> Callable[[str], dict[str, str]]:
    """Give a function that authorizes a user."""
    key = signing_key(Path(settings.auth_jwks))

    def authorize(user: str) -> dict[str, str]:
        claims = {
            "iss": settings.auth_issuer,
            "aud": settings.auth_audience,
            "sub": user,
            "scope": "orders:read orders:write",
            "exp": int(time.time()) + 600,
        }
        token = jwt.encode(claims, key, algorithm="RS256", headers={"kid": KEY_ID})
        return {"Authorization": f"Bearer {token}"}

    return authorize


@pytest.fixture(scope="session")
def products() -> list[catalogue.CatalogueEntry]:
    """Give the shop's products."""
    with PRODUCTS.open(encoding="utf-8", newline="") as file:
        return read(file, currency="KRW")[0]


@pytest.fixture(autouse=True)
def fresh_tables(engine: Engine, products: list[catalogue.CatalogueEntry]) -> None:
    """Start every test with the products and nothing else."""
    with engine.begin() as connection:
        for table in TABLES:
            # A TRUNCATE makes files anew, which takes longer than most of the tests.
            connection.execute(text(f"DELETE FROM {table}"))
        catalogue.load(connection, products, currency="KRW")


@pytest.fixture
def query(engine: Engine) -> Query:
    """Give a function that runs a statement of its own and returns its rows."""

    def fetch(statement: str, **parameters: Any) -> Sequence[Row[Any]]:
        with engine.begin() as connection:
            result = connection.execute(text(statement), parameters)
            return result.all() if result.returns_rows else []

    return fetch


@pytest.fixture
def autocommit(engine: Engine) -> Iterator[Connection]:
    """Give a connection like the relay's."""
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        yield connection


@pytest.fixture(scope="session")
def wait_until() -> WaitUntil:
    """Give a function that asks until the answer is true, and returns it."""

    def ask(question: Callable[[], Any], *, seconds: float = PATIENCE_SECONDS) -> Any:
        deadline = time.monotonic() + seconds
        while not (answer := question()):
            if time.monotonic() > deadline:
                pytest.fail(f"not so within {seconds:g} s")
            time.sleep(0.01)
        return answer

    return ask


@pytest.fixture(scope="session")
def topic(settings: Settings, run: Callable[..., "subprocess.CompletedProcess[str]"]) -> Topic:
    """Give the topic, made by the real command; what tests leave in it stays."""
    run("topics", "ensure").check_returncode()
    return Topic(settings.kafka)


@pytest.fixture(scope="session")
def admin(settings: Settings) -> AdminClient:
    """Give a plain administrator's client."""
    return AdminClient(dict(settings.kafka))


@pytest.fixture
def create_topic(topic: Topic, wait_until: WaitUntil) -> Callable[[], None]:
    """Give a function that makes the topic, when it was deleted, and waits until it is usable."""

    def is_usable() -> bool:
        try:
            topic.ensure()
            topic.bounds(range(topic.describe().partitions))
        except KafkaUnavailable:
            return False
        return True

    return lambda: wait_until(is_usable)


@pytest.fixture
def delete_topic(
    admin: AdminClient,
    topic: Topic,
    create_topic: Callable[[], None],
    wait_until: WaitUntil,
) -> Iterator[Callable[[], None]]:
    """Give a function that deletes the topic; after the test it is there again."""

    def is_gone() -> bool:
        try:
            topic.describe()
        except KafkaUnavailable:
            return True
        return False

    def delete() -> None:
        admin.delete_topics([TOPIC])[TOPIC].result(10)
        wait_until(is_gone)

    yield delete
    create_topic()


@pytest.fixture
def alter_topic(admin: AdminClient, topic: Topic) -> Iterator[Callable[..., None]]:
    """Give a function that gives the topic another setting, until the test's end."""

    def alter(name: str, value: str, operation: AlterConfigOpType = AlterConfigOpType.SET) -> None:
        entry = ConfigEntry(name, value, incremental_operation=operation)
        resource = ConfigResource(ResourceType.TOPIC, TOPIC, incremental_configs=[entry])
        admin.incremental_alter_configs([resource])[resource].result(10)

    yield alter
    alter("message.timestamp.after.max.ms", "", AlterConfigOpType.DELETE)
    for declared in {**TOPIC_SETTINGS, "min.insync.replicas": "1"}.items():
        alter(*declared)


@pytest.fixture
def ends(topic: Topic) -> Callable[[], dict[int, int]]:
    """Give a function that tells where each partition ends now."""
    return lambda: {
        partition: bounds.end
        for partition, bounds in topic.bounds(range(topic.describe().partitions)).items()
    }


@pytest.fixture
def records_since(
    settings: Settings, ends: Callable[[], dict[int, int]]
) -> Callable[[Mapping[int, int]], list[Message]]:
    """Give a function that reads with a plain consumer what came after these ends."""

    def read_all(before: Mapping[int, int]) -> list[Message]:
        now = ends()
        missing = sum(now.values()) - sum(before.values())
        consumer = Consumer({**settings.kafka, "group.id": "test"})
        consumer.assign([TopicPartition(TOPIC, *where) for where in before.items()])
        records = consumer.consume(missing, PATIENCE_SECONDS) if missing else []
        consumer.close()
        assert not [record.error() for record in records if record.error()]
        return records

    return read_all


@pytest.fixture
def produce(settings: Settings) -> Callable[..., None]:
    """Give a function by which somebody else writes to the topic."""
    producer = Producer(dict(settings.kafka))

    def send(value: bytes = b"{}", headers: Sequence[tuple[str, bytes]] = ()) -> None:
        producer.produce(TOPIC, value=value, headers=list(headers))
        assert producer.flush(10) == 0

    return send


@pytest.fixture
def add_event(engine: Engine) -> Callable[..., UUID]:
    """Give a function that adds the event of an order, with columns as named, to the outbox."""

    def add(*, connection: Connection | None = None, **columns: Any) -> UUID:
        event_id = columns.pop("id", None) or uuid7()
        order = events.PlacedOrder(
            id=uuid7(),
            user_id="user-7",
            email="minji@example.com",
            locale="ko",
            currency="KRW",
            amount=Decimal(24000),
            ordered_at=datetime.now(UTC),
            items=[events.Item("TEA-GREEN-50", "보성 녹차 50g", 2, Decimal(12000))],
        )
        event = events.order_created(order, event_id=event_id)
        statement = insert(OutboxRow).values(
            {
                "id": event_id,
                "aggregatetype": events.AGGREGATE_TYPE,
                "aggregateid": event.key,
                "type": events.TYPE,
                "payload": event.value,
                "headers": event.headers,
                "occurred_at": event.occurred_at,
                **columns,
            }
        )
        if connection is None:
            with engine.begin() as own:
                own.execute(statement)
        else:
            connection.execute(statement)
        return event_id

    return add


@pytest.fixture
def row_of(query: Query) -> Callable[[UUID], Any]:
    """Give a function that returns an event's row."""
    return lambda event_id: query("SELECT * FROM outbox WHERE id = :id", id=event_id)[0]


@pytest.fixture
def publisher(settings: Settings) -> Publisher:
    """Give a publisher that nobody tells to stop."""
    return Publisher(settings.kafka, threading.Event())


@pytest.fixture
def publish(autocommit: Connection, publisher: Publisher, topic: Topic) -> Callable[[], None]:
    """Give a function that publishes one batch as the active relay does."""

    def one_batch() -> None:
        publish_batch(autocommit, publisher, topic_id=topic.describe().id)

    return one_batch


@pytest.fixture
def caught_up(engine: Engine, topic: Topic, ends: Callable[[], dict[int, int]]) -> None:
    """Let the read-back have read all that earlier tests left in the topic."""
    with engine.begin() as connection:
        outbox.complete(connection, topic_id=topic.describe().id, seen={}, next_offsets=ends())


@pytest.fixture
def make_readback(engine: Engine, settings: Settings) -> Callable[[Topic], ReadBack]:
    """Give a function that builds the read-back as the command does."""
    return lambda topic: ReadBack(
        engine=engine,
        topic=topic,
        make_reader=lambda described: Reader(settings.kafka, described, role="read-back"),
    )


@pytest.fixture
def start_relay(
    settings: Settings, query: Query, topic: Topic
) -> Iterator[Callable[..., tuple[threading.Event, "Future[None]"]]]:
    """Give a function that runs a relay in a thread; what ended a relay ends the test."""
    with ThreadPoolExecutor() as pool, contextlib.ExitStack() as ending:

        def begin(
            topic: Topic = topic,
            companion: Callable[[], AbstractContextManager[None]] = contextlib.nullcontext,
            session_engine: Engine | None = None,
        ) -> tuple[threading.Event, "Future[None]"]:
            stop = threading.Event()
            relay = Relay(
                engine=session_engine or make_engine(settings.database_url),
                topic=topic,
                publisher=Publisher(settings.kafka, stop),
                companion=companion,
                stop=stop,
            )
            future = pool.submit(relay.run)
            ending.callback(future.result, PATIENCE_SECONDS)
            # Woken, it need not wait for its next poll to find that it is to stop.
            ending.callback(query, outbox.WAKE_RELAY)
            ending.callback(stop.set)
            return stop, future

        yield begin


@pytest.fixture
def active_session(query: Query) -> Callable[[], int | None]:
    """Give a function that tells which database session holds the relay's lock."""

    def holder() -> int | None:
        rows = query(
            "SELECT pid FROM pg_locks WHERE locktype = 'advisory' AND granted"
            " AND classid = :first AND objid = :second AND objsubid = 2",
            **LOCK_KEYS,
        )
        return rows[0].pid if rows else None

    return holder


@pytest.fixture
def free_port() -> Callable[[], int]:
    """Give a function that finds a port nobody listens on."""

    def find() -> int:
        with socket.create_server(("127.0.0.1", 0)) as server:
            port: int = server.getsockname()[1]
            return port

    return find
