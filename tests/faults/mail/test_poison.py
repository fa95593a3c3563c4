"""Faults of records: what can never become a mail, among records that do (faults.toml, F-P*)."""

import functools
import hashlib
import json
import random
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import pytest
from confluent_kafka import Producer
from confluent_kafka.admin import (
    AdminClient,
    AlterConfigOpType,
    ConfigEntry,
    ConfigResource,
    ResourceType,
)

from deploy.embedded.ports import HOST
from tests.support.mail_side import KAFKA_SECONDS, TOPIC, MailSide, once
from tests.support.records import Row, order
from tests.support.scale import scaled
from tests.support.service import Service

GOOD = 5_000
TIMES_EACH = 50
# One order in so many comes twice.
TWICE_EVERY = 10
MEGABYTE = 1_000_000
LARGEST_BATCH_BYTES = 4 * MEGABYTE
LARGEST_VALUE_BYTES = 100 * MEGABYTE
BOMB_BYTES = 4 * MEGABYTE
LARGE_BOMB_BYTES = 8 * MEGABYTE
LARGE_BOMBS = 20
# More than librdkafka unpacks.
MOST_UNPACKED_BYTES = 95 * MEGABYTE
REPLICA_BYTES = 120 * MEGABYTE
KEPT_BYTES = 64 * 1024
HEADER_BYTES = 500_000
YEAR_10000 = 253_402_300_800_000
TAKEN_IN = "mail_records_taken_in_total"
SEED = 7

NOT_TEXT = "not JSON: UnicodeDecodeError"
NOT_JSON = "not JSON: JSONDecodeError"
NOT_SAID_CLEARLY = "not JSON: ValueError"
TOO_LONG = "longer than a megabyte"
NO_RECIPIENT = "cannot be rendered: the recipient's domain or letters"
HALF_A_LETTER = "cannot be rendered: half a letter in the text"

Becomes = Literal["dead letter", "ignored", "DEAD mail", "mailed"]
Make = Callable[[str], Row]


@dataclass(frozen=True, slots=True)
class Poison:
    """A kind of record, what becomes of it and why; `make` makes one from an order's number."""

    fault: str
    name: str
    becomes: Becomes
    reason: str | None
    make: Make
    compression: str = "none"


@dataclass(frozen=True, slots=True)
class Sent:
    """A record as it went out, and where it is in the topic; `poison` is None for a good one."""

    order_id: str
    poison: Poison | None
    record: Row
    where: tuple[int, int]


