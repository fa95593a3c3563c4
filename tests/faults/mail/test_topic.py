"""Faults of what several producers write to the topic (faults.toml, F-C*)."""

import json
from datetime import UTC, datetime
from pathlib import Path

import pytest

from tests.support.mail_side import PARTITIONS, MailSide, once
from tests.support.records import Row, order
from tests.support.service import Service
from tests.support.sink import Delay, Rule

EXAMPLES = Path(__file__).parents[3] / "shared_schemas/examples"
HOT = 1_000


@pytest.mark.fault("F-C10")
def test_a_thousand_records_of_one_key(side: MailSide) -> None:
    """They are one mail; behind them and beside them the others are sent before it is."""
    others = [{**order(number), "partition": number % PARTITIONS} for number in range(30)]
    side.send([*[{**order("hot"), "partition": 0}] * HOT, *others])
    slow = Rule("dot", Delay(10), to="customer-hot@")
    side.sink.script(slow)
    with side.running() as replica:
        side.wait_for(lambda: side.states() == {"SENDING": 1, "SENT": len(others)})
        assert side.mails()["order-hot"]["state"] == "SENDING"
        assert side.positions() == side.ends()
        assert replica.metric("mail_records_taken_in_total", **{"as": "duplicate"}) == HOT - 1
        side.wait_until_sent(len(others) + 1)
    assert side.sink.fired(slow) == 1
    assert side.copies() == once([order("hot"), *others])


@pytest.mark.fault("F-C15")
def test_producers_of_several_ages_write_at_once(side: MailSide) -> None:
    """Unknown fields are ignored, an unknown major version is a dead letter, no one else waits."""
    mailed: list[Row] = []
    unreadable: list[Row] = []
    for number in range(5):
        mailed += [
            example("valid/full-korean", f"ours-{number}"),
            example("valid/unknown-field", f"newer-{number}"),
            {**example("valid/from-spring", 1_000 + number), "key": None},
        ]
        unreadable += [example("invalid/unknown-major-version", f"next-{number}")]
    skipped = example("valid/full-korean", "another-fact")
    skipped["headers"]["ce_type"] = "order.cancelled.v1"
    with side.running() as replica:
        for release in (mailed[0::3], mailed[1::3], unreadable, mailed[2::3], [skipped]):
            side.send(release)
        side.wait_until_sent(len(mailed))
        side.wait_for(lambda: len(side.dead_letters()) == len(unreadable))
        side.wait_for(lambda: side.positions() == side.ends())
        # A batch is counted behind its commit.
        side.wait_for(lambda: sum(taken_in(replica).values()) >= 21)
        counts = taken_in(replica)
        assert len(replica.logged("record.unreadable")) == len(unreadable)
        assert replica.is_ready()
    assert counts == {"mail": 15, "dead_letter": 5, "ignored": 1, "duplicate": 0}
    assert {
        (bytes(letter["key"]).decode(), bytes(letter["value"]).decode(), letter["reason"])
        for letter in side.dead_letters()
    } == {
        (record["key"], record["value"], "a major version this release does not know")
        for record in unreadable
    }
    assert side.copies() == dict.fromkeys(map(order_id, mailed), 1)


def example(name: str, order_id: str | int) -> Row:
    """Return the record of an example of the contract, as that of another order placed now."""
    found = json.loads((EXAMPLES / f"{name}.json").read_text(encoding="utf-8"))
    value = {**found["value"], "orderId": order_id}
    headers = found["headers"]
    if "ce_time" in headers:
        headers["ce_time"] = value["orderedAt"] = datetime.now(UTC).isoformat()
    return {"key": str(order_id), "value": json.dumps(value), "headers": headers}


def taken_in(replica: Service) -> dict[str, float]:
    """Return how many records became what."""
    return {
        kind: replica.metric("mail_records_taken_in_total", **{"as": kind})
        for kind in ("mail", "dead_letter", "ignored", "duplicate")
    }


def order_id(record: Row) -> str:
    """Return the order that a record's value tells of."""
    return str(json.loads(record["value"])["orderId"])
