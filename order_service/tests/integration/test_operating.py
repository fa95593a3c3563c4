"""What an operator types, and what a script reads of it."""

import json
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from confluent_kafka import (
    Consumer,
    ConsumerGroupTopicPartitions,
    Message,
    Producer,
    TopicPartition,
)
from confluent_kafka.admin import (
    AdminClient,
)
from sqlalchemy import Engine, text

from order_service.kafka import READER_GROUP, TOPIC, TOPIC_SETTINGS, Topic
from order_service.operate.output import (
    EXIT_FAILED,
    EXIT_FOUND,
    EXIT_INTERRUPTED,
    EXIT_USAGE,
)
from order_service.settings import Settings

ADDRESS = "minji@example.com"
MASKED_ADDRESS = "m***@e***"
STOP_SECONDS = 10.0
NOBODY = "127.0.0.1:1"
FULL_DISK = Path("/dev/full")
COMMAND = Path(sys.executable).with_name("order-service")
PRODUCTS = Path(__file__).parents[3] / "deploy/products.csv"
PASSWORD = "correct-horse"

AddEvent = Callable[..., UUID]
RowOf = Callable[[UUID], Any]
Query = Callable[..., Any]
WaitUntil = Callable[..., Any]
Ends = Callable[[], dict[int, int]]
RecordsSince = Callable[[Mapping[int, int]], list[Message]]
Start = Callable[..., "subprocess.Popen[str]"]
Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def order_of(row_of: RowOf) -> Callable[[UUID], str]:
    """Give a function that tells whose event it is."""
    return lambda event_id: row_of(event_id).aggregateid


def rows_of(done: "subprocess.CompletedProcess[str]") -> list[list[str]]:
    """Return the cells of a printed table, without its head."""
    return [line.split() for line in done.stdout.splitlines()[1:]]


# outbox


@pytest.fixture
def one_of_each(add_event: AddEvent, order_of: Callable[[UUID], str]) -> dict[str, str]:
    """Add an event in each state, the last state first, and return whose each is."""
    states = ("COMPLETED", "FAILED", "PUBLISHED", "INIT")
    where = {"topic_id": "t", "partition": 0, "offset": 7}
    return {state: order_of(add_event(state=state, **where)) for state in states}


@pytest.fixture
def row_count(query: Query) -> Callable[[str], int]:
    """Give a function that counts the events in a state."""
    return lambda state: len(query("SELECT FROM outbox WHERE state = :state", state=state))


def test_the_outbox_lists_what_is_not_yet_seen(
    command: Run, one_of_each: Mapping[str, str]
) -> None:
    """Without --state COMPLETED is left out: there are millions of them."""
    listed = command("outbox", "list")
    assert (listed.returncode, [row[:2] for row in rows_of(listed)]) == (
        0,
        [[one_of_each[state], state] for state in ("INIT", "PUBLISHED", "FAILED")],
    )


def test_the_outbox_is_listed_for_scripts(command: Run, one_of_each: Mapping[str, str]) -> None:
    """With --json a row is an object, and has its place in the topic too."""
    listed = json.loads(command("outbox", "list", "--json").stdout)
    assert [(row["order_id"], row["state"], row["offset"]) for row in listed] == [
        (one_of_each[state], state, 7) for state in ("INIT", "PUBLISHED", "FAILED")
    ]


@pytest.mark.parametrize("states", [("COMPLETED",), ("FAILED", "COMPLETED")])
def test_the_outbox_lists_the_states_asked_for(
    command: Run, one_of_each: Mapping[str, str], states: tuple[str, ...]
) -> None:
    """--state may be named more than once."""
    options = [option for state in states for option in ("--state", state)]
    listed = json.loads(command("outbox", "list", *options, "--json").stdout)
    assert [row["order_id"] for row in listed] == [one_of_each[state] for state in states]


def test_the_outbox_lists_the_oldest(
    command: Run, add_event: AddEvent, order_of: Callable[[UUID], str]
) -> None:
    """With --limit the newest are left out, whatever the state they are of."""
    failed = order_of(add_event(state="FAILED"))
    first, second, _ = [order_of(add_event()) for _ in range(3)]
    two, four = (
        [row[0] for row in rows_of(command("outbox", "list", "--limit", limit))]
        for limit in ("2", "4")
    )
    assert (two, four[-1]) == ([first, second], failed)


