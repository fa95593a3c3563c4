"""A customer's address on all its ways through the pair: in no log, and after `erase` nowhere."""

import re
import uuid
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import httpx
import pytest
from confluent_kafka import Consumer, TopicPartition

from deploy.embedded.state import fresh_root
from tests.support import world
from tests.support.backup import samples, written_out
from tests.support.installation import TOPIC, Installation, running
from tests.support.records import order
from tests.support.sink import Rule

STATES = Path(__file__).parents[2] / ".run/personal-data"
# In whatever case and encoding the address is written, this part of it is found.
TOKEN = uuid.uuid4().hex
CANARY = f"Canary.{TOKEN}@Example.com"
NOT_HERE = "@elsewhere.example"
RETENTION = timedelta(days=63)
SILENCE_SECONDS = 10.0


@pytest.fixture(scope="module")
def pair() -> Iterator[Installation]:
    with fresh_root(STATES) as root, running(root) as pair:
        yield pair


@dataclass(frozen=True)
class Spread:
    """Orders with the address: mailed, DEAD and HELD; one whose event waits; the first's key."""

    known: list[str]
    waiting: str
    key: dict[str, str]


@pytest.fixture(scope="module")
def spread(pair: Installation) -> Spread:
    """Send the address every way there is."""
    relay, replica = pair.relay(), pair.replica()
    key = {"Idempotency-Key": str(uuid.uuid4())}
    post_and_be_refused(pair, key)
    pair.sink.script(Rule("dot", f"250 2.0.0 queued for <{CANARY}>"))
    mailed = post(pair, key).json()["id"]
    assert post(pair, key).headers["Idempotent-Replayed"] == "true"
    pair.wait_until_sent([mailed])
    pair.sink.script(
        Rule("rcpt", f"421 4.7.0 not now <{CANARY}>", times=1),
        Rule("rcpt", f"550 5.1.1 <{CANARY}> unknown"),
    )
    (dead,) = pair.place(email=CANARY)
    pair.wait_for(lambda: pair.states([dead]) == {"DEAD": 1})
    # The relay's words were logged, but for the address.
    assert "not now <(address)>" in replica.logged("breaker.changed")[0]["answer"]
    pair.wait_for(
        lambda: "<(address)> unknown" in (replica.logged("mail.judged")[-1]["reason"] or "")
    )
    replica.part.stop()
    pair.sink.script()
    replica = pair.replica(MAIL_ONLY_TO=NOT_HERE)
    (held,) = pair.place(email=CANARY)
    broken = f'{{"orderId": "cut-off", "email": "{CANARY}'
    pair.send(
        order("foreign", email=CANARY),
        {"key": CANARY, "value": broken, "headers": {"reply-to": CANARY}},
        {"key": "utf-16", "value": broken.encode("utf-16-le")},
    )
    pair.wait_for(lambda: pair.states() == {"SENT": 1, "DEAD": 1, "HELD": 2})
    pair.wait_for(lambda: pair.mail_sql("SELECT count(*) FROM dead_letters") == [(2,)])
    known = [mailed, dead, held]
    pair.wait_until_completed(known)
    replica.part.stop()
    relay.part.stop()
    (waiting,) = pair.place(email=CANARY)
    return Spread(known, waiting, key)


def test_an_address_is_in_no_log_and_after_its_erasure_nowhere(
    pair: Installation, spread: Spread
) -> None:
    """Both databases hold it in every state that a mail can wait in, and then neither does."""
    assert logs_with_it(pair) == []
    assert places_with_it(pair) == {"orders", "orders' samples", "ledger"}

    began, email = datetime.now(UTC), CANARY.lower()
    ours = pair.sh(
        'order-service erase --email "$EMAIL" --yes | mail-service erase --yes -', EMAIL=email
    )
    theirs = pair.sh('mail-service erase --email "$EMAIL" --yes', EMAIL=email)
    assert (ours.code, theirs.code) == (0, 0), ours.err + theirs.err
    assert "3 mails erased, 1 orders were not known" in ours.out
    assert "1 mails erased, 0 orders were not known" in theirs.out
    assert not has_it(f"{ours.out}{ours.err}{theirs.out}{theirs.err}")
    until = re.search(rf"the topic {TOPIC} keeps their records, .* until (\S+) at", ours.err)
    assert until
    assert datetime.fromisoformat(until[1]) > began + RETENTION
    assert places_with_it(pair) == set()
    assert logs_with_it(pair) == []