def poisons(*, bomb_bytes: int = BOMB_BYTES) -> list[Poison]:
    """Return every kind that the tests know, and what becomes of it."""
    letter, ignored, dead, mailed = Becomes.__args__
    bomb = with_value(lambda value: value + b" " * bomb_bytes)
    return [
        Poison("F-P1", "cut off", letter, NOT_JSON, with_value(lambda value: value[:-1])),
        Poison("F-P1", "no bytes", letter, NOT_JSON, with_value(lambda _: b"")),
        Poison(
            "F-P2", "list", letter, broken("_schema"), with_value(lambda value: b"[%b]" % value)
        ),
        Poison("F-P2", "null", letter, broken("_schema"), with_value(lambda _: b"null")),
        Poison("F-P3", "no address", letter, broken("email"), with_fields(email=None)),
        Poison("F-P3", "float", letter, broken("amount"), with_fields(amount=570.5)),
        Poison(
            "F-P4",
            "version",
            letter,
            "a major version this release does not know",
            with_headers(("ce_type", b"order.created.v2")),
        ),
        Poison("F-P4", "type", ignored, None, with_headers(("ce_type", b"order.cancelled.v1"))),
        Poison("F-P5", "no value", ignored, None, with_record(value=None)),
        Poison("F-P7", "key", letter, "the key contradicts orderId", with_record(key="order-0")),
        Poison("F-P8", "Latin-1", letter, NOT_TEXT, with_encoding("latin-1")),
        Poison("F-P8", "UTF-16", letter, NOT_TEXT, with_encoding("utf-16")),
        Poison("F-P8", "byte order mark", letter, NOT_JSON, with_encoding("utf-8-sig")),
        Poison("F-P9", "huge", letter, TOO_LONG, with_fields(more="x" * MEGABYTE)),
        Poison(
            "F-P10",
            "deep",
            letter,
            "not JSON: RecursionError",
            with_value(lambda _: b"[" * 100_000),
        ),
        Poison("F-P11", "NaN", letter, NOT_SAID_CLEARLY, with_member(b'"amount": NaN')),
        Poison("F-P11", "Infinity", letter, NOT_SAID_CLEARLY, with_member(b'"more": [-Infinity]')),
        Poison("F-P11", "1e999", letter, NOT_SAID_CLEARLY, with_member(b'"more": 1e999')),
        Poison(
            "F-P12", "address twice", letter, NOT_SAID_CLEARLY, with_member(b'"email": "a@b.c"')
        ),
        Poison(
            "F-P12",
            "twice, deep within",
            letter,
            NOT_SAID_CLEARLY,
            with_member(b'"more": [{"a": 1, "a": 1}]'),
        ),
        Poison("F-P13", "order id", letter, broken("orderId"), with_fields(orderId="a\ud800")),
        Poison("F-P13", "address", dead, NO_RECIPIENT, with_fields(email="a\ud800@example.com")),
        Poison("F-P13", "name", dead, HALF_A_LETTER, with_item(name="\ud800")),
        Poison("F-P14", "order id", letter, broken("orderId"), with_fields(orderId="a\0")),
        Poison("F-P14", "address", letter, broken("email"), with_fields(email="a\0@example.com")),
        Poison("F-P14", "name", letter, broken("items"), with_item(name="a\0")),
        Poison(
            "F-P14",
            "everywhere",
            letter,
            NOT_JSON,
            with_record(key=b"\0", value=b"\0", headers=[("h", b"\0")]),
        ),
        Poison("F-P15", "zstd", letter, TOO_LONG, bomb, compression="zstd"),
        Poison("F-P15", "gzip", letter, TOO_LONG, bomb, compression="gzip"),
        # The client takes a 0 for now.
        Poison("F-P16", "1970", dead, "expired", with_record(timestamp=1)),
        Poison("F-P16", "none", mailed, None, with_record(timestamp=-1)),
        Poison("F-P16", "below zero", mailed, None, with_record(timestamp=-5)),
        Poison("F-P16", "year 10000", mailed, None, with_record(timestamp=YEAR_10000)),
        Poison("F-P17", "thousand", mailed, None, with_headers(*[("h", b"x" * 100)] * 1000)),
        Poison("F-P17", "huge", mailed, None, with_headers(("h", b"x" * HEADER_BYTES))),
        Poison(
            "F-P17",
            "thousand, cut off",
            letter,
            NOT_JSON,
            with_record(value=b"{", headers=[("h", b"x" * 100)] * 1000),
        ),
        Poison(
            "F-P17",
            "huge, cut off",
            letter,
            NOT_JSON,
            with_record(value=b"{", headers=[("h", b"x" * HEADER_BYTES)]),
        ),
        Poison("F-P18", "domain", dead, NO_RECIPIENT, with_fields(email=f"a@{'é' * 64}.kr")),
        Poison(
            "F-P18",
            "digits",
            dead,
            "cannot be rendered: InvalidOperation",
            with_item(quantity=10**4000),
        ),
        *(
            Poison("F-P19", name, letter, broken("email"), with_fields(email=email))
            for name, email in {
                "header": "a@example.com\r\nBcc: b@example.com",
                "line end": "a@example.com\n",
                "two": "a@example.com, b@example.com",
                "with a name": "A <a@example.com>",
                "nobody": "a",
            }.items()
        ),
    ]


@pytest.mark.fault(
    "F-P1",
    "F-P2",
    "F-P3",
    "F-P4",
    "F-P5",
    "F-P7",
    "F-P8",
    "F-P9",
    "F-P10",
    "F-P11",
    "F-P12",
    "F-P13",
    "F-P14",
    "F-P15",
    "F-P16",
    "F-P17",
    "F-P18",
    "F-P19",
)
def test_poison_among_good_records(side: MailSide) -> None:
    """Each kind becomes what the table says, counted; every good one is mailed once."""
    check_poison(side, good_count=scaled(GOOD), times_each=scaled(TIMES_EACH))


