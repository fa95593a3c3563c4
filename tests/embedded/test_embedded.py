"""The embedded stack, with real parts: they answer, come back, and keep what they had."""

import re
import smtplib
import socket
import time
from collections.abc import Iterator
from email.message import EmailMessage
from pathlib import Path

import httpx
import psycopg2
import pytest
from confluent_kafka import Consumer, Producer
from confluent_kafka.admin import AdminClient
from confluent_kafka.cimpl import NewTopic

from deploy.embedded.infrastructure import Addresses, add_infrastructure
from deploy.embedded.ports import HOST, Ports, is_answering
from deploy.embedded.stack import Phase, Stack
from tests.support.world import eventually

BACK_SECONDS = 60.0
ANSWER_SECONDS = 20.0


@pytest.fixture(scope="module")
def running(root: Path) -> Iterator[tuple[Stack, Addresses]]:
    """Give a stack with all parts up."""
    with Stack(root / "shared") as stack:
        addresses = add_infrastructure(stack, Ports(use_defaults=False))
        stack.start()
        yield stack, addresses


def test_a_record_produced_is_consumed(running: tuple[Stack, Addresses]) -> None:
    """The broker keeps a topic that was created, and a group reads it."""
    bootstrap = running[1].kafka_bootstrap_servers
    create_topic(bootstrap, "greetings")
    produce(bootstrap, "greetings", b"hello")
    assert consume(bootstrap, "greetings") == b"hello"


def test_a_topic_nobody_created_does_not_exist(running: tuple[Stack, Addresses]) -> None:
    """A misspelt topic is an error and not a new topic."""
    client = AdminClient({"bootstrap.servers": running[1].kafka_bootstrap_servers})
    client.list_topics("misspelt", timeout=ANSWER_SECONDS)
    assert "misspelt" not in client.list_topics(timeout=ANSWER_SECONDS).topics


@pytest.mark.parametrize("service", ["order", "mail"])
def test_a_service_owns_its_database_and_is_no_superuser(
    running: tuple[Stack, Addresses], service: str
) -> None:
    """The role of the address creates tables in its own database, and nothing else."""
    addresses = running[1]
    urls = {"order": addresses.order_database_url, "mail": addresses.mail_database_url}
    url = urls[service]
    query = "SELECT current_user, current_database(), rolsuper FROM pg_roles WHERE rolname = %s"
    role = f"{service}_service"
    execute(url, "CREATE TABLE owned (id int)")
    assert execute(url, query, role) == (role, role, False)


def test_a_database_wants_the_password(running: tuple[Stack, Addresses]) -> None:
    """A connection without the generated password is refused."""
    url = running[1].order_database_url
    wrong = re.sub(r":[^:@]+@", ":guess@", url)
    with pytest.raises(psycopg2.OperationalError, match="password authentication failed"):
        execute(wrong, "SELECT 1")


def test_a_mail_sent_by_smtp_is_in_the_inbox(running: tuple[Stack, Addresses]) -> None:
    """What the SMTP port accepts, the inbox's API lists."""
    addresses = running[1]
    send_mail(addresses, "Your order 4711")
    eventually(lambda: "Your order 4711" in subjects(addresses), within_seconds=15)


def test_killed_parts_come_back_with_port_and_data(running: tuple[Stack, Addresses]) -> None:
    """A kill -9 of broker and database costs neither the records nor the rows."""
    stack, addresses = running
    bootstrap, url = addresses.kafka_bootstrap_servers, addresses.order_database_url
    create_topic(bootstrap, "kept")
    produce(bootstrap, "kept", b"still here")
    execute(url, "CREATE TABLE kept AS SELECT 42 AS answer")
    before = {name: stack.part(name).pid for name in ("kafka", "order-db")}
    for name in before:
        stack.kill(name)
    for name, pid in before.items():
        stack.wait_ready(name, BACK_SECONDS)
        assert stack.part(name).pid != pid
    assert consume(bootstrap, "kept") == b"still here"
    assert execute(url, "SELECT answer FROM kept") == (42,)