def test_an_outbox_with_nothing_to_list_says_so(command: Run) -> None:
    """It is no fault."""
    people, script = command("outbox", "list"), command("outbox", "list", "--json")
    assert [(each.returncode, each.stdout) for each in (people, script)] == [
        (0, "none\n"),
        (0, "[]\n"),
    ]


@pytest.mark.parametrize("options", [("--limit", "0"), ("--limit", "10001"), ("--state", "GONE")])
def test_what_cannot_be_listed_is_exit_2(command: Run, options: tuple[str, ...]) -> None:
    """A limit out of bounds and a state that is none."""
    assert command("outbox", "list", *options).returncode == EXIT_USAGE


def test_an_order_is_shown_to_people(
    command: Run, add_event: AddEvent, order_of: Callable[[UUID], str]
) -> None:
    """A line for each column, and no address."""
    event_id = add_event()
    shown = command("outbox", "show", order_of(event_id))
    cells = dict(line.split(maxsplit=1) for line in shown.stdout.splitlines() if line.split()[1:])
    assert (shown.returncode, cells["event_id"], cells["state"], ADDRESS in shown.stdout) == (
        0,
        str(event_id),
        "INIT",
        False,
    )


@pytest.mark.parametrize("form", [(), ("--json",)], ids=["people", "script"])
def test_retry_lets_a_failed_event_be_published_again(
    command: Run,
    publish: Callable[[], None],
    add_event: AddEvent,
    order_of: Callable[[UUID], str],
    row_of: RowOf,
    form: tuple[str, ...],
) -> None:
    """It is due at once, has all its tries again and no reason; the other one stays as it is."""
    event_id, other = (
        add_event(state="FAILED", republished_count=3, reason="lost", due_at="2999-01-01T00:00Z")
        for _ in range(2)
    )
    order_id = order_of(event_id)
    done = command("outbox", "retry", order_id, *form)
    outcome = json.loads(done.stdout) if form else rows_of(done)
    expected = {"order_id": order_id, "outcome": "INIT"}
    row = row_of(event_id)
    publish()
    assert (done.returncode, outcome) == (0, [expected] if form else [list(expected.values())])
    assert (row.state, row.republished_count, row.reason) == ("INIT", 0, None)
    assert (row_of(event_id).state, row_of(other).state) == ("PUBLISHED", "FAILED")


def test_retry_all_leaves_the_other_states(
    command: Run, one_of_each: Mapping[str, str], add_event: AddEvent, query: Query
) -> None:
    """Every FAILED event, and no other."""
    add_event(state="FAILED")
    done = command("outbox", "retry", "--all", "--json")
    left = query("SELECT state FROM outbox ORDER BY state")
    assert (done.returncode, len(json.loads(done.stdout)), [row.state for row in left]) == (
        0,
        2,
        ["COMPLETED", "INIT", "INIT", "INIT", "PUBLISHED"],
    )


@pytest.mark.parametrize("arguments", [(), ("--all", "some-order")])
def test_retry_wants_either_orders_or_all(
    command: Run, add_event: AddEvent, row_of: RowOf, arguments: tuple[str, ...]
) -> None:
    """Neither and both are exit 2, and nothing is changed."""
    event_id = add_event(state="FAILED")
    refused = command("outbox", "retry", *arguments)
    assert (refused.returncode, row_of(event_id).state) == (EXIT_USAGE, "FAILED")


@pytest.mark.parametrize("verb", ["retry", "republish"])
def test_what_is_left_alone_is_named(
    command: Run, one_of_each: Mapping[str, str], query: Query, verb: str
) -> None:
    """Exit 1 when one of the orders has nothing to move; the others are moved all the same."""
    moved = {"retry": ["FAILED"], "republish": ["PUBLISHED", "COMPLETED"]}[verb]
    done = command("outbox", verb, *one_of_each.values(), "unknown", "--json")
    expected = {
        order_id: "INIT" if state in moved else "left alone"
        for state, order_id in one_of_each.items()
    }
    assert (
        done.returncode,
        {row["order_id"]: row["outcome"] for row in json.loads(done.stdout)},
        len(query("SELECT FROM outbox WHERE state = 'INIT'")),
    ) == (EXIT_FOUND, expected | {"unknown": "left alone"}, 1 + len(moved))


