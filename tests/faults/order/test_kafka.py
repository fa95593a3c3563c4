"""Faults of the broker, of its topic and of the producer (faults.toml, F-K*)."""

import json
import os
import signal
import statistics
import struct
import threading
import time
import uuid
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Self

import httpx
import psutil
import pytest
from confluent_kafka import (
    Consumer,
    KafkaException,
    Producer,
    TopicCollection,
    TopicPartition,
)
from confluent_kafka.admin import (
    AclBinding,
    AclBindingFilter,
    AclOperation,
    AclPermissionType,
    AdminClient,
    NewPartitions,
    OffsetSpec,
    ResourcePatternType,
    ResourceType,
)

from deploy.embedded.ports import HOST
from tests.support.order_side import PARTITIONS, TOPIC, OrderSide, order_ids
from tests.support.proxy import SwallowReplies
from tests.support.service import Service
from tests.support.world import order

ORDERS = 30
BATCH_ROWS = 500
BACKLOG = 20_000
# Relay, database and broker share two cores with the customers.
NOISE_SECONDS = 0.15
MORE_PARTITIONS = 6
ANSWER_SECONDS = 20.0
RETURN_SECONDS = 30.0
# The delivery time-out is 30 s.
FROZEN_SECONDS = 40.0
EXIT_FAILED = 3
# A batch of records begins with its first offset, and how many bytes come behind these two.
BATCH_HEAD = struct.Struct(">qi")

Rule = tuple[ResourceType, str, AclOperation]
WRITE: Rule = (ResourceType.TOPIC, TOPIC, AclOperation.WRITE)
READ: Rule = (ResourceType.TOPIC, TOPIC, AclOperation.READ)
# Whoever may write to no topic gets no producer id either.
WRITE_ANYWHERE: Rule = (ResourceType.TOPIC, "*", AclOperation.WRITE)
WRITE_IDEMPOTENTLY: Rule = (ResourceType.BROKER, "kafka-cluster", AclOperation.IDEMPOTENT_WRITE)


@pytest.fixture
def admin(side: OrderSide) -> AdminClient:
    return AdminClient({"bootstrap.servers": f"{HOST}:{side.kafka.port}", "log_level": 0})


@pytest.fixture
def impatient(tmp_path: Path) -> dict[str, str]:
    """Give the environment of a relay that looks every second."""
    return looking_every(1.0, tmp_path)


def looking_every(seconds: float, folder: Path) -> dict[str, str]:
    """Have it describe the topic, sweep and measure so often, not every 30, 5 and 15 s."""
    (folder / "sitecustomize.py").write_text(
        "from order_service import kafka, readback, relay\n"
        f"kafka.DESCRIBE_SECONDS = readback.SWEEP_SECONDS = relay.MEASURE_SECONDS = {seconds}\n"
    )
    return {"PYTHONPATH": str(folder)}


@pytest.fixture
def mended_topic(side: OrderSide, admin: AdminClient) -> Iterator[None]:
    """Leave the topic as declared, whatever became of it."""
    yield
    recreate_topic(side, admin)


@pytest.mark.fault("F-K1")
def test_orders_are_taken_while_the_broker_is_down(side: OrderSide) -> None:
    """Every POST is a 201 in time; what waited is in the topic within 30 s of the return."""
    port = side.ports.choose(0)
    with side.running("api", HTTP_PORT=str(port)) as api, side.running("relay") as relay:
        with Shoppers(side, port) as shoppers:
            side.wait_for(lambda: side.states()["COMPLETED"] > ORDERS)
            with broker_down(side):
                taken = len(shoppers.order_ids)
                for _ in range(20):
                    time.sleep(0.5)
                    assert api.is_ready()
                # What was in flight when the broker died may be there unseen.
                placed = len(shoppers.order_ids) - taken
                assert side.states()["INIT"] >= placed - 10 > ORDERS
            back_at = time.monotonic()
        side.wait_until_completed(seconds=back_at + RETURN_SECONDS - time.monotonic())
        assert relay.logged("kafka.client_failed")
        may_be_twice = postponed(relay)
    assert shoppers.refusals == []
    assert statistics.quantiles(shoppers.seconds, n=100)[-1] < 2
    found = order_ids(side.records())
    assert set(found) == set(shoppers.order_ids)
    assert found.total() - len(found) <= may_be_twice


