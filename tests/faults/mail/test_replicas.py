"""Faults of replicas and of their group (faults.toml, F-C*)."""

import signal
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import pytest
from confluent_kafka import KafkaException

from tests.support.failpoint import disarm
from tests.support.mail_side import (
    PARTITIONS,
    SLOTS,
    MailSide,
    once,
)
from tests.support.proxy import Blackhole, Pass
from tests.support.records import order, orders
from tests.support.service import Service
from tests.support.sink import Rule, Silence

# `mail_service.senders.DRAIN_SECONDS`, and one of the test profile.
DRAIN_SECONDS = 30.0
FINAL_DOT_SECONDS = 12.0
REPLICAS = 5
BEFORE_THE_DOT = ("m.before_dialogue", "m.after_rcpt", "m.before_dot")
ENDINGS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


@pytest.mark.fault("F-C3")
def test_a_replica_killed_between_the_250_and_sent(side: MailSide) -> None:
    """The row becomes UNKNOWN and is resent once: two copies under one Message-ID."""
    records = orders(20)
    side.send(records)
    with side.running("m.after_250=kill@10", is_waited_for=False) as first:
        assert first.wait_for_end(seconds=60) == -signal.SIGKILL
        (hit,) = first.hits
        assert hit.name == "m.after_250"
        mails = side.mails()
    sent = {order_id for order_id, row in mails.items() if row["state"] == "SENT"}
    with side.running():
        side.wait_until_sent(len(records))
    accepted = side.accepted_of(hit.at)
    assert side.unexplained(accepted=accepted, sent=sent) == []
    twice = side.copies() - once(records)
    assert 1 <= len(twice) <= len({mail.order_id for mail in accepted} - sent)
    assert_one_message_id_each(side)


@pytest.mark.fault("F-C4")
def test_a_replica_killed_between_sent_and_the_kafka_commit(side: MailSide) -> None:
    """Its last commit never arrives: the next one starts at the ledger's position, no copy more."""
    records = orders(6)
    held, killed = "m.after_claim=sleep:4000@3", "m.after_sent=kill@3"
    # Behind a rate nothing is claimed ahead: a mail is a batch.
    one_by_one = {"MAIL_CONCURRENCY": "1", "MAIL_RATE_PER_SECOND": "1000"}
    with side.running(held, killed, **one_by_one) as first:
        side.send(records)
        side.wait_for(lambda: names(first))
        side.wait_for(lambda: sum(committed(side).values()) == 2)
        swallowed = side.kafka.swallowed["up"]
        side.kafka.set(Blackhole())
        assert names(first) == ["m.after_claim"]
        assert first.wait_for_end() == -signal.SIGKILL
        assert names(first) == ["m.after_claim", "m.after_sent"]
        assert side.kafka.swallowed["up"] > swallowed
        side.kafka.set(Pass())
    assert side.states() == {"SENT": 3}
    assert (sum(side.positions().values()), sum(committed(side).values())) == (3, 2)
    with side.running() as second:
        side.wait_until_sent(len(records))
        assert second.metric("mail_records_taken_in_total", **{"as": "duplicate"}) == 0
        side.wait_for(lambda: sum(committed(side).values()) == len(records))
    assert side.copies() == once(records)


@pytest.mark.fault("F-C5")
def test_replicas_killed_before_the_final_dot(side: MailSide) -> None:
    """At three points of the dialogue: UNKNOWN when the lease has ended, then one mail each."""
    records = [{**order(number), "partition": number % PARTITIONS} for number in range(12)]
    with one_partition_each(side, *(f"{point}=kill" for point in BEFORE_THE_DOT)) as replicas:
        side.send(records)
        for point, replica in zip(BEFORE_THE_DOT, replicas, strict=True):
            assert replica.wait_for_end() == -signal.SIGKILL
            assert {(hit.name, hit.action) for hit in replica.hits} == {(point, "kill")}
    claimed = side.mails()
    assert {(row["state"], row["attempts"]) for row in claimed.values()} == {("SENDING", 1)}
    assert {row["partition"] for row in claimed.values()} == set(range(PARTITIONS))
    assert side.sink.accepted() == []
    with side.running() as survivor:
        side.wait_until_sent(len(records))
        assert survivor.metric("mail_leases_ended_total") == len(claimed)
        assert sum(line["count"] for line in survivor.logged("leases.ended")) == len(claimed)
    assert_taken_up_once(side, claimed)
    assert side.copies() == once(records)


