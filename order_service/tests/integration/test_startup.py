"""What the service refuses to start on, and what it only waits for."""

import contextlib
import json
import re
import signal
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from typing import Any
from uuid import UUID

import pytest
from confluent_kafka.admin import (
    AdminClient,
    NewTopic,
)
from sqlalchemy import Engine, make_url

from order_service import startup
from order_service.kafka import PARTITIONS, TOPIC, TOPIC_SETTINGS, KafkaUnavailable, Topic
from order_service.settings import Settings
from order_service.startup import NEWEST_REVISION

STOP_SECONDS = 10.0
STAYS_SECONDS = 2.0
# BackendKeyData: its length 12, the process id, the secret.
BACKEND_KEY = re.compile(rb"K\x00\x00\x00\x0c....", re.DOTALL)

AddEvent = Callable[..., UUID]
RowOf = Callable[[UUID], Any]
Query = Callable[..., Any]
Run = Callable[..., "subprocess.CompletedProcess[str]"]
Start = Callable[..., "subprocess.Popen[str]"]
WaitUntil = Callable[..., Any]
StartProbed = Callable[..., tuple["subprocess.Popen[str]", Callable[[], int | None]]]


@pytest.fixture
def start_probed(start: Start, free_port: Callable[[], int]) -> Iterator[StartProbed]:
    """Give a function that starts a command, and one that asks whether it is ready."""
    with contextlib.ExitStack() as ending:

        def begin(
            command: str, **changed: str
        ) -> tuple["subprocess.Popen[str]", Callable[[], int | None]]:
            http, probe = free_port(), free_port()
            process = start(command, HTTP_PORT=str(http), PROBE_PORT=str(probe), **changed)
            ending.enter_context(process)
            ending.callback(process.kill)
            return process, lambda: readiness(probe)

        yield begin


def readiness(port: int) -> int | None:
    """Ask /readyz; None when nobody listens."""
    try:
        with socket.create_connection(("127.0.0.1", port), STOP_SECONDS) as connection:
            connection.sendall(b"GET /readyz HTTP/1.0\r\n\r\n")
            answer = connection.makefile("rb").readline().split()
    except OSError:
        return None
    return int(answer[1]) if answer else None


def logged(output: str) -> list[dict[str, Any]]:
    """Return what a process logged."""
    return [json.loads(line) for line in output.splitlines()]


# The database


@pytest.fixture
def altered_schema(query: Query) -> Iterator[Callable[[str], None]]:
    """Give a function that lets the schema be of another revision, until the test's end."""

    def alter(revision: str) -> None:
        query("UPDATE alembic_version SET version_num = :revision", revision=revision)

    yield alter
    alter(NEWEST_REVISION)


@pytest.fixture
def without_durability(query: Query, settings: Settings) -> Iterator[None]:
    """Let the sessions of our role not wait for the disk, until the test's end."""
    role = make_url(settings.database_url).username
    query(f'ALTER ROLE "{role}" SET synchronous_commit = off')
    yield
    query(f'ALTER ROLE "{role}" RESET synchronous_commit')


@pytest.mark.usefixtures("engine")
@pytest.mark.parametrize("command", ["api", "relay"])
def test_a_database_without_tables_is_refused(run: Run, settings: Settings, command: str) -> None:
    """Nobody migrated: the one line says by what to do it."""
    empty = make_url(settings.database_url).set(database="postgres")
    refused = run(command, DATABASE_URL=empty.render_as_string(hide_password=False))
    assert (refused.returncode, refused.stderr) == (
        3,
        "database: it has no tables yet; run `order-service migrate`\n",
    )


@pytest.mark.usefixtures("without_durability")
@pytest.mark.parametrize("command", ["api", "relay"])
def test_an_older_schema_and_a_disk_not_waited_for_are_refused(
    run: Run, altered_schema: Callable[[str], None], command: str
) -> None:
    """Each fault of the database is one line, so whoever mends one sees the other one too."""
    altered_schema("0001")
    refused = run(command)
    assert (refused.returncode, refused.stderr.splitlines()) == (
        3,
        [
            "database: synchronous_commit is off: an order answered 201 could be lost in a crash",
            (
                f"database: its schema is 0001, older than {NEWEST_REVISION};"
                " run `order-service migrate`"
            ),
        ],
    )


def test_a_port_that_is_taken_is_refused(run: Run) -> None:
    """A relay that nobody could probe does not start."""
    with socket.create_server(("0.0.0.0", 0)) as server:
        port = server.getsockname()[1]
        refused = run("relay", PROBE_PORT=str(port))
    assert (refused.returncode, refused.stderr.splitlines()[-1]) == (
        3,
        f"PROBE_PORT: {port} cannot be served",
    )


