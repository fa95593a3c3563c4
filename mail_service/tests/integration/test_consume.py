"""One replica of the real command, between a real topic and a relay that can be believed."""

import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness import (
    Environment,
    Ledger,
    Replica,
    Replicas,
    Topic,
    mailed,
    once,
    run,
    wait_for,
    wait_until_sent,
)
from records import Row, order, orders
from sink import Rule, Sink
from sqlalchemy import Engine

from mail_service.settings import TEST_TIMING

NOT_BEGUN = "not begun"
FROM_SPRING = Path(__file__).parents[3] / "shared_schemas" / "examples/valid/from-spring.json"


def verdicts(replica: Replica, order_id: str) -> list[str]:
    """Return what the replica made of each attempt at an order's mail, if it began."""
    return [
        line["verdict"]
        for line in replica.logged()
        if line["event"] == "mail.judged"
        and line["order_id"] == order_id
        and line["reason"] != NOT_BEGUN
    ]


def is_breaker_open(line: Row) -> bool:
    """Say whether a log line tells of the breaker's opening."""
    return line["event"] == "breaker.changed" and bool(line["is_open"])


@pytest.fixture(scope="module")
def standing(
    environment: Environment, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Replicas]:
    """Start the one replica that these tests share, again when one of them ended it."""
    with Replicas(environment, tmp_path_factory.mktemp("replicas")) as replicas:
        yield replicas


@pytest.fixture
def topic(session_topic: Topic) -> Topic:
    """Return the topic as the last test left it."""
    if not session_topic.exists():
        session_topic.recreate()
    return session_topic


@pytest.fixture
def ledger_rows(session_engine: Engine) -> Ledger:
    """Return the ledger as the last test left it."""
    return Ledger(session_engine)


@pytest.fixture
def replica(standing: Replicas, topic: Topic, ledger_rows: Ledger, sink: Sink) -> Replica:
    """Return the replica, which has nothing to do and knows no order."""
    replica = standing.running()
    if replica is None or not is_idle(ledger_rows, topic):
        standing.stop()
        ledger_rows.clear()
        topic.recreate()
        replica = standing.start()
        replica.wait_until_placed()
    ledger_rows.change("DELETE FROM deliveries")
    ledger_rows.change("DELETE FROM dead_letters")
    sink.forget()
    replica.forget()
    return replica


def is_idle(ledger: Ledger, topic: Topic) -> bool:
    """Say whether everything was taken in and no mail is under way or due."""
    waiting = ledger.rows("SELECT FROM deliveries WHERE owner IS NOT NULL OR due_at IS NOT NULL")
    return not waiting and ledger.positions() == topic.ends()


def test_every_event_becomes_one_mail(
    replica: Replica, topic: Topic, sink: Sink, ledger_rows: Ledger
) -> None:
    """60 accepted, 60 SENT; position and commit stand at the end of each partition."""
    records = orders(60)

    topic.send(records)

    wait_until_sent(ledger_rows, 60, replica)
    assert mailed(sink) == once(records)
    assert {mail.recipient for mail in sink.accepted()} == {
        f"customer-{number}@example.com" for number in range(60)
    }
    assert ledger_rows.states() == {"SENT": 60}
    assert ledger_rows.positions() == topic.ends()
    wait_for(topic.commits, lambda commits: commits == topic.ends())


@pytest.mark.fault("F-P6")
def test_an_event_of_a_spring_producer_becomes_a_mail(
    replica: Replica, topic: Topic, sink: Sink, ledger_rows: Ledger
) -> None:
    """Four fields, integers, a type header, no key, no ce_ headers."""
    example = json.loads(FROM_SPRING.read_text(encoding="utf-8"))

    topic.send([{"value": json.dumps(example["value"]), "headers": example["headers"]}])

    wait_until_sent(ledger_rows, 1, replica)
    (mail,) = sink.accepted()
    assert (mail.recipient, mail.order_id) == ("minji@example.com", "1001")
    assert mail.message_id == "<order-confirmation.1001@shop.example>"