@pytest.mark.fault("F-C6", "F-C8")
def test_a_replica_frozen_before_its_dots_and_before_its_commit(side: MailSide) -> None:
    """Running on without lease and partitions it sends no dot, and its failed commit is counted."""
    records = orders(6)
    held = ("m.before_dot=sleep:5000", "m.before_offset_commit=sleep:5000@2")
    with side.running(*held) as frozen:
        side.send(records[:1])
        side.wait_for(lambda: names(frozen) == ["m.before_dot"])
        side.send(records[1:])
        side.wait_for(lambda: "m.before_offset_commit" in names(frozen))
        with frozen_and_disarmed(frozen):
            assert names(frozen) == ["m.before_dot", "m.before_offset_commit"]
            claimed = side.mails()
            assert len(claimed) > 1
            assert {row["state"] for row in claimed.values()} == {"SENDING"}
            assert side.sink.accepted() == []
            survivor = survive(side, len(records))
            before = committed(side)
        side.wait_for(lambda: len(frozen.logged("mail.judged")) == len(claimed))
        judged = [(line["verdict"], line["reason"]) for line in frozen.logged("mail.judged")]
        stopped = ("RETRY", "stopped: no reply before the final dot")
        assert stopped in judged
        assert set(judged) <= {stopped, ("RETRY", "not begun")}
        side.wait_for(lambda: frozen.logged("offsets.not_committed"))
        assert frozen.metric("mail_offsets_not_committed_total") == 1
    assert committed(side) == before
    assert_taken_up_once(side, claimed)
    assert {row["sent_by"] for row in side.mails().values()} == {survivor}
    assert side.copies() == once(records)


@pytest.mark.fault("F-C6")
def test_a_replica_frozen_behind_its_lease_check(side: MailSide) -> None:
    """The one dot that was allowed goes out late: that mail comes twice, every other one once."""
    records = orders(SLOTS)
    with side.running("m.after_lease_check=sleep:5000@1") as frozen:
        side.send(records)
        side.wait_for(lambda: frozen.hits and side.states() == {"SENDING": SLOTS})
        with frozen_and_disarmed(frozen):
            assert side.sink.accepted() == []
            claimed = side.mails()
            survivor = survive(side, len(records))
        side.wait_for(lambda: len(frozen.logged("mail.judged")) == SLOTS)
        assert Counter(line["verdict"] for line in frozen.logged("mail.judged")) == {
            "SENT": 1,
            "RETRY": SLOTS - 1,
        }
    assert sorted(side.copies().values()) == [1] * (SLOTS - 1) + [2]
    assert_one_message_id_each(side)
    assert_taken_up_once(side, claimed)
    assert {row["sent_by"] for row in side.mails().values()} == {survivor}


@pytest.mark.fault("F-C6")
def test_a_replica_frozen_behind_a_250(side: MailSide) -> None:
    """What the relay has accepted by then comes once more, and nothing else does."""
    records = orders(SLOTS)
    with side.running("m.after_250=sleep:5000@1") as frozen:
        side.send(records)
        side.wait_for(lambda: frozen.hits and side.states() == {"SENDING": SLOTS})
        with frozen_and_disarmed(frozen):
            accepted, claimed = side.sink.accepted(), side.mails()
            survivor = survive(side, len(records))
            assert all(side.copies()[mail.order_id] == 2 for mail in accepted)
        side.wait_for(lambda: len(frozen.logged("mail.judged")) == SLOTS)
    assert accepted
    assert set(side.copies().values()) <= {1, 2}
    assert_one_message_id_each(side)
    assert_taken_up_once(side, claimed)
    assert {row["sent_by"] for row in side.mails().values()} == {survivor}


@pytest.mark.fault("F-C11")
def test_replicas_without_a_partition_take_over(side: MailSide) -> None:
    """Five on three partitions are all healthy; one of the idle replaces one that is killed."""
    records = [{**order(number), "partition": number % PARTITIONS} for number in range(60)]
    first, later = records[:30], records[30:]
    with ExitStack() as up:
        replicas = [up.enter_context(side.running(is_waited_for=False)) for _ in range(REPLICAS)]
        side.wait_for(lambda: shares(side) == [0, 0, 1, 1, 1], seconds=90)
        side.wait_for(lambda: all(replica.is_ready() for replica in replicas))
        assert all(replica.is_live() for replica in replicas)
        side.send(first)
        side.wait_until_sent(len(first))
        before = side.members()
        victim, partitions = next((name, held) for name, held in before.items() if held)
        replicas.remove(killed := next(each for each in replicas if is_called(each, victim)))
        killed.kill()
        side.send(later)
        side.wait_for(lambda: victim not in side.members() and shares(side) == [0, 1, 1, 1])
        (heir,) = (name for name, held in side.members().items() if held == partitions)
        assert before[heir] == set()
        side.wait_until_sent(len(records))
        side.wait_for(lambda: all(replica.is_ready() for replica in replicas))
        for replica in replicas:
            replica.signal(signal.SIGTERM)
    mails = side.mails()
    assert {
        mails[record["key"]]["sent_by"] for record in later if record["partition"] in partitions
    } == {heir}
    assert side.copies() == once(records)


