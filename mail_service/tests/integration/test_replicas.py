"""Replicas of the real command that start, share, end and are killed."""

import time

import pytest
from harness import (
    PARTITIONS,
    Ledger,
    Replica,
    Replicas,
    Topic,
    ids,
    mailed,
    once,
    wait_for,
    wait_until_sent,
)
from records import order, orders
from sink import Rule, Sink

from mail_service.senders import most_in_hand


@pytest.fixture
def replica(replicas: Replicas) -> Replica:
    """Run one replica, which reads every partition."""
    replica = replicas.start()
    replica.wait_until_placed()
    return replica


def test_what_was_there_before_the_first_start_is_mailed(
    replicas: Replicas, topic: Topic, sink: Sink, ledger_rows: Ledger
) -> None:
    """A partition without a position is read from its start."""
    records = orders(20)
    topic.send(records)

    wait_until_sent(ledger_rows, 20, replicas.start())

    assert mailed(sink) == once(records)


@pytest.mark.fault("F-K16")
@pytest.mark.parametrize("move", ["forget_group", "rewind"])
def test_commits_that_are_lost_send_no_second_mail(
    replicas: Replicas,
    replica: Replica,
    topic: Topic,
    sink: Sink,
    ledger_rows: Ledger,
    move: str,
) -> None:
    """The ledger's position counts, Kafka's does not: it is no matter who moved it."""
    records = orders(10)
    topic.send(records)
    wait_until_sent(ledger_rows, 10, replica)
    assert replica.terminate() == 0
    getattr(topic, move)()

    successor = replicas.start()
    topic.send([order("last")])

    wait_until_sent(ledger_rows, 11, successor)
    assert mailed(sink) == once([*records, order("last")])
    wait_for(
        topic.commits,
        lambda commits: all(topic.ends()[number] == end for number, end in commits.items() if end),
    )


@pytest.mark.fault("F-S8")
def test_under_the_policy_hold_a_lost_answer_waits_for_a_person(
    replicas: Replicas, topic: Topic, sink: Sink, ledger_rows: Ledger
) -> None:
    """No second copy is made by itself."""
    sink.script(Rule("dot", "drop", to="customer-0@"))
    topic.send(orders(2))

    replicas.start(MAIL_ON_UNKNOWN="hold")

    wait_for(ledger_rows.states, lambda states: states == {"SENT": 1, "UNKNOWN": 1})
    assert ledger_rows.mail("order-0")["due_at"] is None
    assert mailed(sink) == {"order-0": 1, "order-1": 1}


@pytest.mark.fault("F-C7", "F-S11")
def test_a_replica_whose_slots_are_all_busy_stays_in_the_group(
    replicas: Replicas, topic: Topic, sink: Sink, ledger_rows: Ledger
) -> None:
    """It polls on for longer than Kafka would wait for one that does not, with one mail ahead."""
    replica = replicas.start(MAIL_CONCURRENCY="2", KAFKA_MAX_POLL_INTERVAL_MS="6000")
    replica.wait_until_placed()
    sink.script(Rule("dot", "delay:6.5", times=2))

    topic.send(orders(12))

    all_in_hand = {"SENDING": most_in_hand(2, is_rate_limited=False)}
    wait_for(ledger_rows.states, lambda states: states == all_in_hand)
    time.sleep(1)
    assert ledger_rows.states() == all_in_hand
    wait_until_sent(ledger_rows, 12, replica)
    assert mailed(sink) == once(orders(12))
    placed = [line for line in replica.logged() if line["event"] == "partition.placed"]
    assert len(placed) == PARTITIONS


def test_two_replicas_share_partitions_and_work(
    replicas: Replicas, topic: Topic, sink: Sink, ledger_rows: Ledger
) -> None:
    """Each reads its own, both send, and no order is mailed by both."""
    first, second = replicas.start(), replicas.start()
    shared = wait_for(topic.members, lambda members: len(members) == 2 and all(members.values()))
    for replica in (first, second):
        replica.wait_until_placed(1)
    records = orders(60)

    topic.send(records)

    wait_until_sent(ledger_rows, 60, first)
    assert sorted(number for mine in shared.values() for number in mine) == [0, 1, 2]
    assert mailed(sink) == once(records)
    assert {row["sent_by"] for row in ledger_rows.mails().values()} == set(shared)