@pytest.mark.fault("F-K18", "F-K20")
def test_a_redelivered_event_sends_no_second_mail(
    replica: Replica, topic: Topic, sink: Sink, ledger_rows: Ledger
) -> None:
    """Neither the same record again, nor another event of the same order."""
    records = orders(10)
    topic.send(records)
    wait_until_sent(ledger_rows, 10, replica)

    topic.send([*records, *(order(number, email="other@example.com") for number in range(10))])

    wait_for(ledger_rows.positions, lambda positions: positions == topic.ends())
    topic.send([order("last")])
    wait_until_sent(ledger_rows, 11, replica)
    assert mailed(sink) == once([*records, order("last")])


def test_a_position_that_was_set_back_while_running_sends_no_second_mail(
    replica: Replica, topic: Topic, sink: Sink, ledger_rows: Ledger
) -> None:
    """The replica notices with its next batch, reads anew, and every order is known."""
    before = ledger_rows.positions()
    records = orders(10)
    topic.send(records)
    wait_until_sent(ledger_rows, 10, replica)
    for partition, next_offset in before.items():
        ledger_rows.change(
            "UPDATE positions SET next_offset = :next_offset, epoch = epoch + 1,"
            " accepted_until = next_offset WHERE partition = :partition",
            partition=partition,
            next_offset=next_offset,
        )

    more = [order(f"later-{number}") for number in range(20)]
    topic.send(more)

    wait_until_sent(ledger_rows, 30, replica)
    wait_for(ledger_rows.positions, lambda positions: positions == topic.ends())
    assert mailed(sink) == once([*records, *more])


def test_an_unreadable_record_is_a_dead_letter_and_its_neighbours_are_mailed(
    replica: Replica, topic: Topic, sink: Sink, ledger_rows: Ledger
) -> None:
    """It is kept with its coordinates, bytes, headers and reason."""
    topic.send([{**order(0), "partition": 1}])
    ((partition, offset),) = topic.send(
        [{"value": b"\xff not JSON", "key": b"k", "partition": 1, "headers": {"h": b"\xfe\x00"}}]
    )
    topic.send([{**order(1), "partition": 1}])

    wait_until_sent(ledger_rows, 2, replica)
    (letter,) = ledger_rows.dead_letters()
    assert (letter["partition"], letter["offset"]) == (partition, offset)
    assert (bytes(letter["key"]), bytes(letter["value"])) == (b"k", b"\xff not JSON")
    assert letter["headers"] == [["h", "\\xfe\\0"]]
    assert letter["reason"] == "not JSON: UnicodeDecodeError"
    assert mailed(sink) == {"order-0": 1, "order-1": 1}


HOSTILE = {
    "the end of time": {"headers": {"ce_time": "9999-12-31T23:59:59Z"}},
    "the beginning of time": {"headers": {"ce_time": "0001-01-01T00:00:00Z"}},
    "an offset no zone has": {"headers": {"ce_time": "2026-01-01T00:00:00+23:59"}},
    "a time before the first year": {"headers": {"ce_time": "0001-01-01T00:00:00+14:00"}},
    "a time stamp after the end of time": {"timestamp": 253_402_300_800_000},
    "headers of a thousand": {"headers": [("ce_type", b"order.created.v1")] * 1000},
    "a header without a value": {"headers": [("ce_time", None)]},
}


@pytest.mark.parametrize("hostile", HOSTILE.values(), ids=HOSTILE.keys())
def test_no_record_stops_the_ones_behind_it(
    replica: Replica, topic: Topic, sink: Sink, ledger_rows: Ledger, hostile: Row
) -> None:
    """Whatever becomes of the record itself, the process lives and the next one is mailed."""
    topic.send([{**order("hostile"), "partition": 0, **hostile}])

    topic.send([{**order("next"), "partition": 0}])

    def is_sent(mail: Row) -> bool:
        assert replica.process.poll() is None, replica.output()
        return mail.get("state") == "SENT"

    wait_for(lambda: ledger_rows.mail("order-next"), is_sent)
    assert mailed(sink)["order-next"] == 1


