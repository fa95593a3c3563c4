"""When a replica holds back: the breaker, the group's rate, a pause, gaps, a ledger not its own."""

import time
from collections.abc import Iterator

import pytest
from harness import (
    Ledger,
    Replica,
    Replicas,
    Topic,
    mailed,
    once,
    run_until_sent,
    wait_for,
    wait_until_sent,
)
from records import Row, order, orders
from sink import Drop, Rule, Sink

from mail_service.senders import most_in_hand
from mail_service.settings import TEST_TIMING

SLOTS = 8


@pytest.fixture
def resumed(ledger_rows: Ledger) -> Iterator[Ledger]:
    """Return the ledger; whatever the test does, its claims are free afterwards."""
    yield ledger_rows
    ledger_rows.change("UPDATE control SET is_paused = false, tokens = 0")


@pytest.mark.fault("F-S6")
@pytest.mark.parametrize(
    ("stage", "reply"),
    [
        ("banner", "554 5.7.1 no service"),
        ("ehlo", "421 4.3.2 not now"),
        ("mail", "530 5.7.0 authenticate first"),
        ("rcpt", "550 5.1.8 your sender is bad"),
        ("dot", "421 4.3.2 shutting down"),
    ],
)
def test_the_relays_own_trouble_kills_no_mail_and_burns_no_attempt(
    replicas: Replicas, topic: Topic, sink: Sink, ledger_rows: Ledger, stage: str, reply: str
) -> None:
    """The breaker opens, a probe a second goes out, and when the relay serves all are sent once."""
    sink.script(trouble := Rule(stage, reply))
    records = orders(100)
    topic.send(records)
    replica = replicas.start()
    wait_for(lambda: sink.fired(trouble), lambda fired: fired >= 3)
    touched = ledger_rows.rows("SELECT state, attempts FROM deliveries")
    assert {row["state"] for row in touched} <= {"SENDING", "RETRY"}
    assert {row["attempts"] for row in touched if row["state"] == "RETRY"} <= {0}
    most = most_in_hand(SLOTS, is_rate_limited=False)
    assert len(touched) <= most + sink.fired(trouble)

    sink.script()

    wait_until_sent(ledger_rows, len(records), replica)
    assert mailed(sink) == once(records)


@pytest.mark.fault("F-S8")
def test_a_relay_that_loses_every_answer_touches_few_orders(
    replicas: Replicas, topic: Topic, sink: Sink, ledger_rows: Ledger
) -> None:
    """Journaled and dropped: the breaker opens at once, and no order has more than two copies.

    What was claimed ahead is given back before it meets the relay.
    """
    sink.script(lost := Rule("dot", Drop(is_accepted=True)))
    topic.send(orders(1000))
    began = time.monotonic()
    replicas.start()
    wait_for(lambda: sink.fired(lost), lambda fired: fired >= SLOTS + 4)

    copies = mailed(sink)
    probes = (time.monotonic() - began) / TEST_TIMING.probe_seconds + 1

    assert max(copies.values()) <= 2
    assert SLOTS / 2 <= len(copies) <= SLOTS + probes
    rows = ledger_rows.mails()
    assert {row["state"] for row in rows.values()} <= {"UNKNOWN", "SENDING", "RETRY"}
    given_back = {
        order_id
        for order_id, row in rows.items()
        if row["state"] == "RETRY" and not row["unknown_count"]
    }
    assert copies.keys().isdisjoint(given_back)
    assert {rows[order_id]["attempts"] for order_id in given_back} <= {0}


def test_three_replicas_together_keep_to_the_rate(
    replicas: Replicas, topic: Topic, sink: Sink, ledger_rows: Ledger
) -> None:
    """In no second does the relay see more than the group's rate and a tenth.

    A sink that is held up for a moment sees more at once: one backlog of some must show it.
    """
    rate, count = 40, 200
    for _ in range(3):
        replica = replicas.start(MAIL_RATE_PER_SECOND=str(rate))
    most, seconds = float("inf"), float("inf")
    sent: list[Row] = []
    while (most > 1.1 * rate or seconds > 1.6 * count / rate) and len(sent) < 3 * count:
        records = [order(f"{len(sent)}-{number}") for number in range(count)]
        topic.send(records)
        sent += records
        wait_until_sent(ledger_rows, len(sent), replica)

        times = sorted(mail.at for mail in sink.accepted()[-count:])
        # The first ones come together, when the connections are open.
        times = [at for at in times if at > times[0] + 1]
        seconds = times[-1] - times[0]
        most = max(sum(start <= at < start + 1 for at in times) for start in times)
    assert most <= 1.1 * rate
    assert seconds <= 1.6 * count / rate
    assert mailed(sink) == once(sent)