def check_poison(side: MailSide, *, good_count: int, times_each: int) -> None:
    """Send so many of each through the topic, and compare all that came of them."""
    kinds = poisons()
    with side.running() as replica:
        sent = send_mixed(side, kinds, good_count=good_count, times_each=times_each)
        wait_until_settled(side)
        found = Counter(outcomes(side, sent))
        assert found == {
            (kind.fault, kind.name, kind.becomes, kind.reason): times_each for kind in kinds
        }
        check_dead_letters(side, sent)
        check_mails(side, sent)
        check_counters(side, replica, sent)
        check_log(replica, sent)
        assert replica.is_ready()
        side.wait_for(lambda: side.commits() == side.ends())


@pytest.mark.fault("F-P15")
def test_bombs_that_come_in_one_fetch(side: MailSide) -> None:
    """All at once take no more memory than the values themselves; each is a dead letter."""
    bombs = [kind for kind in poisons(bomb_bytes=LARGE_BOMB_BYTES) if kind.fault == "F-P15"]
    sent = send_mixed(side, bombs, good_count=20, times_each=LARGE_BOMBS // len(bombs))
    largest_batch = max(len(as_bytes(each.record["value"])) for each in sent)
    assert largest_batch > LARGE_BOMB_BYTES
    with side.running() as replica, replica.peak_memory() as peak:
        wait_until_settled(side)
        assert replica.part.exit_code is None
    assert peak() <= REPLICA_BYTES + LARGE_BOMBS * largest_batch
    check_dead_letters(side, sent)
    check_mails(side, sent)


@pytest.mark.fault("F-P15")
def test_a_record_that_cannot_be_unpacked(side: MailSide) -> None:
    """Its partition stops with a gap and an alarm, for a person to decide; the others go on."""
    allow_batches_of(side, LARGEST_BATCH_BYTES)
    whole = order("bomb")
    bomb = {**whole, "value": whole["value"] + " " * MOST_UNPACKED_BYTES}
    before, behind, others = order("before"), order("behind"), [order(n) for n in range(20)]
    placed = send(
        side,
        [
            ("none", {**before, "partition": 0}),
            ("zstd", {**bomb, "partition": 0}),
            *(("none", {**other, "partition": 1}) for other in others),
        ],
    )
    (_, first_offset), _ = placed[1], send(side, [("none", {**behind, "partition": 0})])
    with side.running(is_waited_for=False) as replica:
        side.wait_until_sent(1 + len(others))
        side.wait_for(lambda: side.sql("SELECT 1 FROM gaps"))
        (gap,) = side.sql("SELECT partition, first_offset FROM gaps")
        assert gap == {"partition": 0, "first_offset": first_offset}
        assert side.positions()[0] == first_offset
        side.wait_for(lambda: replica.metric("mail_partitions_waiting") == 1)
        assert not replica.is_ready()
        assert replica.is_live()
    assert side.copies() == once([before, *others])


# What is sent


def with_value(change: Callable[[bytes], bytes]) -> Make:
    return lambda number: {**order(number), "value": change(order(number)["value"].encode())}


def with_fields(**fields: Any) -> Make:
    """Make orders with other fields; None leaves one out."""

    def make(number: str) -> Row:
        value = {**json.loads(order(number)["value"]), **fields}
        said = {name: content for name, content in value.items() if content is not None}
        return {**order(number), "value": json.dumps(said)}

    return make


def with_item(**fields: Any) -> Make:
    return with_fields(
        items=[{"sku": "TEA", "name": "Tea", "quantity": 1, "unitPrice": "1"} | fields]
    )


def with_member(text: bytes) -> Make:
    return with_value(lambda value: b"%b, %b}" % (value[:-1], text))


def with_encoding(encoding: str) -> Make:
    """Make orders of one who writes so, with a letter that is not ASCII."""

    def make(number: str) -> Row:
        value = {**json.loads(order(number)["value"]), "more": "é"}
        return {**order(number), "value": json.dumps(value, ensure_ascii=False).encode(encoding)}

    return make


def with_record(**changes: Any) -> Make:
    return lambda number: {**order(number), **changes}


def with_headers(*headers: tuple[str, bytes]) -> Make:
    return with_record(headers=list(headers))


def broken(field: str) -> str:
    """Return the reason of a record that breaks the contract's schema there."""
    return f"not an OrderCreatedEvent: {field}"


def send_mixed(
    side: MailSide, kinds: Sequence[Poison], *, good_count: int, times_each: int
) -> list[Sent]:
    """Send so many good ones, some of them twice, and each poison so many times among them."""
    allow_batches_of(side, LARGEST_BATCH_BYTES)
    records = [
        (number, None, order(number))
        for count in range(good_count)
        for number in [f"good-{count}"] * (2 if count % TWICE_EVERY == 0 else 1)
    ]
    for position, kind in enumerate(kinds):
        numbers = [f"poison-{position}-{count}" for count in range(times_each)]
        records += [(number, kind, kind.make(number)) for number in numbers]
    random.Random(SEED).shuffle(records)
    places = send(
        side, [(kind.compression if kind else "none", record) for _, kind, record in records]
    )
    return [
        Sent(f"order-{number}", kind, record, where)
        for (number, kind, record), where in zip(records, places, strict=True)
    ]


def send(side: MailSide, records: Iterable[tuple[str, Row]]) -> list[tuple[int, int]]:
    """Write records, each with its compression; return where each is, in the order given."""
    producers: dict[str, Producer] = {}
    places: dict[int, tuple[int, int]] = {}

    def note(number: int, error: object, message: Any) -> None:
        assert error is None, error
        places[number] = (message.partition(), message.offset())

    for number, (compression, record) in enumerate(records):
        if compression not in producers:
            properties = {
                "bootstrap.servers": f"{HOST}:{side.kafka.port}",
                "linger.ms": 0,
                "compression.type": compression,
                "message.max.bytes": LARGEST_VALUE_BYTES,
            }
            producers[compression] = Producer(properties)
        producer = producers[compression]
        producer.produce(TOPIC, on_delivery=functools.partial(note, number), **record)
        producer.poll(0)
    for producer in producers.values():
        assert producer.flush(KAFKA_SECONDS) == 0
    return [places[number] for number in sorted(places)]


def allow_batches_of(side: MailSide, size: int) -> None:
    """Let the topic take larger batches than topics do."""
    entry = ConfigEntry("max.message.bytes", str(size), incremental_operation=AlterConfigOpType.SET)
    topic = ConfigResource(ResourceType.TOPIC, TOPIC, incremental_configs=[entry])
    admin = AdminClient({"bootstrap.servers": f"{HOST}:{side.kafka.port}"})
    admin.incremental_alter_configs([topic])[topic].result(KAFKA_SECONDS)


def wait_until_settled(side: MailSide) -> None:
    """Wait until all was taken in, and no mail is under way or due."""
    ends = side.ends()
    side.wait_for(
        lambda: side.positions() == ends and set(side.states()) <= {"SENT", "DEAD"}, seconds=60.0
    )


# What came of it


def outcomes(side: MailSide, sent: Sequence[Sent]) -> Iterable[tuple[str, str, str, str | None]]:
    """Tell of each poison what became of it, and the reason that is written down."""
    letters = {(row["partition"], row["offset"]): row["reason"] for row in side.dead_letters()}
    mails = side.mails()
    states = {"SENT": "mailed", "DEAD": "DEAD mail"}
    for each in sent:
        if each.poison is None:
            continue
        became, reason = "ignored", None
        if each.where in letters:
            became, reason = "dead letter", letters[each.where]
        elif each.order_id in mails:
            row = mails[each.order_id]
            became, reason = states[row["state"]], row["reason"]
        yield each.poison.fault, each.poison.name, became, reason


def check_dead_letters(side: MailSide, sent: Sequence[Sent]) -> None:
    """Each is there once, with its coordinates, key and headers, its beginning and the digest."""
    letters = {(row["partition"], row["offset"]): row for row in side.dead_letters()}
    expected = {each.where: each.record for each in of(sent, "dead letter")}
    assert len(side.dead_letters()) == len(letters)
    assert letters.keys() == expected.keys()
    assert len({row["topic_id"] for row in letters.values()}) == 1
    for where, row in letters.items():
        record = expected[where]
        value = as_bytes(record["value"])
        assert bytes(row["key"]) == as_bytes(record["key"])
        assert bytes(row["value"]) == value[:KEPT_BYTES]
        assert row["value_sha256"] == hashlib.sha256(value).hexdigest()
        headers = [[name, shown(content)] for name, content in record.get("headers", [])]
        if len(json.dumps(headers)) <= KEPT_BYTES:
            assert row["headers"] == headers
        assert len(json.dumps(row["headers"])) <= KEPT_BYTES


def check_mails(side: MailSide, sent: Sequence[Sent]) -> None:
    """Each that was to be mailed was accepted once; DEAD ones keep their event."""
    dead = {each.order_id: each.record for each in of(sent, "DEAD mail")}
    mailed = {each.order_id for each in sent if each.poison is None}
    mailed |= {each.order_id for each in of(sent, "mailed")}
    mails = side.mails()
    assert side.copies() == dict.fromkeys(mailed, 1)
    assert {order_id for order_id, row in mails.items() if row["state"] == "SENT"} == mailed
    assert {order_id for order_id, row in mails.items() if row["state"] == "DEAD"} == set(dead)
    for order_id, record in dead.items():
        assert bytes(mails[order_id]["event"]) == as_bytes(record["value"])
        assert mails[order_id]["attempts"] == (mails[order_id]["reason"] != "expired")
    expected = {f"customer-{order_id.removeprefix('order-')}@example.com" for order_id in mailed}
    assert {mail.recipient for mail in side.sink.accepted()} == expected
    assert not any(b"\nBcc:" in side.sink.content(mail) for mail in side.sink.accepted())


def check_counters(side: MailSide, replica: Service, sent: Sequence[Sent]) -> None:
    """Every record is counted once, as what it became; a mail is a row of the ledger."""
    letters, ignored = of(sent, "dead letter"), of(sent, "ignored")
    mails = {each.order_id for each in sent if each not in letters and each not in ignored}
    expired = [each for each in sent if each.poison and each.poison.reason == "expired"]

    def counted() -> dict[str, float]:
        kinds = ("mail", "expired", "duplicate", "dead_letter", "ignored")
        return {kind: replica.metric(TAKEN_IN, **{"as": kind}) for kind in kinds}

    # A batch is counted behind its commit.
    side.wait_for(lambda: sum(counted().values()) >= len(sent))
    assert counted() == {
        "mail": len(mails) - len(expired),
        "expired": len(expired),
        "duplicate": len(sent) - len(mails) - len(letters) - len(ignored),
        "dead_letter": len(letters),
        "ignored": len(ignored),
    }


def check_log(replica: Service, sent: Sequence[Sent]) -> None:
    """Each dead letter has a line with its coordinates and reason, and no line an address."""
    lines = replica.logged("record.unreadable")
    expected = {each.where: each.poison.reason for each in of(sent, "dead letter") if each.poison}
    found = {(line["partition"], line["offset"]): line["reason"] for line in lines}
    assert len(lines) == len(found)
    assert found == expected
    assert "@example.com" not in replica.part.command.log_path.read_text(encoding="utf-8")


def of(sent: Sequence[Sent], becomes: Becomes) -> list[Sent]:
    """Return the poisons that become this."""
    return [each for each in sent if each.poison and each.poison.becomes == becomes]


def as_bytes(content: str | bytes) -> bytes:
    return content.encode() if isinstance(content, str) else content


def shown(content: bytes) -> str:
    """Return a header's content as it is kept: PostgreSQL's JSON takes no NUL."""
    return content.decode().replace("\0", "\\0")