@pytest.mark.parametrize("verb", ["retry", "republish"])
def test_a_dry_run_tells_what_would_be_and_changes_nothing(
    command: Run, one_of_each: Mapping[str, str], query: Query, verb: str
) -> None:
    """The same orders as without it, and the same exit code."""
    before = query("SELECT * FROM outbox ORDER BY id")
    tried = command("outbox", verb, *one_of_each.values(), "unknown", "--dry-run", "--json")
    after = query("SELECT * FROM outbox ORDER BY id")
    done = command("outbox", verb, *one_of_each.values(), "unknown", "--json")
    would = {row["order_id"]: row["outcome"] for row in json.loads(tried.stdout)}
    did = {row["order_id"]: row["outcome"] for row in json.loads(done.stdout)}
    assert after == before
    assert (tried.returncode, done.returncode) == (EXIT_FOUND, EXIT_FOUND)
    assert would == {
        order_id: outcome.replace("INIT", "would be INIT") for order_id, outcome in did.items()
    }


def test_a_dry_run_of_all_that_failed(
    command: Run, one_of_each: Mapping[str, str], row_count: Callable[[str], int]
) -> None:
    """Who lets everything go again sees first how much it is."""
    tried = command("outbox", "retry", "--all", "--dry-run")
    assert (tried.returncode, tried.stdout.splitlines()[1:], row_count("FAILED")) == (
        0,
        [f"{one_of_each['FAILED']}  would be INIT"],
        1,
    )


def test_republish_wants_orders(command: Run) -> None:
    """There is no --all: it would be everything of 14 days."""
    assert command("outbox", "republish").returncode == EXIT_USAGE


@pytest.mark.parametrize("before", ["PUBLISHED", "COMPLETED"])
def test_republish_publishes_the_same_event_again(
    command: Run,
    publish: Callable[[], None],
    add_event: AddEvent,
    row_of: RowOf,
    query: Query,
    ends: Ends,
    records_since: RecordsSince,
    before: str,
) -> None:
    """The same id, key and value: who has it already takes it for a duplicate."""
    start = ends()
    event_id = add_event()
    publish()
    query("UPDATE outbox SET state = :state, republished_count = 2", state=before)
    done = command("outbox", "republish", row_of(event_id).aggregateid)
    row = row_of(event_id)
    publish()
    first, second = records_since(start)
    assert (done.returncode, rows_of(done)) == (0, [[row.aggregateid, "INIT"]])
    assert (row.state, row.republished_count, row.reason) == ("INIT", 0, "republish")
    assert (first.headers(), first.key(), first.value()) == (
        second.headers(),
        second.key(),
        second.value(),
    )


# topics


def test_the_topics_are_listed(command: Run, topic: Topic) -> None:
    """Which of them is ours is said, to people and to scripts."""
    people, script = command("topics", "list"), command("topics", "list", "--json")
    assert ([TOPIC, "3", "yes"] in rows_of(people), people.returncode) == (True, 0)
    assert {"topic": TOPIC, "partitions": 3, "ours": "yes"} in json.loads(script.stdout)


def test_a_missing_topic_is_exit_1_in_the_list_and_3_elsewhere(
    command: Run, delete_topic: Callable[[], None]
) -> None:
    """The list is without it, and a description is not to be had."""
    delete_topic()
    listed = command("topics", "list", "--json")
    described = command("topics", "describe")
    assert (listed.returncode, TOPIC in listed.stdout, described.returncode, described.stderr) == (
        EXIT_FOUND,
        False,
        3,
        "Kafka: Broker: Unknown topic or partition\n",
    )


def test_the_topic_is_described(command: Run, topic: Topic, ends: Ends) -> None:
    """Settings, bounds of each partition, and nothing to complain of."""
    described = command("topics", "describe", "--json")
    found = json.loads(described.stdout)
    assert (described.returncode, found["topic_id"], found["faults"], found["warnings"]) == (
        0,
        topic.describe().id,
        [],
        [],
    )
    assert {each["partition"]: each["end"] for each in found["partitions"]} == ends()
    assert TOPIC_SETTINGS.items() <= found.items()


def test_the_topic_is_described_to_people(command: Run, topic: Topic) -> None:
    """A line for each setting, a line for each partition."""
    described = command("topics", "describe")
    lines = [line.split() for line in described.stdout.splitlines()]
    assert (described.returncode, ["retention.ms", "5443200000"] in lines, len(lines)) == (
        0,
        True,
        14,
    )


@pytest.mark.parametrize("form", [(), ("--json",)], ids=["people", "script"])
def test_a_topic_that_is_not_as_declared_is_exit_1(
    command: Run, alter_topic: Callable[..., None], form: tuple[str, ...]
) -> None:
    """The fault is named in either form."""
    alter_topic("cleanup.policy", "compact")
    described = command("topics", "describe", *form)
    assert (
        described.returncode,
        "cleanup.policy=compact instead of delete" in described.stdout,
    ) == (EXIT_FOUND, True)