def test_a_pause_stops_every_claim_and_its_end_starts_them(
    replicas: Replicas, topic: Topic, sink: Sink, resumed: Ledger
) -> None:
    """Neither fresh mails nor due ones are claimed; the replica stays in the group."""
    resumed.change("UPDATE control SET is_paused = true")
    records = orders(20)
    topic.send(records)
    replica = replicas.start()
    replica.wait_until_placed()
    time.sleep(2)
    assert resumed.states() == {}

    resumed.change("UPDATE control SET is_paused = false")

    wait_until_sent(resumed, len(records), replica)
    assert mailed(sink) == once(records)


def test_whom_this_environment_may_not_write_to_waits_for_a_person(
    replicas: Replicas, topic: Topic, sink: Sink, ledger_rows: Ledger
) -> None:
    """Outside production only those named get mail; the others' rows say why."""
    topic.send(orders(4))
    replicas.start(MAIL_ONLY_TO="customer-1@example.com, @elsewhere.example")

    wait_for(ledger_rows.states, lambda states: states == {"SENT": 1, "HELD": 3})

    assert set(mailed(sink)) == {"order-1"}
    held = ledger_rows.mail("order-0")
    assert (held["reason"], held["due_at"]) == ("MAIL_ONLY_TO does not name the recipient", None)


def test_a_suspect_waits_and_its_neighbours_go(
    replicas: Replicas, topic: Topic, sink: Sink, ledger_rows: Ledger
) -> None:
    """A refusal that may be the relay's is neither final nor a reason to stop."""
    sink.script(Rule("dot", "554 5.7.1 looks like spam", to="customer-1@"))
    topic.send(orders(5))
    replicas.start()

    wait_for(ledger_rows.states, lambda states: states == {"SENT": 4, "RETRY": 1})

    row = ledger_rows.mail("order-1")
    assert (row["attempts"], row["suspected_at"] is not None) == (1, True)


@pytest.mark.fault("F-K9")
def test_a_partition_whose_position_has_expired_stops_until_a_person_decides(
    replicas: Replicas, topic: Topic, sink: Sink, ledger_rows: Ledger
) -> None:
    """The gap is written down, the others go on, and /readyz is red."""
    records = [{**record, "partition": index % 3} for index, record in enumerate(orders(30))]
    topic.send(records)
    run_until_sent(replicas, ledger_rows, 30)
    more = [
        {**record, "partition": index % 3} for index, record in enumerate(orders(60)) if index >= 30
    ]
    topic.send(more)
    topic.delete_before(0, ledger_rows.positions()[0] + 4)

    second = replicas.start()

    wait_for(lambda: len(mailed(sink)), lambda count: count == 50)
    (gap,) = wait_for(lambda: ledger_rows.rows("SELECT * FROM gaps"), bool)
    assert (gap["partition"], gap["end_offset"] - gap["first_offset"]) == (0, 4)
    assert gap["reason"] == "expired before it was read"
    (found,) = wait_for(
        lambda: [line for line in second.logged() if line["event"] == "gap.found"], bool
    )
    assert found["partition"] == 0
    assert second.status("readyz") == 503
    assert second.status("livez") == 200

    # What `positions accept-gap` does.
    ledger_rows.change(
        "UPDATE positions SET next_offset = :end, epoch = epoch + 1 WHERE partition = 0",
        end=gap["end_offset"],
    )
    wait_for(lambda: len(mailed(sink)), lambda count: count == 56)
    wait_for(lambda: second.status("readyz"), lambda status: status == 200)


def test_a_topic_made_anew_is_read_from_its_start_and_leaves_a_gap(
    replicas: Replicas, topic: Topic, sink: Sink, ledger_rows: Ledger
) -> None:
    """What was not read of the old one is written down; the new one's mails go out."""
    topic.send(orders(10))
    run_until_sent(replicas, ledger_rows, 10)
    topic.recreate()
    topic.send(orders(20))

    wait_until_sent(ledger_rows, 20, replicas.start())

    gaps = ledger_rows.rows("SELECT * FROM gaps")
    assert {gap["reason"] for gap in gaps} == {"topic recreated"}
    assert mailed(sink) == once(orders(20))