def test_a_part_stopped_on_purpose_stays_stopped(running: tuple[Stack, Addresses]) -> None:
    """Nobody restarts what was stopped, until somebody starts it."""
    stack, addresses = running
    stack.stop("inbox")
    time.sleep(1.5)
    assert stack.phases["inbox"] is Phase.STOPPED
    assert not is_answering(addresses.smtp_port)
    stack.start("inbox")
    assert is_answering(addresses.smtp_port)


def test_a_part_killed_without_restart_stays_down(running: tuple[Stack, Addresses]) -> None:
    """An outage lasts as long as the test that asked for it wants."""
    stack, _ = running
    stack.kill("mail-db", restart=False)
    time.sleep(1.5)
    assert not stack.part("mail-db").is_running
    stack.start("mail-db")
    assert stack.part("mail-db").is_running


def test_a_second_start_finds_the_data_of_the_first(root: Path) -> None:
    """State outlives the stack, the passwords included."""
    urls = []
    for statement in ("CREATE TABLE kept AS SELECT 42 AS answer", "SELECT answer FROM kept"):
        with Stack(root / "twice") as stack:
            addresses = add_infrastructure(stack, Ports(use_defaults=False), ["order-db"])
            stack.start()
            urls.append(addresses.order_database_url)
            answer = execute(addresses.order_database_url, statement)
    assert answer == (42,)
    assert urls[0].partition("@")[0] == urls[1].partition("@")[0]


def test_a_taken_port_is_avoided() -> None:
    """The default is taken when free, and never handed out twice."""
    free = Ports(use_defaults=False).choose(0)
    with socket.socket() as server:
        server.bind((HOST, free))
        server.listen()
        assert Ports().choose(free) != free
    ports = Ports()
    assert ports.choose(free) == free
    assert ports.choose(free) != free


def create_topic(bootstrap: str, topic: str) -> None:
    """Create a topic of one partition."""
    client = AdminClient({"bootstrap.servers": bootstrap})
    client.create_topics([NewTopic(topic, num_partitions=1)])[topic].result(ANSWER_SECONDS)


def produce(bootstrap: str, topic: str, value: bytes) -> None:
    """Produce one record and wait until the broker has it."""
    producer = Producer({"bootstrap.servers": bootstrap, "acks": "all"})
    producer.produce(topic, value)
    assert producer.flush(ANSWER_SECONDS) == 0


def consume(bootstrap: str, topic: str) -> bytes | None:
    """Return the first record of a topic, as a member of a new group."""
    settings = {"bootstrap.servers": bootstrap, "auto.offset.reset": "earliest"}
    consumer = Consumer({**settings, "group.id": f"{topic}-{time.time_ns()}"})
    consumer.subscribe([topic])
    try:
        record = consumer.poll(ANSWER_SECONDS)
        return record.value() if record and not record.error() else None
    finally:
        consumer.close()


def execute(url: str, statement: str, *values: str) -> tuple[object, ...] | None:
    """Run one statement as a service would and return its first row."""
    connection = psycopg2.connect(url.replace("+psycopg2", ""))
    try:
        with connection, connection.cursor() as cursor:
            cursor.execute(statement, values)
            return cursor.fetchone() if cursor.description else None
    finally:
        connection.close()


def send_mail(addresses: Addresses, subject: str) -> None:
    """Send a mail to the inbox."""
    mail = EmailMessage()
    mail["From"], mail["To"], mail["Subject"] = "shop@example.com", "a@example.com", subject
    mail.set_content("Thank you.")
    with smtplib.SMTP(addresses.smtp_host, addresses.smtp_port, timeout=5) as client:
        client.send_message(mail)


def subjects(addresses: Addresses) -> list[str]:
    """Return the subjects of the mails in the inbox."""
    response = httpx.get(f"{addresses.inbox_url}/api/messages/", timeout=5)
    return [mail["subject"] for mail in response.json()["data"]]