# events tail


@dataclass
class Tail:
    """A running `events tail`, and the lines it printed."""

    process: "subprocess.Popen[str]"
    lines: list[str]

    def has(self, text: str) -> bool:
        """Say whether a line with this text was printed."""
        return any(text in line for line in self.lines)


@pytest.fixture
def start_tail(start: Start, topic: Topic) -> Iterator[Callable[..., Tail]]:
    """Give a function that starts `events tail`."""
    tails: list[tuple[Tail, threading.Thread]] = []

    def begin(*options: str) -> Tail:
        tail = Tail(start("events", "tail", *options), [])
        assert tail.process.stdout
        reader = threading.Thread(target=tail.lines.extend, args=(tail.process.stdout,))
        reader.start()
        tails.append((tail, reader))
        return tail

    yield begin
    for tail, reader in tails:
        with tail.process:
            tail.process.kill()
            reader.join()


@pytest.fixture
def write(settings: Settings) -> Callable[..., None]:
    """Give a function by which somebody else writes to the topic whatever he likes."""
    producer = Producer(dict(settings.kafka))

    def send(value: bytes | None = b"{}", **changed: Any) -> None:
        errors: list[Any] = []
        producer.produce(TOPIC, value, on_delivery=lambda error, _: errors.append(error), **changed)
        producer.flush(10)
        assert errors == [None]

    return send


@pytest.fixture
def listening(
    start_tail: Callable[..., Tail], write: Callable[..., None], wait_until: WaitUntil
) -> Callable[..., Tail]:
    """Give a function that starts a tail and returns when it prints what comes."""

    def begin(*options: str, partition: int = 0) -> Tail:
        tail = start_tail(*options)

        def is_listening() -> bool:
            write(b'"are you there?"', key=b"knock", partition=partition)
            return tail.has("are you there?")

        wait_until(is_listening)
        return tail

    return begin


def test_a_tail_from_the_end_shows_only_what_comes(
    listening: Callable[..., Tail],
    publish: Callable[[], None],
    add_event: AddEvent,
    order_of: Callable[[UUID], str],
    wait_until: WaitUntil,
) -> None:
    """What was in the topic before stays unseen, and an address is masked."""
    before = order_of(add_event())
    publish()
    tail = listening()
    came = order_of(add_event())
    publish()
    wait_until(lambda: tail.has(came))
    printed = "".join(tail.lines)
    assert (before in printed, ADDRESS in printed, MASKED_ADDRESS in printed) == (
        False,
        False,
        True,
    )


def test_a_tail_from_the_beginning_shows_all_of_an_order_in_a_partition(
    start_tail: Callable[..., Tail],
    publish: Callable[[], None],
    add_event: AddEvent,
    row_of: RowOf,
    wait_until: WaitUntil,
) -> None:
    """With --key and --partition it is the one record, as JSON, its address masked."""
    event_id = add_event()
    add_event()
    publish()
    row = row_of(event_id)
    here, elsewhere = str(row.partition), str((row.partition + 1) % 3)
    options = ("--from-beginning", "--json", "--key", row.aggregateid, "--partition")
    tail, nothing = start_tail(*options, here), start_tail(*options, elsewhere)
    wait_until(lambda: tail.lines)
    tail.process.send_signal(signal.SIGTERM)
    ended = tail.process.wait(STOP_SECONDS)
    nothing.process.send_signal(signal.SIGTERM)
    nothing.process.wait(STOP_SECONDS)
    (shown,) = (json.loads(line) for line in tail.lines)
    value = json.loads(shown.pop("value"))
    assert (ended, nothing.lines) == (0, [])
    assert {name: shown[name] for name in ("partition", "offset", "key", "type", "event_id")} == {
        "partition": row.partition,
        "offset": row.offset,
        "key": row.aggregateid,
        "type": "order.created.v1",
        "event_id": str(event_id),
    }
    assert (value["orderId"], value["email"]) == (row.aggregateid, MASKED_ADDRESS)