@pytest.mark.fault("F-B4")
def test_orders_are_taken_while_the_relay_catches_up(side: OrderSide) -> None:
    """What an outage left goes out in batches of its usual size, and customers hardly notice."""
    port = side.ports.choose(0)
    with side.running("api", HTTP_PORT=str(port)):
        with Shoppers(side, port) as quiet:
            side.wait_for(lambda: len(quiet.order_ids) >= ORDERS)
        backlog = side.add_orders(BACKLOG)
        with side.running("relay", "relay.after_claim=sleep:0", is_waited_for=False) as relay:
            with Shoppers(side, port) as busy:
                side.wait_for(lambda: side.states()["INIT"] < BATCH_ROWS, seconds=60)
            side.wait_until_completed()
    assert quiet.refusals == busy.refusals == []
    usual, meanwhile = statistics.median(quiet.seconds), statistics.median(busy.seconds)
    assert meanwhile < 2 * usual + NOISE_SECONDS, f"{usual:.3f} s, then {meanwhile:.3f} s"
    assert len(relay.hits) >= BACKLOG / BATCH_ROWS
    placed = [*backlog, *quiet.order_ids, *busy.order_ids]
    assert order_ids(side.records()) == dict.fromkeys(placed, 1)


@pytest.mark.fault("F-K2", "F-K13")
def test_deliveries_that_time_out_are_tried_again(side: OrderSide) -> None:
    """With a frozen broker rows stay INIT; what was in flight is there twice at most."""
    broker = psutil.Process(side.stack.part("kafka").pid)
    with side.running("relay") as relay:
        before = side.add_orders(ORDERS)
        side.wait_until_completed()
        broker.suspend()
        try:
            goes_on_at = time.monotonic() + FROZEN_SECONDS
            in_flight = side.add_orders(ORDERS)
            side.wait_for(lambda: postponed(relay), seconds=FROZEN_SECONDS - 1)
            assert broker.status() == psutil.STATUS_STOPPED
            assert side.states() == {"COMPLETED": ORDERS, "INIT": ORDERS}
            assert relay.is_live()
            time.sleep(max(0.0, goes_on_at - time.monotonic()))
        finally:
            broker.resume()
        side.wait_until_completed()
        (line,) = relay.logged("events.postponed")
        assert (line["count"], line["reasons"]) == (ORDERS, ["Local: Message timed out"])
        assert relay.metric("order_events_published_total", outcome="postponed") == ORDERS
    found = order_ids(side.records())
    assert found.keys() == {*before, *in_flight}
    assert twice(found) <= set(in_flight)


@pytest.mark.fault("F-K3")
def test_a_lost_acknowledgement_makes_no_second_event(side: OrderSide) -> None:
    """The broker's answers are lost, its records are not: sent again they are no second ones."""
    # Uncompressed, what all these events hold stands in the request.
    with side.running("relay", KAFKA_COMPRESSION_TYPE="none") as relay:
        resets, swallowed = side.kafka.resets, side.kafka.swallowed["down"]
        lost = side.kafka.when_sent(b'"backlog"', SwallowReplies(reset_after_seconds=3), times=2)
        placed = side.add_orders(ORDERS)
        side.wait_until_completed()
        # It was seen in the topic before any acknowledgement came.
        assert relay.metric("order_events_published_total", outcome="confirmed") == 0
        side.wait_for(
            lambda: relay.metric("order_events_published_total", outcome="confirmed") == ORDERS
        )
        # The client may have given the second connection up before it was reset.
        assert (lost.fired, side.kafka.resets > resets) == (2, True)
        assert side.kafka.swallowed["down"] > swallowed
        placed += side.add_orders(ORDERS)
        side.wait_until_completed()
        assert postponed(relay) == 0
    assert order_ids(side.records()) == dict.fromkeys(placed, 1)