@pytest.mark.usefixtures("without_durability")
def test_a_database_that_does_not_wait_for_its_disk_is_refused(run: Run) -> None:
    """An order answered 201 must outlive a crash, however new the schema is."""
    refused = run("relay")
    assert (refused.returncode, refused.stderr) == (
        3,
        "database: synchronous_commit is off: an order answered 201 could be lost in a crash\n",
    )


def test_a_schema_without_a_revision_is_refused(engine: Engine) -> None:
    """A migration that was begun and never ended left no revision."""
    with engine.connect() as connection:
        connection.exec_driver_sql("DELETE FROM alembic_version")
        faults = startup.database_faults(connection)
    assert faults == [
        f"database: its schema is none, older than {NEWEST_REVISION}; run `order-service migrate`"
    ]


@pytest.mark.usefixtures("caught_up")
def test_a_newer_schema_is_accepted(
    start_probed: StartProbed,
    altered_schema: Callable[[str], None],
    add_event: AddEvent,
    row_of: RowOf,
    wait_until: WaitUntil,
) -> None:
    """The release before the newest one starts while the newest one is rolled out, and works."""
    altered_schema("0999")
    _, ask = start_probed("api")
    start_probed("relay")
    event_id = add_event()
    wait_until(lambda: row_of(event_id).state == "COMPLETED")
    wait_until(lambda: ask() == 200)


@pytest.mark.usefixtures("topic", "caught_up")
@pytest.mark.parametrize("command", ["api", "relay"])
def test_nobody_is_ready_while_the_schema_is_older(
    start_probed: StartProbed,
    altered_schema: Callable[[str], None],
    add_event: AddEvent,
    row_of: RowOf,
    wait_until: WaitUntil,
    command: str,
) -> None:
    """A database restored to an older release turns readiness red, the migration green."""
    process, ask = start_probed(command)
    if command == "relay":
        # A relay that took over only now would refuse the older schema, and end.
        event_id = add_event()
        wait_until(lambda: row_of(event_id).state == "COMPLETED")
    wait_until(lambda: ask() == 200)
    altered_schema("0001")
    wait_until(lambda: ask() == 503, seconds=5.0)
    altered_schema(NEWEST_REVISION)
    wait_until(lambda: ask() == 200, seconds=5.0)
    assert process.poll() is None


# The topic


@pytest.fixture
def make_topic(
    admin: AdminClient,
    topic: Topic,
    delete_topic: Callable[[], None],
    create_topic: Callable[[], None],
    wait_until: WaitUntil,
) -> Iterator[Callable[[int], None]]:
    """Give a function that makes the topic with other partitions, until the test's end."""

    def is_usable(partitions: int) -> bool:
        with contextlib.suppress(KafkaUnavailable):
            return len(topic.bounds(range(topic.describe().partitions))) == partitions
        return False

    def make(partitions: int) -> None:
        delete_topic()
        new = NewTopic(TOPIC, partitions, 1, config=TOPIC_SETTINGS)
        admin.create_topics([new])[TOPIC].result(10)
        wait_until(lambda: is_usable(partitions))

    yield make
    delete_topic()
    create_topic()


OTHER_SETTINGS = {
    "cleanup.policy": ("compact", "cleanup.policy=compact instead of delete"),
    "retention.ms": ("604800000", "retention.ms=604800000, less than 5443200000"),
    "min.insync.replicas": ("2", "min.insync.replicas=2 with replication 1"),
}


@pytest.mark.parametrize("name", OTHER_SETTINGS)
def test_a_topic_with_another_setting_is_at_fault(
    topic: Topic, alter_topic: Callable[..., None], name: str
) -> None:
    """The fault names the setting, as it is and as it should be."""
    value, fault = OTHER_SETTINGS[name]
    alter_topic(name, value)
    assert topic.check().faults == [fault]


def test_a_topic_with_other_settings_is_refused(
    run: Run, alter_topic: Callable[..., None], add_event: AddEvent, row_of: RowOf
) -> None:
    """A topic that could lose an event is not published to; each fault is one line."""
    for name, (value, _) in OTHER_SETTINGS.items():
        alter_topic(name, value)
    event_id = add_event()
    refused = run("relay")
    assert (refused.returncode, refused.stderr.splitlines(), row_of(event_id).state) == (
        3,
        [f"topic order-created: {fault}" for _, fault in OTHER_SETTINGS.values()],
        "INIT",
    )


@pytest.mark.parametrize(("name", "value"), [("retention.ms", "-1"), ("segment.ms", "3600000")])
def test_a_topic_that_keeps_more_is_accepted(
    topic: Topic, alter_topic: Callable[..., None], name: str, value: str
) -> None:
    """Kept for ever is kept long enough, and the segments are the operator's."""
    alter_topic(name, value)
    assert topic.check().faults == []