FOREIGN: dict[str, dict[str, Any]] = {
    "a time no calendar has": {"value": b'"absurd"', "timestamp": 2**62},
    "a time before all": {"value": b'"long ago"', "timestamp": -62_135_596_800_001},
    "not JSON": {"value": b"\xff\xfe\x00"},
    "half a character": {"value": b'{"email":"\\ud800@x","name":"\\udc00"}'},
    "half a character, raw": {"value": b'"\xed\xa0\x80"'},
    "nested deep": {"value": b"[" * 100_000},
    "a number of 5,000 digits": {"value": b"1" * 5_000},
    "nothing": {"value": None},
    "a key that is not UTF-8": {"value": b"{}", "key": b"\xff\xfe"},
    "a header that is not UTF-8": {"value": b"{}", "headers": [("ce_type", b"\xff")]},
    "a header without a value": {"value": b"{}", "headers": [("ce_type", None)]},
}


@pytest.mark.parametrize("form", [(), ("--json",)], ids=["people", "script"])
def test_no_record_stops_a_tail(
    listening: Callable[..., Tail],
    write: Callable[..., None],
    alter_topic: Callable[..., None],
    wait_until: WaitUntil,
    form: tuple[str, ...],
) -> None:
    """Others may write to the topic what they like: each record is one line."""
    alter_topic("message.timestamp.after.max.ms", str(2**63 - 1))
    tail = listening("--partition", "0", *form)
    seen = len(tail.lines)
    for record in FOREIGN.values():
        write(**record, partition=0)
    write(b'"the last one"', partition=0)
    wait_until(lambda: tail.has("the last one"))
    knocks = sum("are you there" in line for line in tail.lines[seen:])
    assert len(tail.lines[seen:]) - knocks == len(FOREIGN) + 1
    if form:
        assert {json.loads(line)["at"] for line in tail.lines} >= {None}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_tail_ends_when_told(listening: Callable[..., Tail], number: signal.Signals) -> None:
    """Ctrl-C is how it ends: exit 0 within seconds, and no traceback."""
    process = listening().process
    process.send_signal(number)
    ended = process.wait(STOP_SECONDS)
    assert process.stderr
    assert (ended, process.stderr.read()) == (0, "")


@pytest.fixture
def committed(settings: Settings, admin: AdminClient, topic: Topic) -> Callable[[], dict[int, int]]:
    """Commit offsets of the group, and give a function that tells which ones it has."""
    consumer = Consumer({**settings.kafka, "group.id": READER_GROUP})
    offsets = [TopicPartition(TOPIC, partition, 1 + partition) for partition in range(3)]
    consumer.commit(offsets=offsets, asynchronous=False)
    consumer.close()

    def fetch() -> dict[int, int]:
        asked = ConsumerGroupTopicPartitions(READER_GROUP)
        found = admin.list_consumer_group_offsets([asked])[READER_GROUP].result(10)
        return {where.partition: where.offset for where in found.topic_partitions}

    return fetch


def test_a_tail_joins_no_group_and_commits_nothing(
    listening: Callable[..., Tail], committed: Callable[[], dict[int, int]], admin: AdminClient
) -> None:
    """The relay's own offsets, by which its lag shows, stay as they are."""
    before = committed()
    tail = listening("--from-beginning")
    group = admin.describe_consumer_groups([READER_GROUP])[READER_GROUP].result(10)
    tail.process.send_signal(signal.SIGTERM)
    tail.process.wait(STOP_SECONDS)
    assert (before, committed(), group.members) == ({0: 1, 1: 2, 2: 3}, before, [])


def test_a_tail_of_an_unknown_partition_is_exit_2(run: Run, topic: Topic) -> None:
    """It would wait for ever."""
    refused = run("events", "tail", "--partition", "1", "--partition", "7")
    assert (refused.returncode, refused.stderr.splitlines()[-1]) == (
        EXIT_USAGE,
        "Error: there is no partition 7",
    )


# Nobody answers


def test_without_kafka_a_command_is_exit_3_and_one_line(start: Start) -> None:
    """All at once: each waits its ten seconds, no longer."""
    commands = (
        ("topics", "list"),
        ("topics", "describe", "--json"),
        ("events", "tail"),
        ("reconcile", "--from", "2026-01-01T00:00Z"),
    )
    processes = [start(*arguments, KAFKA_BOOTSTRAP_SERVERS=NOBODY) for arguments in commands]
    outcomes = []
    for process in processes:
        with process:
            out, err = process.communicate(timeout=30)
        outcomes.append((process.returncode, out, err.count("\n"), err.startswith("Kafka: ")))
    assert outcomes == [(3, "", 1, True)] * len(commands)