@pytest.mark.fault("F-K8")
def test_a_topic_made_anew_is_filled_again(
    side: OrderSide, admin: AdminClient, impatient: dict[str, str]
) -> None:
    """While the relay runs the topic becomes another: the new one gets every event."""
    old_id = topic_id(admin)
    with side.running("relay", **impatient) as relay, side.moves() as moves:
        before = side.add_orders(ORDERS)
        side.wait_until_completed()
        recreate_topic(side, admin)
        after = side.add_orders(ORDERS)
        side.wait_for(lambda: topics_of_rows(side) == {topic_id(admin)} != {old_id})
        side.wait_until_completed()
        said = relay.logged("topic.recreated")
        assert {line["topic_id"] for line in said} == {topic_id(admin)}
        republished = sum(line["republished_count"] for line in said)
        assert republished == moves()["COMPLETED", "INIT"] >= ORDERS
    found = order_ids(side.read(dict.fromkeys(PARTITIONS, 0), ends(side)))
    assert found.keys() == {*before, *after}
    # Until the relay knew the new id, these were noted under the old one.
    assert twice(found) <= set(after)


@pytest.mark.fault("F-K8")
def test_a_new_topic_longer_than_the_position_is_read_from_its_start(
    side: OrderSide, admin: AdminClient, impatient: dict[str, str]
) -> None:
    """No offset tells of it, only the topic's id: nothing is skipped in silence."""
    with side.running("relay"):
        placed = side.add_orders(ORDERS)
        side.wait_until_completed()
    old_id, positions = topic_id(admin), ends(side)
    recreate_topic(side, admin)
    foreign = add_foreign(side, {each: offset + 20 for each, offset in positions.items()})
    with side.running("relay", **impatient) as relay:
        side.wait_for(lambda: topics_of_rows(side) == {topic_id(admin)} != {old_id})
        side.wait_until_completed()
        (line,) = relay.logged("topic.recreated")
        assert (line["topic_id"], line["republished_count"]) == (topic_id(admin), ORDERS)
        # From its start: the old positions lie among these.
        side.wait_for(lambda: relay.metric("order_records_foreign_total") == sum(foreign.values()))
        assert relay.metric("order_readback_gaps_total", bound="end") == 0
    assert order_ids(side.read(foreign, ends(side))) == dict.fromkeys(placed, 1)