@pytest.mark.fault("F-C1")
def test_a_new_replica_takes_partitions_over_in_the_middle_of_work(
    replicas: Replicas, replica: Replica, topic: Topic, sink: Sink, ledger_rows: Ledger
) -> None:
    """A rebalance mails nothing twice and leaves nothing out."""
    sink.script(Rule("dot", "delay:0.5"))
    records = orders(200)
    topic.send(records)
    wait_for(lambda: len(sink.accepted()), lambda count: count > 10)

    second = replicas.start()

    wait_until_sent(ledger_rows, 200, second)
    assert mailed(sink) == once(records)
    assert len({row["sent_by"] for row in ledger_rows.mails().values()}) == 2


@pytest.mark.fault("F-C2")
def test_a_killed_replica_costs_no_mail_and_few_copies(
    replicas: Replicas, topic: Topic, sink: Sink, ledger_rows: Ledger
) -> None:
    """Copies are no more than what the relay had accepted and the ledger did not know."""
    victim, survivor = replicas.start(), replicas.start()
    wait_for(topic.members, lambda members: len(members) == 2 and all(members.values()))
    for replica in (victim, survivor):
        replica.wait_until_placed(1)
    sink.script(Rule("dot", "delay:0.3"))
    records = orders(200)
    topic.send(records)
    wait_for(lambda: len(sink.accepted()), lambda count: count > 60)

    victim.kill()
    in_its_hands = {
        row["order_id"]
        for row in ledger_rows.rows(
            "SELECT order_id FROM deliveries JOIN replicas ON replicas.id = owner"
            " WHERE state = 'SENDING' AND name LIKE :name",
            name=f"%-{victim.pid}",
        )
    }
    # What the victim had written to the relay's socket is still read; its lease runs on.
    time.sleep(1)
    may_be_copied = in_its_hands & set(mailed(sink))

    wait_until_sent(ledger_rows, 200, survivor)
    copied = {order_id for order_id, count in mailed(sink).items() if count > 1}
    assert may_be_copied, "the kill hit nothing"
    assert set(mailed(sink)) == ids(records)
    assert copied <= may_be_copied
    assert max(mailed(sink).values()) <= 2
    assert len({mail.message_id for mail in sink.accepted()}) == 200


@pytest.mark.fault("F-C12")
def test_a_terminated_replica_makes_no_copy_and_leaves_nothing_behind(
    replicas: Replicas, replica: Replica, topic: Topic, sink: Sink, ledger_rows: Ledger
) -> None:
    """SIGTERM under load: dots that went out are answered, other mails are released; exit 0."""
    sink.script(Rule("dot", "delay:0.3"))
    records = orders(120)
    topic.send(records)
    wait_for(lambda: len(sink.accepted()), lambda count: count > 20)

    assert replica.terminate() == 0

    assert 20 < len(sink.accepted()) < 120
    states = ledger_rows.states()
    assert states.pop("SENT") == len(sink.accepted())
    assert states.keys() <= {"RETRY"}
    released = ledger_rows.rows("SELECT attempts FROM deliveries WHERE state = 'RETRY'")
    assert {row["attempts"] for row in released} <= {0}
    assert ledger_rows.rows("SELECT * FROM replicas") == []
    wait_until_sent(ledger_rows, 120, replicas.start())
    assert mailed(sink) == once(records)


def test_an_idle_replica_ends_at_once(replica: Replica, topic: Topic) -> None:
    """SIGTERM: exit 0, well within what an orchestrator grants, and the group is empty."""
    began_at = time.monotonic()

    assert replica.terminate() == 0

    assert time.monotonic() - began_at < 10
    assert topic.members() == {}


def test_a_replica_without_a_topic_waits_for_it(
    replicas: Replicas, topic: Topic, sink: Sink, ledger_rows: Ledger
) -> None:
    """It does not make one; when there is one it reads it."""
    topic.delete()
    replica = replicas.start()
    wait_for(replica.logged, lambda lines: any("probes.served" in line["event"] for line in lines))
    time.sleep(1)
    assert not topic.exists()

    topic.create()
    topic.send(orders(3))

    wait_until_sent(ledger_rows, 3, replica)