WITH_DATABASE = (
    ("outbox", "list"),
    ("outbox", "list", "--json"),
    ("outbox", "show", "some-order"),
    ("outbox", "retry", "--all"),
    ("outbox", "republish", "some-order"),
    ("reconcile", "--from", "2026-01-01T00:00Z"),
    ("erase", "--user", "minji", "--yes"),
    ("erase", "--user", "minji", "--dry-run", "--json"),
    ("products", "load", str(PRODUCTS)),
    ("migrate",),
)


@pytest.mark.usefixtures("topic")
@pytest.mark.parametrize("arguments", WITH_DATABASE, ids=" ".join)
def test_without_its_database_a_command_is_exit_3(command: Run, arguments: tuple[str, ...]) -> None:
    """It says so, and neither with a traceback nor with the password."""
    url = f"postgresql://order:{PASSWORD}@{NOBODY}/order"
    failed = command(*arguments, DATABASE_URL=url)
    assert (failed.returncode, failed.stdout, failed.stderr.partition(":")[0]) == (
        3,
        "",
        "database",
    )
    assert PASSWORD not in failed.stderr


def test_what_the_database_says_is_one_line(run: Run) -> None:
    """A script that keeps the last line of standard error has all of it."""
    failed = run("outbox", "list", DATABASE_URL=f"postgresql://order:{PASSWORD}@{NOBODY}/order")
    assert failed.stderr.count("\n") == 1


def test_a_wrong_password_is_not_told(command: Run, settings: Settings) -> None:
    """The server refuses: exit 3, and what was tried is not in the message."""
    user, _, rest = settings.database_url.partition("://")[2].partition(":")
    address = rest.partition("@")[2]
    failed = command("outbox", "list", DATABASE_URL=f"postgresql://{user}:{PASSWORD}@{address}")
    assert (failed.returncode, "password authentication failed" in failed.stderr) == (3, True)
    assert PASSWORD not in failed.stderr


@pytest.mark.usefixtures("engine")
def test_a_database_without_tables_is_exit_3(command: Run, settings: Settings) -> None:
    """An operator who forgot `migrate` reads that, not a traceback."""
    address = settings.database_url.rpartition("/")[0]
    failed = command("outbox", "list", DATABASE_URL=f"{address}/postgres")
    assert (failed.returncode, "order-service migrate" in failed.stderr) == (3, True)


# Nobody listens


@pytest.mark.usefixtures("topic", "engine")
@pytest.mark.parametrize(
    "arguments",
    [
        ("openapi",),
        ("outbox", "list"),
        ("topics", "list", "--json"),
        ("reconcile", "--from", "2026-01-01T00:00Z"),
        ("events", "tail", "--from-beginning"),
    ],
    ids=" ".join,
)
def test_output_that_nobody_reads_is_exit_3_and_no_word(
    start: Start, produce: Callable[..., None], arguments: tuple[str, ...]
) -> None:
    """As `… | head -1` makes it: the reader is gone before the command is done."""
    produce()
    with start(*arguments) as process:
        assert process.stdout
        assert process.stderr
        process.stdout.close()
        said = process.stderr.read()
    assert (process.returncode, said) == (EXIT_FAILED, "")


@pytest.mark.skipif(not FULL_DISK.exists(), reason="only Linux has one")
def test_a_full_disk_is_told_in_one_line(environment: dict[str, str]) -> None:
    """What the system does not let us write is no traceback either."""
    with FULL_DISK.open("w", encoding="utf-8") as full:
        failed = subprocess.run(
            [COMMAND, "openapi"], stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )
    assert (failed.returncode, failed.stderr) == (
        EXIT_FAILED,
        "[Errno 28] No space left on device\n",
    )


def test_ctrl_c_is_exit_130_and_no_traceback(
    start: Start,
    engine: Engine,
    query: Query,
    add_event: AddEvent,
    row_of: RowOf,
    wait_until: WaitUntil,
) -> None:
    """In the middle of its work, which is undone."""
    event_id = add_event(state="FAILED")
    with engine.connect() as holder:
        holder.execute(text("SELECT FROM outbox FOR UPDATE"))
        with start("outbox", "retry", "--all") as process:
            wait_until(lambda: query("SELECT FROM pg_stat_activity WHERE wait_event_type = 'Lock'"))
            process.send_signal(signal.SIGINT)
            out, err = process.communicate(timeout=STOP_SECONDS)
    assert (process.returncode, out, err.strip()) == (EXIT_INTERRUPTED, "", "")
    assert row_of(event_id).state == "FAILED"