@pytest.mark.fault("F-L5")
def test_a_ledger_that_forgot_what_the_group_read_is_refused(
    replicas: Replicas, topic: Topic, sink: Sink, ledger_rows: Ledger
) -> None:
    """Restored or emptied, it would mail everybody again: the replica ends and says so."""
    topic.send(orders(10))
    run_until_sent(replicas, ledger_rows, 10)
    ledger_rows.clear()

    refused: Replica = replicas.start()

    assert refused.process.wait(30) == 3
    assert "was lost, restored or is another's" in refused.output()
    assert mailed(sink) == once(orders(10))


@pytest.mark.fault("F-L7")
def test_a_ledger_of_another_cluster_is_refused(
    replicas: Replicas, topic: Topic, sink: Sink, ledger_rows: Ledger
) -> None:
    """Offsets of one cluster mean nothing in another."""
    topic.send(orders(3))
    run_until_sent(replicas, ledger_rows, 3)
    ledger_rows.change("UPDATE positions SET cluster_id = 'another'")

    refused = replicas.start()

    assert refused.process.wait(30) == 3
    assert "is of the cluster another" in refused.output()


@pytest.mark.fault("F-X3")
@pytest.mark.parametrize(
    ("found", "said"), [("0001", "its schema is 0001, older than"), (None, "its schema is none")]
)
def test_a_ledger_older_than_the_code_is_refused(
    replicas: Replicas, ledger_rows: Ledger, found: str | None, said: str
) -> None:
    """A job that was not run is named, before anything is read."""
    (before,) = ledger_rows.rows("SELECT version_num FROM alembic_version")
    ledger_rows.change("DELETE FROM alembic_version")
    try:
        if found:
            ledger_rows.change("INSERT INTO alembic_version VALUES (:found)", found=found)
        refused = replicas.start()
        assert refused.process.wait(30) == 3
    finally:
        ledger_rows.change("DELETE FROM alembic_version")
        ledger_rows.change(
            "INSERT INTO alembic_version VALUES (:found)", found=before["version_num"]
        )
    assert said in refused.output()
    assert "mail-service migrate" in refused.output()


def test_a_ledger_newer_than_the_code_is_fine(
    replicas: Replicas, topic: Topic, sink: Sink, ledger_rows: Ledger
) -> None:
    """It is expanded before the code that needs it comes."""
    (before,) = ledger_rows.rows("SELECT version_num FROM alembic_version")
    ledger_rows.change("UPDATE alembic_version SET version_num = '9999'")
    try:
        topic.send(orders(3))
        wait_until_sent(ledger_rows, 3, replicas.start())
    finally:
        ledger_rows.change(
            "UPDATE alembic_version SET version_num = :found", found=before["version_num"]
        )


def test_a_replica_that_finds_no_ledger_waits_for_it(
    replicas: Replicas, topic: Topic, sink: Sink, ledger_rows: Ledger
) -> None:
    """Started before its database, it is alive and not ready, and ends cleanly when told to."""
    early = replicas.start(DATABASE_URL="postgresql://mail:mail@127.0.0.1:1/mail")
    wait_for(early.logged, lambda lines: any(x["event"] == "ledger.not_reached" for x in lines))
    assert (early.status("livez"), early.status("readyz")) == (200, 503)
    assert early.terminate() == 0


@pytest.mark.fault("F-L6")
def test_a_topic_that_outlives_the_ledgers_memory_is_refused(
    replicas: Replicas, topic: Topic, ledger_rows: Ledger
) -> None:
    """A record whose closed row was purged would be mailed again: exit 3, and nothing is read."""
    topic.configure({"retention.ms": str(401 * 24 * 3600 * 1000)})
    topic.send(orders(1))
    replica = replicas.start()

    assert replica.process.wait(30) == 3
    assert "401 days" in replica.output()
    assert ledger_rows.states() == {}


def test_a_replica_forgets_what_nothing_can_bring_back(
    replicas: Replicas, topic: Topic, ledger_rows: Ledger
) -> None:
    """An old mail whose record has expired, and not its neighbour whose record has not."""
    topic.send({**record, "partition": 0} for record in orders(2))
    run_until_sent(replicas, ledger_rows, 2)
    ledger_rows.change("UPDATE deliveries SET taken_in_at = now() - interval '401 days'")
    topic.delete_before(0, 1)

    replicas.start()

    wait_for(ledger_rows.states, lambda states: states == {"SENT": 1})
    assert ledger_rows.mail("order-1")