def test_what_was_erased_stays_so(pair: Installation, spread: Spread) -> None:
    """An event that waited goes out without it, nobody is mailed, the topic has what it had."""
    relay, replica = pair.relay(), pair.replica()
    (fresh,) = pair.place()
    pair.wait_until_sent([fresh])
    pair.wait_until_completed([*spread.known, spread.waiting, fresh])
    pair.wait_until_read()
    assert pair.states() == {"SENT": 1, "ERASED": 5}
    assert pair.copies() == {spread.known[0]: 1, fresh: 1}
    again = pair.customer.post("/v1/orders", json=world.order(email=CANARY), headers=spread.key)
    assert again.status_code == 422
    assert places_with_it(pair) == set()
    assert logs_with_it(pair) == []
    assert sorted(records_with_it(pair)) == sorted(
        [*spread.known, "order-foreign", "utf-16", CANARY]
    )
    assert relay.is_ready()
    assert replica.is_ready()


def post(pair: Installation, key: dict[str, str]) -> httpx.Response:
    """Place the order."""
    answer = pair.customer.post("/v1/orders", json=world.order(email=CANARY), headers=key)
    assert answer.status_code == 201
    return answer


def post_and_be_refused(pair: Installation, key: dict[str, str]) -> None:
    """Send what cannot be ordered, with the address in and around its field."""
    item = {"sku": "TEA-GREEN-50", "quantity": 1}
    for body in (
        world.order(email=CANARY, amount="1"),
        world.order(email=CANARY, items=[{**item, "sku": CANARY}]),
        world.order(email=f"{CANARY}@{CANARY}"),
        world.order(**{CANARY: CANARY}),
    ):
        assert pair.customer.post("/v1/orders", json=body, headers=key).status_code == 422


def has_it(text: str) -> bool:
    """Say whether a text has the address, as letters or as bytes written in hexadecimal."""
    codes = (TOKEN.encode().hex(), TOKEN.encode("utf-16-le").hex())
    return any(each in text for each in (TOKEN, *codes))


def places_with_it(pair: Installation) -> set[str]:
    """Name what of the two databases has the address."""
    texts = {
        "orders": written_out(pair.addresses.order_database_url),
        "orders' samples": samples(pair.addresses.order_database_url),
        "ledger": written_out(pair.addresses.mail_database_url),
        "ledger's samples": samples(pair.addresses.mail_database_url),
    }
    return {name for name, text in texts.items() if has_it(text)}


def logs_with_it(pair: Installation) -> list[str]:
    """Return the log lines that have the address, with their files' names."""
    logs = list(pair.logs())
    assert len(logs) > 5
    return [
        f"{log.name}: {line}"
        for log in logs
        for line in log.read_text(errors="replace").splitlines()
        if has_it(line)
    ]


def records_with_it(pair: Installation) -> list[str]:
    """Return the keys of the topic's records that have the address."""
    ends = pair.ends()
    found = []
    servers = {"bootstrap.servers": pair.addresses.kafka_bootstrap_servers, "group.id": "test"}
    with closing(Consumer(servers)) as consumer:
        consumer.assign([TopicPartition(TOPIC, partition, 0) for partition in ends])
        for _ in range(sum(ends.values())):
            message = consumer.poll(SILENCE_SECONDS)
            assert message is not None
            assert message.error() is None
            if has_it(message.key().decode()) or has_it(message.value().hex()):
                found.append(message.key().decode())
    return found
