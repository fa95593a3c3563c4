"""Real parts: PostgreSQL, Kafka, and the sink as relay."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from forked import Forked
from harness import Environment, Ledger, Operator, Replicas, Topic, run
from sink import Sink
from sqlalchemy import Engine

from mail_service.models import make_engine

ADDRESSES = ("MAIL_DATABASE_URL", "KAFKA_BOOTSTRAP_SERVERS")


def pytest_configure() -> None:
    """End at once when the parts are not there: a skipped test would prove nothing."""
    if missing := [name for name in ADDRESSES if not os.environ.get(name)]:
        pytest.exit(
            f"{' and '.join(missing)} not set: these tests need real parts, as in\n"
            "  .venv/tools/bin/python -m deploy.embedded with --fresh kafka,mail-db --"
            " .venv/mail/bin/python -m pytest mail_service/tests/integration",
            returncode=pytest.ExitCode.USAGE_ERROR,
        )


@pytest.fixture(scope="session")
def base_environment() -> Environment:
    """Return the environment of the service, its relay apart, on a migrated database."""
    environment = {
        **{name: text for name, text in os.environ.items() if not name.startswith("KAFKA_")},
        "APP_ENV": "test",
        "DATABASE_URL": os.environ["MAIL_DATABASE_URL"],
        "KAFKA_BOOTSTRAP_SERVERS": os.environ["KAFKA_BOOTSTRAP_SERVERS"],
        "SMTP_HOST": "127.0.0.1",
        "SMTP_PORT": "1",
        "SMTP_TLS": "off",
        "MAIL_FROM": "orders@shop.example",
        "MAIL_CONCURRENCY": "8",
        "MAIL_ONLY_TO": "*",
        "SHOP_NAME": "Tea House",
        "SHOP_URL": "https://shop.example",
    }
    migrated = run(environment, "migrate")
    assert migrated.returncode == 0, migrated.stderr
    return environment


@pytest.fixture(scope="session")
def session_engine(base_environment: Environment) -> Iterator[Engine]:
    """Open the ledger's database."""
    engine = make_engine(
        base_environment["DATABASE_URL"].replace("postgresql://", "postgresql+psycopg2://")
    )
    yield engine
    engine.dispose()


@pytest.fixture
def ledger_rows(session_engine: Engine) -> Ledger:
    """Return the ledger, emptied."""
    ledger = Ledger(session_engine)
    ledger.clear()
    return ledger


@pytest.fixture
def engine(ledger_rows: Ledger) -> Engine:
    """Return an engine on the emptied ledger."""
    return ledger_rows.engine


@pytest.fixture(scope="session")
def session_sink(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sink]:
    """Run a relay whose 250 can be believed."""
    with Sink(tmp_path_factory.mktemp("sink")) as running:
        yield running


@pytest.fixture
def sink(session_sink: Sink) -> Sink:
    """Return the relay with an empty journal and no rules."""
    session_sink.forget()
    if not session_sink.is_running:
        session_sink.start()
    return session_sink


@pytest.fixture(scope="session")
def environment(base_environment: Environment, session_sink: Sink) -> Environment:
    """Return the environment of the service with the sink as its relay."""
    return {**base_environment, "SMTP_PORT": str(session_sink.port)}


@pytest.fixture(scope="session")
def operator(
    environment: Environment, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Operator]:
    """Return somebody who runs commands."""
    with Forked(tmp_path_factory.mktemp("forked")) as forked:
        yield Operator(environment, forked)


@pytest.fixture(scope="session")
def session_topic() -> Topic:
    """Return the topic, which may not exist, of a cluster that keeps commits."""
    topic = Topic(os.environ["KAFKA_BOOTSTRAP_SERVERS"])
    if not topic.exists():
        topic.create()
    topic.rewind()
    return topic


@pytest.fixture
def topic(session_topic: Topic) -> Topic:
    """Return the topic, new and empty."""
    session_topic.recreate()
    return session_topic


@pytest.fixture
def replicas(
    environment: Environment, sink: Sink, ledger_rows: Ledger, topic: Topic, tmp_path: Path
) -> Iterator[Replicas]:
    """Start replicas of the real command; none outlives the test."""
    with Replicas(environment, tmp_path) as replicas:
        yield replicas