@pytest.mark.fault("F-C13")
def test_a_terminated_replica_does_not_wait_for_ever(side: MailSide) -> None:
    """No dot is answered: it ends in its time, the rows are UNKNOWN, one copy more of each."""
    records = orders(SLOTS)
    silent = Rule("dot", Silence())
    side.sink.script(silent)
    with side.running() as first:
        side.send(records)
        side.wait_for(lambda: side.sink.fired(silent) == SLOTS)
        first.signal(signal.SIGTERM)
        assert first.wait_for_end(seconds=DRAIN_SECONDS) == 0
    assert {
        (row["state"], row["attempts"], row["unknown_count"], row["due_at"] is None)
        for row in side.mails().values()
    } == {("UNKNOWN", 1, 1, False)}
    assert side.sql("SELECT * FROM replicas") == []
    side.sink.script()
    with side.running():
        side.wait_until_sent(SLOTS)
    assert side.copies() == once(records) + once(records)
    assert_one_message_id_each(side)


@pytest.mark.fault("F-C14")
def test_a_second_signal_ends_a_replica_sooner(side: MailSide) -> None:
    """It no longer waits for answers, and is as safe: the open dots become UNKNOWN, once."""
    records = [{**order(number), "partition": number % PARTITIONS} for number in range(6)]
    silent = Rule("dot", Silence())
    side.sink.script(silent)
    with one_partition_each(side, *["m.drain=sleep:0"] * len(ENDINGS)) as replicas:
        side.send(records)
        side.wait_for(lambda: side.sink.fired(silent) == len(records))
        for number, replica in zip(ENDINGS, replicas, strict=True):
            replica.signal(number)
        side.wait_for(lambda: all(replica.hits for replica in replicas))
        for number, replica in zip(ENDINGS, replicas, strict=True):
            replica.signal(number)
        codes = [replica.wait_for_end() for replica in replicas]
        seconds = time.time() - min(mail.at for mail in side.sink.accepted())
    assert codes == [0, 0, 0]
    assert seconds < FINAL_DOT_SECONDS
    assert set(side.states()) <= {"SENDING", "UNKNOWN"}
    assert side.sql("SELECT * FROM replicas") == []
    claimed = side.mails()
    side.sink.script()
    with side.running():
        side.wait_until_sent(len(records))
    assert_taken_up_once(side, claimed)
    assert side.copies() == once(records) + once(records)
    assert_one_message_id_each(side)


@contextmanager
def one_partition_each(side: MailSide, *failpoints: str) -> Iterator[list[Service]]:
    """Run a replica with each failpoint; begin when each of them has a partition."""
    with ExitStack() as up:
        replicas = [
            up.enter_context(side.running(failpoint, is_waited_for=False))
            for failpoint in failpoints
        ]
        side.wait_for(lambda: shares(side) == [1] * len(failpoints))
        yield replicas


@contextmanager
def frozen_and_disarmed(replica: Service) -> Iterator[None]:
    """Freeze a replica while the block lasts; its failpoints hold nothing any more."""
    replica.signal(signal.SIGSTOP)
    disarm(replica.journal)
    try:
        yield
    finally:
        replica.signal(signal.SIGCONT)


def survive(side: MailSide, count: int) -> str:
    """Run another replica until so many mails are SENT; return its name."""
    with side.running() as survivor:
        side.wait_until_sent(count)
        (name,) = (name for name in side.members() if is_called(survivor, name))
    return name


def is_called(replica: Service, name: str) -> bool:
    """Say whether a member's name, name-host-pid, is that of a replica."""
    return name.endswith(f"-{replica.pid}")


def names(service: Service) -> list[str]:
    """Return which failpoints acted, in their order."""
    return [hit.name for hit in service.hits]


def shares(side: MailSide) -> list[int]:
    """Return how many partitions the members have, the least first."""
    # A broker that has just come up does not know yet who keeps the group.
    with suppress(KafkaException):
        return sorted(len(partitions) for partitions in side.members().values())
    return []


def committed(side: MailSide) -> dict[int, int]:
    """Return what the group has committed, of the partitions of which it has."""
    return {partition: offset for partition, offset in side.commits().items() if offset > 0}


def assert_taken_up_once(side: MailSide, claimed: dict[str, dict[str, Any]]) -> None:
    """See that what was claimed at the fault was UNKNOWN once and went out at the next attempt."""
    mails = side.mails()
    assert {
        (mails[key]["state"], mails[key]["attempts"], mails[key]["unknown_count"])
        for key in claimed
    } == {("SENT", 2, 1)}


def assert_one_message_id_each(side: MailSide) -> None:
    """All copies of a mail are one mail to whoever compares."""
    accepted = side.sink.accepted()
    assert len({(m.order_id, m.message_id) for m in accepted}) == len(
        {m.order_id for m in accepted}
    )