def test_a_topic_with_fewer_partitions_is_refused(
    run: Run, make_topic: Callable[[int], None], add_event: AddEvent, row_of: RowOf
) -> None:
    """The relay publishes nothing there: partitions that are added later move the keys."""
    make_topic(PARTITIONS - 1)
    event_id = add_event()
    refused = run("relay")
    assert (refused.returncode, refused.stderr, row_of(event_id).state) == (
        3,
        "topic order-created: 2 partitions instead of 3\n",
        "INIT",
    )


def test_a_topic_with_more_partitions_is_warned_of(
    start_probed: StartProbed,
    make_topic: Callable[[int], None],
    add_event: AddEvent,
    query: Query,
    wait_until: WaitUntil,
) -> None:
    """Events go to all partitions and are seen in all of them."""
    make_topic(PARTITIONS + 1)
    for _ in range(40):
        add_event()
    process, _ = start_probed("relay")
    wait_until(lambda: not query("SELECT FROM outbox WHERE state <> 'COMPLETED'"))
    process.send_signal(signal.SIGTERM)
    lines = logged(process.communicate(timeout=STOP_SECONDS)[0])
    assert (
        process.returncode,
        [line["what"] for line in lines if line["event"] == "topic.differs"],
        [row.partition for row in query("SELECT DISTINCT partition FROM outbox ORDER BY 1")],
    ) == (0, ["4 partitions instead of 3"], [0, 1, 2, 3])


@pytest.mark.fault("F-K7")
def test_a_missing_topic_is_waited_for_and_made_by_nobody(
    start_probed: StartProbed,
    delete_topic: Callable[[], None],
    admin: AdminClient,
    run: Run,
    add_event: AddEvent,
    row_of: RowOf,
    wait_until: WaitUntil,
) -> None:
    """The relay is not ready and leaves the topic to `topics ensure`; then its rows go out."""
    delete_topic()
    event_id = add_event()
    process, ask = start_probed("relay")
    wait_until(lambda: ask() == 503)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(STAYS_SECONDS)
    waiting = (ask(), row_of(event_id).state, TOPIC in admin.list_topics(timeout=10).topics)
    run("topics", "ensure").check_returncode()
    wait_until(lambda: row_of(event_id).state == "COMPLETED")
    wait_until(lambda: ask() == 200)
    assert waiting == (503, "INIT", False)


# Somebody between us and the database


@pytest.fixture
def pooled_url(settings: Settings) -> Iterator[str]:
    """Give the database's address behind somebody who tells another process id, as a pooler."""
    url = make_url(settings.database_url)
    server = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = server.accept()
                database = socket.create_connection((url.host, url.port))
                for source, target in ((client, database), (database, client)):
                    is_answer = source is database
                    arguments = (source, target, is_answer)
                    threading.Thread(target=pass_on, args=arguments, daemon=True).start()

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    behind = url.set(host="127.0.0.1", port=server.getsockname()[1])
    yield behind.render_as_string(hide_password=False)
    server.shutdown(socket.SHUT_RDWR)
    thread.join()
    server.close()


def pass_on(source: socket.socket, target: socket.socket, is_answer: bool) -> None:  # noqa: FBT001
    """Pass bytes on until either side hangs up; the server's process id becomes 1."""
    with source, contextlib.suppress(OSError):
        while data := source.recv(65536):
            if is_answer:
                data = BACKEND_KEY.sub(lambda found: found[0][:5] + b"\0\0\0\1", data, count=1)
            target.sendall(data)
        target.shutdown(socket.SHUT_RDWR)


@pytest.fixture
def warnings_of_a_relay(
    caught_up: None,
    start_probed: StartProbed,
    add_event: AddEvent,
    row_of: RowOf,
    wait_until: WaitUntil,
) -> Callable[[str], list[str]]:
    """Give a function that lets a relay publish over an address and returns its warnings."""

    def work(database_url: str) -> list[str]:
        event_id = add_event()
        process, _ = start_probed("relay", DATABASE_URL=database_url)
        wait_until(lambda: row_of(event_id).state == "COMPLETED")
        process.send_signal(signal.SIGTERM)
        lines = logged(process.communicate(timeout=STOP_SECONDS)[0])
        return [line["event"] for line in lines if line["level"] != "info"]

    return work


def test_a_pooled_connection_is_warned_of(
    warnings_of_a_relay: Callable[[str], list[str]], pooled_url: str
) -> None:
    """Lock and LISTEN need one session; the relay cannot see whether the pooler keeps one."""
    assert warnings_of_a_relay(pooled_url) == ["database.pooled"]


def test_a_direct_connection_is_not_warned_of(
    warnings_of_a_relay: Callable[[str], list[str]], settings: Settings
) -> None:
    """A warning that is always there is read by nobody."""
    assert warnings_of_a_relay(settings.database_url) == []