@pytest.mark.fault("F-S2")
def test_a_mail_refused_for_now_is_retried(
    replica: Replica, topic: Topic, sink: Sink, ledger_rows: Ledger
) -> None:
    """Two 451, then a 250: RETRY, RETRY, SENT."""
    sink.script(Rule("rcpt", "451 4.7.1 later", to="customer-0@", times=2))

    topic.send(orders(3))

    wait_until_sent(ledger_rows, 3, replica)
    # What is written is logged a moment later.
    judged = wait_for(lambda: verdicts(replica, "order-0"), lambda found: len(found) == 3)
    assert judged == ["RETRY", "RETRY", "SENT"]
    assert ledger_rows.mail("order-0")["attempts"] == 3
    assert ledger_rows.mail("order-1")["attempts"] == 1
    assert mailed(sink) == once(orders(3))


def test_mails_wait_for_a_relay_that_is_down(
    replica: Replica, topic: Topic, sink: Sink, ledger_rows: Ledger
) -> None:
    """The breaker opens: no attempt is burnt, nothing dies, all are sent once when it is back."""
    records = orders(20)
    topic.send(records[:5])
    wait_until_sent(ledger_rows, 5, replica)
    sink.stop()
    topic.send(records[5:])
    wait_for(replica.logged, lambda lines: any(is_breaker_open(line) for line in lines))
    time.sleep(3 * TEST_TIMING.probe_seconds)
    assert set(ledger_rows.states()) <= {"SENT", "RETRY", "SENDING"}
    waiting = ledger_rows.rows("SELECT attempts FROM deliveries WHERE state = 'RETRY'")
    assert {row["attempts"] for row in waiting} == {0}

    sink.start()

    wait_until_sent(ledger_rows, 20, replica)
    assert mailed(sink) == once(records)


def test_an_address_that_does_not_exist_is_dead(
    replica: Replica, topic: Topic, sink: Sink, ledger_rows: Ledger, environment: Environment
) -> None:
    """Its row keeps the relay's words for an operator, and the others go on."""
    sink.script(Rule("rcpt", "550 5.1.1 no such user", to="customer-1@"))

    topic.send(orders(3))

    wait_for(ledger_rows.states, lambda states: states == {"SENT": 2, "DEAD": 1})
    row = ledger_rows.mail("order-1")
    assert (row["reason"], row["due_at"]) == ("RCPT: 550 5.1.1 no such user", None)
    shown = json.loads(run(environment, "mails", "show", "order-1", "--json").stdout)
    assert [mail["state"] for mail in shown] == ["DEAD"]
    assert "order-1" not in mailed(sink)


@pytest.mark.fault("F-S8")
def test_a_lost_answer_is_resent_once_and_then_held(
    replica: Replica, topic: Topic, sink: Sink, ledger_rows: Ledger
) -> None:
    """Both copies carry one Message-ID; a third needs a person."""
    sink.script(
        Rule("dot", "drop", to="customer-0@", times=1), Rule("dot", "drop", to="customer-1@")
    )

    topic.send(orders(3))

    wait_for(
        ledger_rows.mails,
        lambda mails: (
            len(mails) == 3
            and mails["order-0"]["state"] == "SENT"
            and mails["order-1"]["unknown_count"] == 2
            and mails["order-2"]["state"] == "SENT"
        ),
    )
    for order_id, expected in (
        ("order-0", ["UNKNOWN", "SENT"]),
        ("order-1", ["UNKNOWN", "UNKNOWN"]),
    ):
        judged = wait_for(lambda name=order_id: verdicts(replica, name), lambda each: len(each) > 1)
        assert judged == expected
    row = ledger_rows.mail("order-1")
    assert (row["state"], row["due_at"]) == ("UNKNOWN", None)
    assert mailed(sink) == {"order-0": 2, "order-1": 2, "order-2": 1}
    names = {mail.message_id for mail in sink.accepted() if mail.order_id == "order-1"}
    assert names == {"<order-confirmation.order-1@shop.example>"}


@pytest.mark.fault("F-C9", "F-S11")
def test_a_slow_mail_delays_no_other(
    replica: Replica, topic: Topic, sink: Sink, ledger_rows: Ledger
) -> None:
    """Mails of its own partition go on while one waits for its 250."""
    sink.script(Rule("dot", "delay:6", to="customer-0@"))

    topic.send([{**record, "partition": 0} for record in orders(30)])

    wait_until_sent(ledger_rows, 29, replica)
    assert ledger_rows.mail("order-0")["state"] == "SENDING"
    assert ledger_rows.positions() == topic.ends()