@pytest.mark.fault("F-K10")
def test_what_the_broker_acknowledged_and_lost_comes_back(
    side: OrderSide, impatient: dict[str, str]
) -> None:
    """What was not seen yet goes out by itself; what was seen is named by reconcile."""
    since = datetime.now(UTC).isoformat()
    with side.running("relay"):
        kept = side.add_orders(ORDERS)
        side.wait_until_completed()
        kept_ends = ends(side)
        seen = side.add_orders(ORDERS)
        side.wait_until_completed()
    # Fewer than were seen: of those, some lie beyond the new end for good.
    unseen = side.add_orders(ORDERS // 3)
    unread = ("rb.after_poll=sleep:60000", "relay.after_mark=kill")
    with side.running("relay", *unread, is_waited_for=False) as killed:
        assert killed.wait_for_end() == -signal.SIGKILL
    assert side.states() == {"COMPLETED": 2 * ORDERS, "PUBLISHED": len(unseen)}
    with broker_down(side):
        assert cut(side, kept_ends) == len(seen) + len(unseen)
    assert ends(side) == kept_ends
    with side.running("relay", **impatient) as relay:
        side.wait_until_completed()
        assert relay.metric("order_readback_gaps_total", bound="end") > 0
        assert relay.metric("order_events_lost_total", state="INIT") == len(unseen)
        assert len(relay.logged("event.lost")) == len(unseen)
        found = side.command("reconcile", "--from", since, "--json", check=False)
        assert (found.returncode, sorted(json.loads(found.stdout)["missing"])) == (1, sorted(seen))
        side.command("outbox", "republish", *seen)
        side.wait_until_completed()
    report = json.loads(side.command("reconcile", "--from", since, "--json").stdout)
    assert (report["with_event"], report["on_their_way"]) == (2 * ORDERS + len(unseen), 0)
    assert order_ids(side.records()) == dict.fromkeys([*kept, *seen, *unseen], 1)


@pytest.mark.fault("F-K10", "F-K11")
def test_a_relay_whose_broker_forgot_its_records_ends(side: OrderSide) -> None:
    """Its numbers are ahead of the broker's, for good: it ends with 3, and the next one goes on."""
    with side.running("relay") as relay:
        kept = side.add_orders(ORDERS)
        side.wait_until_completed()
        kept_ends = ends(side)
        side.add_orders(ORDERS)
        side.wait_until_completed()
        with broker_down(side):
            assert cut(side, kept_ends) == ORDERS
        side.wait_for(lambda: relay.metric("order_readback_gaps_total", bound="end"))
        new = side.add_orders(ORDERS)
        code = relay.wait_for_end()
        assert "sequence desynchronization" in relay.part.command.log_path.read_text()
    assert code == EXIT_FAILED
    with side.running("relay"):
        side.wait_until_completed()
    found = order_ids(side.records())
    assert found.keys() == {*kept, *new}
    assert twice(found) <= set(new)


@pytest.mark.fault("F-K11")
def test_a_relay_whose_producer_fails_for_good_ends(side: OrderSide, admin: AdminClient) -> None:
    """Refused its producer id it ends with 3; once it is granted, the next one goes on."""
    placed = side.add_orders(ORDERS)
    with forbidden(admin, WRITE_ANYWHERE, WRITE_IDEMPOTENTLY):
        with side.running("relay", is_waited_for=False) as relay:
            code = relay.wait_for_end()
            assert "Failed to acquire idempotence PID" in relay.part.command.log_path.read_text()
        assert side.states() == {"INIT": ORDERS}
    assert code == EXIT_FAILED
    with side.running("relay"):
        side.wait_until_completed()
    assert order_ids(side.records()) == dict.fromkeys(placed, 1)


@pytest.mark.fault("F-K12")
def test_a_full_queue_drops_nothing(side: OrderSide) -> None:
    """Batches of 500 go through a queue with room for 10, each event once."""
    placed = side.add_orders(4 * BATCH_ROWS)
    narrow = {"KAFKA_QUEUE_BUFFERING_MAX_MESSAGES": "10"}
    with side.running("relay", "relay.after_ack=sleep:0", **narrow) as relay:
        side.wait_until_completed()
        # A batch is handed over before its reports are heard, so it met a full queue.
        side.wait_for(lambda: len(relay.hits) == len(placed) / BATCH_ROWS)
        assert postponed(relay) == 0
    assert order_ids(side.records()) == dict.fromkeys(placed, 1)


@pytest.mark.fault("F-K14")
def test_a_report_that_raises_loses_nothing(side: OrderSide) -> None:
    """An error of ours inside librdkafka's call ends the process by itself, and rows come right."""
    placed = side.add_orders(ORDERS)
    raising = "relay.on_report=raise:builtins.RuntimeError@3"
    with side.running("relay", raising, is_waited_for=False) as relay:
        code = relay.wait_for_end()
        assert [(hit.name, hit.hit) for hit in relay.hits] == [("relay.on_report", 3)]
        assert "RuntimeError: failpoint" in relay.part.command.log_path.read_text()
    # A crash of the interpreter would be a signal, a negative number.
    assert code > 0
    open_rows = side.sql("SELECT aggregateid FROM outbox WHERE state = 'INIT'")
    with side.running("relay"):
        side.wait_until_completed()
    found = order_ids(side.records())
    assert found.keys() == set(placed)
    assert twice(found) <= {order_id for (order_id,) in open_rows}


@pytest.mark.fault("F-K15")
def test_the_right_to_write_is_taken_away(side: OrderSide, admin: AdminClient) -> None:
    """It is no fault of a row: all wait in INIT with an alarm, and go out when it is back."""
    with side.running("relay") as relay, side.moves() as moves:
        placed = side.add_orders(ORDERS)
        side.wait_until_completed()
        with forbidden(admin, WRITE):
            placed += side.add_orders(ORDERS)
            side.wait_for(lambda: postponed(relay) >= 3 * ORDERS)
            reasons = {*relay.logged("events.postponed")[-1]["reasons"]}
            assert reasons == {"Broker: Topic authorization failed"}
            assert relay.metric("order_events_published_total", outcome="postponed") > 0
            assert side.states() == {"COMPLETED": ORDERS, "INIT": ORDERS}
        side.wait_until_completed()
        assert not {became for _, became in moves()} & {"FAILED", "INIT"}
    assert order_ids(side.records()) == dict.fromkeys(placed, 1)


@pytest.mark.fault("F-K15")
def test_the_right_to_read_is_taken_away(
    side: OrderSide, admin: AdminClient, impatient: dict[str, str]
) -> None:
    """What cannot be read is not lost: rows wait in PUBLISHED with an alarm, none goes out anew."""
    with side.running("relay", **impatient) as relay, side.moves() as moves:
        placed = side.add_orders(ORDERS)
        side.wait_until_completed()
        with forbidden(admin, READ):
            # What is asked for already is answered yet.
            side.wait_for(lambda: relay.logged("kafka.read_failed"))
            placed += side.add_orders(ORDERS)
            side.wait_for(lambda: relay.metric("order_outbox_events", state="PUBLISHED") == ORDERS)
            # Some sweeps.
            time.sleep(3)
            assert side.states() == {"COMPLETED": ORDERS, "PUBLISHED": ORDERS}
            assert "authorization failed" in relay.logged("kafka.read_failed")[0]["error"]
        side.wait_until_completed()
        assert moves()["PUBLISHED", "COMPLETED"] >= ORDERS
        assert moves()["PUBLISHED", "INIT"] == 0
    assert order_ids(side.records()) == dict.fromkeys(placed, 1)


@pytest.mark.fault("F-K17")
@pytest.mark.usefixtures("mended_topic")
def test_partitions_added_while_events_flow_are_read_from_their_start(
    side: OrderSide, admin: AdminClient, tmp_path: Path
) -> None:
    """Records in a partition that read-back did not know yet are COMPLETED once it does."""
    starts = {**dict.fromkeys(range(MORE_PARTITIONS), 0), **ends(side)}
    # The producer would ask for new partitions every 5 minutes.
    curious = {"KAFKA_TOPIC_METADATA_REFRESH_INTERVAL_MS": "200"}
    with side.running("relay", **looking_every(20.0, tmp_path), **curious) as relay:
        placed = side.add_orders(ORDERS)
        side.wait_until_completed()
        admin.create_partitions([NewPartitions(TOPIC, MORE_PARTITIONS)])[TOPIC].result(
            ANSWER_SECONDS
        )
        for _ in range(40):
            placed += side.add_orders(ORDERS)
            time.sleep(0.2)
            if side.sql("SELECT id FROM outbox WHERE partition >= %s", len(PARTITIONS)):
                break
        published = side.sql("SELECT max(partition) FROM outbox WHERE state = 'PUBLISHED'")
        assert published[0][0] >= len(PARTITIONS)
        assert {line["partitions"] for line in relay.logged("readback.assigned")} == {3}
        placed += side.add_orders(ORDERS)
        side.wait_until_completed(seconds=60)
        assert relay.logged("readback.assigned")[-1]["partitions"] == MORE_PARTITIONS
        assert postponed(relay) == 0
    assert order_ids(side.read(starts, ends(side, MORE_PARTITIONS))) == dict.fromkeys(placed, 1)
    keys = read_keys(side, starts, ends(side, MORE_PARTITIONS))
    assert {partition for partition, _ in keys} == {*range(MORE_PARTITIONS)}
    assert Counter(key for _, key in keys) == dict.fromkeys(placed, 1)
    positions = side.sql("SELECT partition, next_offset FROM readback_positions")
    assert dict(positions) == ends(side, MORE_PARTITIONS)


class Shoppers:
    """Customers who order one thing after another for as long as the block runs."""

    def __init__(self, side: OrderSide, port: int, count: int = 2) -> None:
        self.order_ids: list[str] = []
        self.seconds: list[float] = []
        self.refusals: list[str] = []
        self._url = f"http://{HOST}:{port}"
        self._stop = threading.Event()
        names = [f"shopper-{number}" for number in range(count)]
        tokens = [side.command("token", "--user", name).stdout.strip() for name in names]
        self._threads = [
            threading.Thread(target=self._shop, args=pair)
            for pair in zip(names, tokens, strict=True)
        ]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _shop(self, name: str, token: str) -> None:
        body = order(email=f"{name}@example.com")
        with httpx.Client(base_url=self._url, timeout=RETURN_SECONDS) as client:
            client.headers["Authorization"] = f"Bearer {token}"
            while not self._stop.wait(0.05):
                key = {"Idempotency-Key": str(uuid.uuid4())}
                began_at = time.monotonic()
                answer = client.post("/v1/orders", json=body, headers=key)
                self.seconds.append(time.monotonic() - began_at)
                if answer.status_code == httpx.codes.CREATED:
                    self.order_ids.append(answer.json()["id"])
                else:
                    self.refusals.append(answer.text)


@contextmanager
def broker_down(side: OrderSide) -> Iterator[None]:
    """Kill the broker; start it again when the block ends."""
    killed = side.stack.part("kafka").pid
    side.stack.kill("kafka", restart=False)
    assert side.stack.part("kafka").exit_code == -signal.SIGKILL
    try:
        yield
    finally:
        side.stack.start("kafka")
    assert side.stack.part("kafka").pid != killed


def cut(side: OrderSide, new_ends: Mapping[int, int]) -> int:
    """Cut a stopped broker's logs off at these offsets; return how many records are gone."""
    data = side.stack.state.data("kafka") / "data"
    assert not (data / ".kafka_cleanshutdown").exists()
    return sum(_cut(data / f"{TOPIC}-{partition}", end) for partition, end in new_ends.items())


def _cut(folder: Path, new_end: int) -> int:
    (log,) = folder.glob("*.log")
    content, at, cut_at, last = log.read_bytes(), 0, None, new_end - 1
    while at < len(content):
        base, size = BATCH_HEAD.unpack_from(content, at)
        if base >= new_end and cut_at is None:
            assert base == new_end
            cut_at = at
        (delta,) = struct.unpack_from(">i", content, at + 23)
        last = base + delta
        at += BATCH_HEAD.size + size
    if cut_at is not None:
        os.truncate(log, cut_at)
    # They are made from the log where they are missing.
    for name in ("*.index", "*.timeindex", "*.snapshot"):
        for path in folder.glob(name):
            path.unlink()
    return last + 1 - new_end


@contextmanager
def forbidden(admin: AdminClient, *rules: Rule) -> Iterator[None]:
    """Deny the service these rights; a resource that has a rule needs one for all else too."""

    def binding(rule: Rule, user: str, permission: AclPermissionType) -> AclBinding:
        kind, name, operation = rule
        literal = ResourcePatternType.LITERAL
        return AclBinding(kind, name, literal, user, "*", operation, permission)

    bindings = [binding(rule, "User:ANONYMOUS", AclPermissionType.DENY) for rule in rules]
    bindings += [
        binding((kind, name, AclOperation.ALL), "User:*", AclPermissionType.ALLOW)
        for kind, name, _ in rules
    ]
    for done in admin.create_acls(bindings).values():
        done.result(ANSWER_SECONDS)
    try:
        yield
    finally:
        every = AclBindingFilter(
            ResourceType.ANY,
            None,
            ResourcePatternType.ANY,
            None,
            None,
            AclOperation.ANY,
            AclPermissionType.ANY,
        )
        (deleted,) = admin.delete_acls([every]).values()
        assert len(deleted.result(ANSWER_SECONDS)) == len(bindings)


def topic_id(admin: AdminClient) -> str:
    """Return the topic's id, empty while there is none."""
    try:
        found = admin.describe_topics(TopicCollection([TOPIC]))[TOPIC].result(ANSWER_SECONDS)
    except KafkaException:
        return ""
    return str(found.topic_id)


def recreate_topic(side: OrderSide, admin: AdminClient) -> None:
    """Delete the topic, if there is one, and let the service make it."""
    old_id = topic_id(admin)
    with suppress(KafkaException):
        admin.delete_topics([TOPIC])[TOPIC].result(ANSWER_SECONDS)
    side.wait_for(lambda: not topic_id(admin))
    side.command("topics", "ensure")
    side.wait_for(lambda: topic_id(admin) not in ("", old_id))


def ends(side: OrderSide, partitions: int = len(PARTITIONS)) -> dict[int, int]:
    """Return the first offset of each partition that no record has yet."""
    client = AdminClient({"bootstrap.servers": f"{HOST}:{side.kafka.port}", "log_level": 0})
    asked = {TopicPartition(TOPIC, each): OffsetSpec.latest() for each in range(partitions)}
    found: dict[int, int] = {}

    def is_told() -> bool:
        # Right after the broker's start no partition has a leader.
        with suppress(KafkaException):
            for where, answer in client.list_offsets(asked).items():
                found[where.partition] = answer.result(ANSWER_SECONDS).offset
        return len(found) == partitions

    side.wait_for(is_told)
    return found


def topics_of_rows(side: OrderSide) -> set[str]:
    """Return the ids of the topics that rows name."""
    return {topic for (topic,) in side.sql("SELECT DISTINCT topic_id FROM outbox")}


def add_foreign(side: OrderSide, counts: dict[int, int]) -> dict[int, int]:
    """Put so many records into each partition that are nobody's event; return the counts."""
    producer = Producer({"bootstrap.servers": f"{HOST}:{side.kafka.port}", "log_level": 0})
    for partition, count in counts.items():
        for _ in range(count):
            producer.produce(TOPIC, b"foreign", partition=partition)
    assert producer.flush(ANSWER_SECONDS) == 0
    return counts


def read_keys(
    side: OrderSide, starts: dict[int, int], until: dict[int, int]
) -> Sequence[tuple[int, str]]:
    """Return partition and key of each record between these offsets."""
    address = f"{HOST}:{side.kafka.port}"
    wanted = sum(until.values()) - sum(starts.values())
    with closing(Consumer({"bootstrap.servers": address, "group.id": "keys"})) as consumer:
        consumer.assign([TopicPartition(TOPIC, *where) for where in starts.items()])
        found = consumer.consume(wanted, ANSWER_SECONDS)
        assert len(found) == wanted
        return [(message.partition(), message.key().decode()) for message in found]


def postponed(relay: Service) -> int:
    """Return how often an event was put off, as the relay has logged it."""
    return sum(line["count"] for line in relay.logged("events.postponed"))


def twice(found: Counter[str]) -> set[str]:
    """Return the orders with two records; none has more."""
    assert set(found.values()) <= {1, 2}
    return {order_id for order_id, count in found.items() if count > 1}
