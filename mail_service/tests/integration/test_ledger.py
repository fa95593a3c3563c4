"""Each arrow of the ledger, with real rows."""

import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

import pytest
from harness import Ledger
from sqlalchemy import Engine

from mail_service import ledger, positions
from mail_service.ledger import Mail, NewDeadLetter, NewMail, NotSent
from mail_service.positions import Move, PositionMoved, Start
from mail_service.startup import StartUpRefused

TOPIC_ID = "topic-1"
EVENT = b'{"orderId": "order-1"}'
HOUR = timedelta(hours=1)
LONG_AGO = datetime(2000, 1, 1, tzinfo=UTC)
LEASE_SECONDS = 30.0


def new_mail(order_id: str, *, offset: int = 0, give_up_in: timedelta = 24 * HOUR) -> NewMail:
    """Return a mail as a record makes it."""
    now = datetime.now(UTC)
    return NewMail(
        order_id=order_id,
        message_id=f"<{order_id}@shop.example>",
        event=EVENT,
        event_at=now,
        give_up_at=now + give_up_in,
        topic_id=TOPIC_ID,
        partition=0,
        offset=offset,
    )


def move(began_at: int, next_offset: int, *, epoch: int = 0, partition: int = 0) -> Move:
    """Return how far a batch read."""
    return Move(TOPIC_ID, partition, epoch, began_at, next_offset)


def dead_letter(offset: int) -> NewDeadLetter:
    """Return a record that cannot be read."""
    headers = [("ce_type", "order.created.v1"), ("ce_type", "again")]
    return NewDeadLetter(TOPIC_ID, 0, offset, b"\xff", b"\x00", "digest", headers, "not JSON")


@pytest.fixture
def replica(engine: Engine) -> UUID:
    """Return a replica with a lease."""
    return hire(engine)


def hire(engine: Engine) -> UUID:
    """Give a new replica a lease."""
    replica_id = uuid4()
    with engine.begin() as connection:
        ledger.take_lease(
            connection, replica_id=replica_id, name="replica", lease_seconds=LEASE_SECONDS
        )
    return replica_id


@pytest.fixture
def opened(engine: Engine) -> None:
    """Open partition 0 and 1 at their start."""
    with engine.begin() as connection:
        for partition in (0, 1):
            positions.start_of(
                connection,
                cluster_id="cluster",
                topic_id=TOPIC_ID,
                partition=partition,
                log_start=0,
            )


def take_in(
    engine: Engine,
    replica_id: UUID,
    mails: Sequence[NewMail] = (),
    *,
    moves: Sequence[Move] = (),
    dead_letters: Sequence[NewDeadLetter] = (),
) -> list[Mail]:
    """Take a batch in, in a transaction of its own."""
    with engine.begin() as connection:
        taken_in = ledger.take_in(
            connection,
            replica_id=replica_id,
            mails=mails,
            dead_letters=dead_letters,
            moves=moves,
        )
    return list(taken_in.claimed)


def take_up(engine: Engine, replica_id: UUID, limit: int = 100) -> list[str]:
    """Take due mails up; return their orders."""
    with engine.begin() as connection:
        return [
            mail.order_id
            for mail in ledger.take_up(
                connection,
                replica_id=replica_id,
                lease_until=LONG_AGO,
                in_hand=(),
                limit=limit,
            )
        ]


def end_leases(engine: Engine, *, is_resent: bool = True, delay_seconds: float = 60) -> int:
    """Make UNKNOWN what has no owner."""
    with engine.begin() as connection:
        return ledger.end_leases(
            connection, in_hand=(), is_resent=is_resent, delay_seconds=delay_seconds
        )


def record_open(engine: Engine, mail: Mail, replica_id: UUID, **changes: Any) -> None:
    """Record that a mail was not sent."""
    values = {"state": "RETRY", "reason": "RCPT: 451 later", "due_seconds": 0.0, **changes}
    ended = NotSent(id=mail.id, attempts=mail.attempts, **values)
    with engine.begin() as connection:
        ledger.record_open(connection, [ended], replica_id=replica_id)


def record_sent(engine: Engine, *mails: Mail) -> None:
    """Record a 250 for each."""
    with engine.begin() as connection:
        ledger.record_sent(
            connection,
            [(mail, "250 ok") for mail in mails],
            sent_by="replica-a",
            template_digest="d1",
        )


def lapse(rows: Ledger, replica_id: UUID) -> None:
    """Let a lease have ended."""
    rows.change(
        "UPDATE replicas SET lease_until = now() - interval '1 second' WHERE id = :id",
        id=replica_id,
    )


def seconds_until_due(rows: Ledger, order_id: str) -> float:
    """Return when a mail is due, from now."""
    (row,) = rows.rows(
        "SELECT extract(epoch FROM due_at - now()) AS seconds FROM deliveries"
        " WHERE order_id = :order_id",
        order_id=order_id,
    )
    return float(row["seconds"])


# take in


def test_a_new_order_is_claimed(engine: Engine, ledger_rows: Ledger, replica: UUID) -> None:
    """Its row is SENDING, ours, on its first attempt, and keeps the event's bytes."""
    mail = new_mail("order-1", offset=7)

    (claimed,) = take_in(engine, replica, [mail])

    assert claimed == Mail(
        id=claimed.id,
        order_id="order-1",
        message_id="<order-1@shop.example>",
        event=EVENT,
        event_at=mail.event_at,
        give_up_at=mail.give_up_at,
        attempts=1,
        unknown_count=0,
        suspected_at=None,
    )
    row = ledger_rows.mail("order-1")
    assert (row["state"], row["owner"]) == ("SENDING", replica)
    assert (row["topic_id"], row["partition"], row["offset"]) == (TOPIC_ID, 0, 7)
    assert bytes(row["event"]) == EVENT


def test_a_known_order_is_not_claimed_again(engine: Engine, replica: UUID) -> None:
    """Whoever asks, and among whatever others."""
    take_in(engine, replica, [new_mail("order-1")])

    again = take_in(engine, hire(engine), [new_mail("order-1", offset=1), new_mail("order-2")])

    assert [mail.order_id for mail in again] == ["order-2"]


def test_an_order_twice_in_one_batch_is_claimed_once(
    engine: Engine, ledger_rows: Ledger, replica: UUID
) -> None:
    """A redelivery may come right after its first, which counts, whatever the other says."""
    first, second = (new_mail("order-1", offset=offset) for offset in (3, 4))
    other = replace(second, event=b"{}")

    claimed = take_in(engine, replica, [first, other, new_mail("order-0", offset=5)])

    row = ledger_rows.mail("order-1")
    events = {mail.order_id: mail.event for mail in claimed}
    assert (len(claimed), events) == (2, {"order-0": EVENT, "order-1": EVENT})
    assert (row["offset"], bytes(row["event"])) == (3, EVENT)


@pytest.mark.parametrize("state", ["SENT", "ERASED", "DEAD", "RETRY", "UNKNOWN", "HELD"])
def test_an_order_is_known_in_every_state(
    engine: Engine, ledger_rows: Ledger, replica: UUID, state: str
) -> None:
    """Neither what is closed nor what is open is mailed anew."""
    take_in(engine, replica, [new_mail("order-1")])
    ledger_rows.change(
        "UPDATE deliveries SET state = :state,"
        " event = CASE WHEN :state IN ('SENT', 'ERASED') THEN NULL ELSE event END",
        state=state,
    )

    assert take_in(engine, replica, [new_mail("order-1")]) == []
    assert ledger_rows.states() == {state: 1}


def test_a_batch_moves_its_positions(
    engine: Engine, ledger_rows: Ledger, replica: UUID, opened: None
) -> None:
    """Rows and positions are written together."""
    take_in(engine, replica, [new_mail("order-1")], moves=[move(0, 5), move(0, 3, partition=1)])

    assert ledger_rows.positions() == {0: 5, 1: 3}


def test_a_position_does_not_go_back(
    engine: Engine, ledger_rows: Ledger, replica: UUID, opened: None
) -> None:
    """A batch that ends before it, read by somebody slower, leaves it where it is."""
    take_in(engine, replica, moves=[move(0, 9)])

    take_in(engine, replica, moves=[move(0, 4)])

    assert ledger_rows.positions() == {0: 9, 1: 0}


@pytest.mark.parametrize(
    ("set_back", "batch"),
    [
        ("UPDATE positions SET next_offset = 3 WHERE partition = 0", move(5, 8)),
        ("UPDATE positions SET epoch = 1 WHERE partition = 0", move(5, 8)),
        ("UPDATE positions SET epoch = 1, next_offset = 2 WHERE partition = 0", move(5, 8)),
        ("DELETE FROM positions WHERE partition = 0", move(5, 8)),
    ],
    ids=["set back", "another epoch", "rewound", "gone"],
)
def test_a_batch_from_where_the_position_no_longer_is_writes_nothing(
    engine: Engine, ledger_rows: Ledger, replica: UUID, opened: None, set_back: str, batch: Move
) -> None:
    """Rows, dead letters and the other partition's position are as before."""
    take_in(engine, replica, moves=[move(0, 5)])
    ledger_rows.change(set_back)
    before = ledger_rows.positions()

    with pytest.raises(PositionMoved):
        take_in(
            engine,
            replica,
            [new_mail("order-1", offset=5)],
            moves=[move(0, 4, partition=1), batch],
            dead_letters=[dead_letter(6)],
        )

    assert ledger_rows.mails() == {}
    assert ledger_rows.dead_letters() == []
    assert ledger_rows.positions() == before


def test_two_replicas_with_the_same_records_claim_each_order_once(
    engine: Engine, ledger_rows: Ledger, replica: UUID, opened: None
) -> None:
    """A zombie and its successor take the same batch in at the same time."""
    other = hire(engine)
    first = [new_mail(f"order-{number}", offset=number) for number in range(50)]
    claimed: dict[UUID, list[Mail]] = {}
    barrier = threading.Barrier(2)

    def take(replica_id: UUID, mails: Sequence[NewMail]) -> None:
        barrier.wait()
        claimed[replica_id] = take_in(engine, replica_id, mails, moves=[move(0, 50)])

    threads = [
        threading.Thread(target=take, args=(replica, first)),
        threading.Thread(target=take, args=(other, first[::-1])),
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    orders = [mail.order_id for mails in claimed.values() for mail in mails]
    assert sorted(orders) == sorted(mail.order_id for mail in first)
    assert ledger_rows.positions()[0] == 50


def test_a_zombie_waits_for_the_batch_that_is_being_taken_in(
    engine: Engine, ledger_rows: Ledger, replica: UUID, opened: None
) -> None:
    """Two open transactions on one partition: the later one sees what the first has written."""
    zombie = hire(engine)
    results: list[list[Mail]] = []
    late = threading.Thread(
        target=lambda: results.append(
            take_in(engine, zombie, [new_mail("order-1"), new_mail("order-2")], moves=[move(0, 2)])
        )
    )
    with engine.begin() as connection:
        ledger.take_in(
            connection,
            replica_id=replica,
            mails=[new_mail("order-1")],
            dead_letters=[],
            moves=[move(0, 1)],
        )
        late.start()
        late.join(0.3)
        assert late.is_alive()
    late.join()

    assert [mail.order_id for mail in results[0]] == ["order-2"]
    assert ledger_rows.mail("order-1")["owner"] == replica


def test_a_dead_letter_is_kept_once_with_its_coordinates(
    engine: Engine, ledger_rows: Ledger, replica: UUID, opened: None
) -> None:
    """Bytes that are no text are kept, repeated headers too; a redelivery adds nothing."""
    take_in(engine, replica, dead_letters=[dead_letter(3)], moves=[move(0, 4)])
    take_in(engine, replica, dead_letters=[dead_letter(3)], moves=[move(0, 4)])

    (row,) = ledger_rows.dead_letters()
    assert (row["topic_id"], row["partition"], row["offset"]) == (TOPIC_ID, 0, 3)
    assert (bytes(row["key"]), bytes(row["value"])) == (b"\xff", b"\x00")
    assert row["headers"] == [["ce_type", "order.created.v1"], ["ce_type", "again"]]
    assert row["reason"] == "not JSON"


# positions


def test_a_partition_never_read_is_read_from_its_start(engine: Engine, replica: UUID) -> None:
    """Its position is opened there, and stays when the log's start moves on."""
    with engine.begin() as connection:
        starts = [
            positions.start_of(
                connection,
                cluster_id="cluster",
                topic_id=TOPIC_ID,
                partition=0,
                log_start=log_start,
            )
            for log_start in (4, 9)
        ]

    start = Start(4, 0, "cluster", 0, 0, None)
    assert starts == [start, start]


def test_a_position_belongs_to_its_topic_id(engine: Engine, replica: UUID, opened: None) -> None:
    """A topic made anew under the same name is read from its own start."""
    take_in(engine, replica, moves=[move(0, 9)])

    with engine.begin() as connection:
        start = positions.start_of(
            connection, cluster_id="cluster", topic_id="topic-2", partition=0, log_start=0
        )

    assert start.next_offset == 0


# take up


def put(rows: Ledger, order_id: str, state: str, **values: object) -> None:
    """Put a row into the ledger; times are in seconds from now."""
    rows.change(
        "INSERT INTO deliveries (kind, order_id, campaign, state, message_id, event, event_at,"
        ' topic_id, partition, "offset", give_up_at, due_at, owner, attempts, unknown_count)'
        " VALUES ('order-confirmation', :order_id, '', :state, '<m@x>', :event, now(), 't', 0, 0,"
        " now() + :give_up_in * interval '1 second', now() + :due_in * interval '1 second',"
        " :owner, 1, :unknown_count)",
        **{
            "order_id": order_id,
            "state": state,
            "event": None if state in ("SENT", "ERASED") else EVENT,
            "give_up_in": 3600,
            "due_in": None,
            "owner": None,
            "unknown_count": 0,
            **values,
        },
    )


def test_the_oldest_due_mails_are_taken_up_first(
    engine: Engine, ledger_rows: Ledger, replica: UUID
) -> None:
    """RETRY and UNKNOWN alike; what is not yet due waits."""
    put(ledger_rows, "young", "RETRY", due_in=-1)
    put(ledger_rows, "oldest", "UNKNOWN", due_in=-30, unknown_count=1)
    put(ledger_rows, "old", "RETRY", due_in=-20)
    put(ledger_rows, "tomorrow", "RETRY", due_in=60)

    assert set(take_up(engine, replica, limit=2)) == {"oldest", "old"}
    assert take_up(engine, replica) == ["young"]
    row = ledger_rows.mail("old")
    assert (row["state"], row["owner"], row["attempts"]) == ("SENDING", replica, 2)
    assert row["due_at"] is None


@pytest.mark.parametrize(
    ("state", "values"),
    [
        ("UNKNOWN", {"due_in": None}),
        ("HELD", {"due_in": -1}),
        ("DEAD", {"due_in": -1}),
        ("SENT", {"due_in": -1}),
        ("ERASED", {"due_in": -1}),
        ("SENDING", {"due_in": -1}),
        ("UNKNOWN", {"due_in": -1, "give_up_in": -1}),
    ],
)
def test_what_waits_for_a_person_or_is_closed_is_not_taken_up(
    engine: Engine, ledger_rows: Ledger, replica: UUID, state: str, values: dict[str, object]
) -> None:
    """Only RETRY and UNKNOWN with a due time and time left are."""
    put(ledger_rows, "order-1", state, owner=replica if state == "SENDING" else None, **values)

    assert take_up(engine, replica) == []
    assert ledger_rows.states() == {state: 1}


def test_two_replicas_take_up_different_mails(
    engine: Engine, ledger_rows: Ledger, replica: UUID
) -> None:
    """Neither waits for the other's open transaction, and none is taken twice."""
    for number in range(10):
        put(ledger_rows, f"order-{number}", "RETRY", due_in=-100 + number)

    with engine.begin() as connection:
        mine = ledger.take_up(
            connection, replica_id=replica, lease_until=LONG_AGO, in_hand=(), limit=6
        )
        theirs = take_up(engine, hire(engine), limit=6)

    assert {mail.order_id for mail in mine} == {f"order-{number}" for number in range(6)}
    assert set(theirs) == {f"order-{number}" for number in range(6, 10)}


def test_a_mail_whose_time_is_over_is_dead(
    engine: Engine, ledger_rows: Ledger, replica: UUID
) -> None:
    """It is not tried again, and says why."""
    put(ledger_rows, "late", "RETRY", due_in=-1, give_up_in=-1)
    put(ledger_rows, "in time", "RETRY", due_in=-1, give_up_in=60)

    assert take_up(engine, replica) == ["in time"]
    row = ledger_rows.mail("late")
    assert (row["state"], row["reason"], row["due_at"]) == ("DEAD", "expired", None)
    assert bytes(row["event"]) == EVENT


# leases


def test_what_a_gone_replica_had_claimed_is_unknown(
    engine: Engine, ledger_rows: Ledger, replica: UUID
) -> None:
    """It is due after the delay, in which a late 250 may arrive; others' rows stay theirs."""
    gone = hire(engine)
    take_in(engine, gone, [new_mail("order-1")])
    take_in(engine, replica, [new_mail("order-2")])
    assert end_leases(engine) == 0
    lapse(ledger_rows, gone)

    assert end_leases(engine, delay_seconds=60) == 1

    row = ledger_rows.mail("order-1")
    assert (row["state"], row["owner"], row["unknown_count"]) == ("UNKNOWN", None, 1)
    assert row["reason"] == "lease ended"
    assert 55 < seconds_until_due(ledger_rows, "order-1") <= 60
    assert ledger_rows.mail("order-2")["state"] == "SENDING"


def test_a_lease_that_is_renewed_keeps_its_rows(
    engine: Engine, ledger_rows: Ledger, replica: UUID
) -> None:
    """A renewal after the end, before anybody looked, is in time."""
    take_in(engine, replica, [new_mail("order-1")])
    lapse(ledger_rows, replica)
    with engine.begin() as connection:
        renewal = ledger.renew_lease(
            connection, replica_id=replica, lease_seconds=LEASE_SECONDS, known_until=LONG_AGO
        )

    assert renewal.until - renewal.at > timedelta(seconds=LEASE_SECONDS - 1)
    assert end_leases(engine) == 0


def test_a_lease_whose_commit_was_not_heard_is_taken_again(
    engine: Engine, ledger_rows: Ledger, replica: UUID
) -> None:
    """It is this replica's own: nobody else has its id."""
    with engine.begin() as connection:
        ledger.take_lease(connection, replica_id=replica, name="replica", lease_seconds=60)

    assert len(ledger_rows.rows("SELECT FROM replicas")) == 1


def test_a_ledger_that_knows_less_of_a_lease_was_set_back(
    engine: Engine, ledger_rows: Ledger, replica: UUID
) -> None:
    """Such a one would have mails sent again: none is claimed, and the lease is not renewed."""
    put(ledger_rows, "order-1", "RETRY", due_in=-1)
    ((until,),) = [row.values() for row in ledger_rows.rows("SELECT lease_until FROM replicas")]
    lapse(ledger_rows, replica)

    with engine.begin() as connection:
        assert not ledger.take_up(
            connection, replica_id=replica, lease_until=until, in_hand=(), limit=1
        )
    for _ in range(2):
        with pytest.raises(StartUpRefused, match="set back"), engine.begin() as connection:
            ledger.renew_lease(
                connection, replica_id=replica, lease_seconds=LEASE_SECONDS, known_until=until
            )
        ledger_rows.change("DELETE FROM replicas")


def test_a_lease_that_was_given_back_frees_its_rows(
    engine: Engine, ledger_rows: Ledger, replica: UUID
) -> None:
    """A replica that ends leaves what it could not finish to others at once."""
    take_in(engine, replica, [new_mail("order-1")])
    with engine.begin() as connection:
        ledger.end_lease(connection, replica)

    assert end_leases(engine) == 1


@pytest.mark.parametrize(("unknown_count", "is_resent"), [(1, True), (0, False)])
def test_an_unknown_mail_is_held_the_second_time_or_by_policy(
    engine: Engine, ledger_rows: Ledger, replica: UUID, unknown_count: int, *, is_resent: bool
) -> None:
    """No due time: a person decides."""
    put(ledger_rows, "order-1", "SENDING", owner=uuid4(), unknown_count=unknown_count)

    assert end_leases(engine, is_resent=is_resent) == 1

    row = ledger_rows.mail("order-1")
    assert (row["state"], row["due_at"]) == ("UNKNOWN", None)
    assert row["unknown_count"] == unknown_count + 1


def test_a_claim_that_was_not_confirmed_is_due_at_once(
    engine: Engine, ledger_rows: Ledger, replica: UUID
) -> None:
    """Nothing was said to the relay: the attempt is given back. What is in a slot stays."""
    in_slot, _ = take_in(engine, replica, [new_mail("order-1"), new_mail("order-2")])
    take_in(engine, hire(engine), [new_mail("order-3")])

    with engine.begin() as connection:
        ledger.release_stray(connection, replica_id=replica, in_hand=[in_slot.id])

    row = ledger_rows.mail("order-2")
    assert (row["state"], row["owner"], row["attempts"]) == ("RETRY", None, 0)
    assert ledger_rows.states() == {"SENDING": 2, "RETRY": 1}
    assert take_up(engine, replica) == ["order-2"]


def test_an_idle_replica_releases_all_it_owns(
    engine: Engine, ledger_rows: Ledger, replica: UUID
) -> None:
    """With nothing in its slots every row of its own is stray."""
    take_in(engine, replica, [new_mail("order-1")])

    with engine.begin() as connection:
        ledger.release_stray(connection, replica_id=replica, in_hand=[])

    assert ledger_rows.states() == {"RETRY": 1}


# outcomes


def test_a_sent_row_holds_no_address(engine: Engine, ledger_rows: Ledger, replica: UUID) -> None:
    """The event's bytes are gone; who sent it, when, and the relay's words stay."""
    (mail,) = take_in(engine, replica, [new_mail("order-1")])

    record_sent(engine, mail)

    row = ledger_rows.mail("order-1")
    assert (row["state"], row["event"], row["owner"], row["due_at"]) == ("SENT", None, None, None)
    assert (row["sent_by"], row["reply"], row["reason"]) == ("replica-a", "250 ok", None)
    assert abs(row["sent_at"] - datetime.now(UTC)) < timedelta(minutes=1)


def test_many_250s_are_written_together(engine: Engine, ledger_rows: Ledger, replica: UUID) -> None:
    """Each row gets its own reply."""
    mails = take_in(engine, replica, [new_mail(f"order-{number}") for number in range(5)])

    with engine.begin() as connection:
        accepted = [(mail, f"250 {mail.order_id}") for mail in mails]
        ledger.record_sent(connection, accepted, sent_by="replica-a", template_digest="d1")

    replies = {order_id: row["reply"] for order_id, row in ledger_rows.mails().items()}
    assert replies == {mail.order_id: reply for mail, reply in accepted}


def test_a_250_of_another_mail_is_not_written(
    engine: Engine, ledger_rows: Ledger, replica: UUID
) -> None:
    """A ledger that was restored gives ids out again: the Message-ID is looked at too."""
    (mail,) = take_in(engine, replica, [new_mail("order-1")])
    ledger_rows.change("UPDATE deliveries SET message_id = '<another@mail>'")

    record_sent(engine, mail)

    assert ledger_rows.states() == {"SENDING": 1}


RETAKEN: dict[str, Callable[[Ledger], object]] = {
    "owned by another": lambda rows: rows.change("UPDATE deliveries SET owner = gen_random_uuid()"),
    "RETRY": lambda rows: rows.change(
        "UPDATE deliveries SET state = 'RETRY', owner = NULL, due_at = now()"
    ),
    "UNKNOWN": lambda rows: rows.change("UPDATE deliveries SET state = 'UNKNOWN', owner = NULL"),
    "HELD": lambda rows: rows.change("UPDATE deliveries SET state = 'HELD', owner = NULL"),
    "DEAD": lambda rows: rows.change("UPDATE deliveries SET state = 'DEAD', owner = NULL"),
}


@pytest.mark.parametrize("retake", RETAKEN.values(), ids=RETAKEN.keys())
def test_a_250_is_written_whatever_became_of_the_claim(
    engine: Engine, ledger_rows: Ledger, replica: UUID, retake: Callable[[Ledger], object]
) -> None:
    """It is a fact."""
    (mail,) = take_in(engine, replica, [new_mail("order-1")])
    retake(ledger_rows)

    record_sent(engine, mail)

    assert ledger_rows.states() == {"SENT": 1}
    assert ledger_rows.mail("order-1")["event"] is None
    assert take_up(engine, replica) == []


def test_an_erased_row_stays_erased(engine: Engine, ledger_rows: Ledger, replica: UUID) -> None:
    """What a person asked for is stronger than a late 250."""
    (mail,) = take_in(engine, replica, [new_mail("order-1")])
    ledger_rows.change("UPDATE deliveries SET state = 'ERASED', event = NULL")

    record_sent(engine, mail)

    assert ledger_rows.states() == {"ERASED": 1}


def test_the_first_250_is_the_one_that_is_kept(
    engine: Engine, ledger_rows: Ledger, replica: UUID
) -> None:
    """A second one, of a resent mail, changes nothing."""
    (mail,) = take_in(engine, replica, [new_mail("order-1")])
    record_sent(engine, mail)
    before = ledger_rows.mail("order-1")

    with engine.begin() as connection:
        ledger.record_sent(
            connection, [(mail, "250 again")], sent_by="replica-b", template_digest="d1"
        )

    assert ledger_rows.mail("order-1") == before


@pytest.mark.parametrize(
    ("state", "due_seconds", "unknown_count"),
    [("RETRY", 60.0, 0), ("UNKNOWN", 60.0, 1), ("UNKNOWN", None, 1), ("DEAD", None, 0)],
)
def test_a_mail_that_was_not_sent_stays_open(
    engine: Engine,
    ledger_rows: Ledger,
    replica: UUID,
    state: str,
    due_seconds: float | None,
    unknown_count: int,
) -> None:
    """Its event stays, with the reason and when it is due."""
    (mail,) = take_in(engine, replica, [new_mail("order-1")])

    record_open(engine, mail, replica, state=state, due_seconds=due_seconds)

    row = ledger_rows.mail("order-1")
    assert (row["state"], row["owner"], row["reason"]) == (state, None, "RCPT: 451 later")
    assert (row["unknown_count"], row["attempts"]) == (unknown_count, 1)
    assert bytes(row["event"]) == EVENT
    if due_seconds is None:
        assert row["due_at"] is None
    else:
        assert 55 < seconds_until_due(ledger_rows, "order-1") <= 60


def test_mails_that_were_not_sent_are_written_together(
    engine: Engine, ledger_rows: Ledger, replica: UUID
) -> None:
    """Each with what became of it; an attempt that put the relay to the test is given back."""
    mails = take_in(engine, replica, [new_mail(f"order-{number}") for number in range(3)])
    suspected_at = datetime(2026, 11, 21, tzinfo=UTC)
    became = [
        {"state": "RETRY", "reason": "a", "due_seconds": 60.0, "is_attempt": False},
        {"state": "RETRY", "reason": "b", "due_seconds": 0.0, "suspected_at": suspected_at},
        {"state": "UNKNOWN", "reason": "c", "due_seconds": None},
    ]
    ended = [
        NotSent(id=mail.id, attempts=1, **values)
        for mail, values in zip(mails, became, strict=True)
    ]

    with engine.begin() as connection:
        ledger.record_open(connection, ended, replica_id=replica)

    names = ("state", "reason", "attempts", "suspected_at", "unknown_count")
    rows = ledger_rows.mails()
    assert [tuple(rows[mail.order_id][name] for name in names) for mail in mails] == [
        ("RETRY", "a", 0, None, 0),
        ("RETRY", "b", 1, suspected_at, 0),
        ("UNKNOWN", "c", 1, None, 1),
    ]
    assert 55 < seconds_until_due(ledger_rows, mails[0].order_id) <= 60


@pytest.mark.parametrize("state", ["RETRY", "UNKNOWN", "DEAD"])
def test_a_replica_that_lost_a_row_does_not_change_it(
    engine: Engine, ledger_rows: Ledger, replica: UUID, state: str
) -> None:
    """Only a 250 counts from one who is no longer the owner."""
    (mail,) = take_in(engine, replica, [new_mail("order-1")])
    lapse(ledger_rows, replica)
    end_leases(engine, delay_seconds=0)
    assert take_up(engine, hire(engine)) == ["order-1"]
    before = ledger_rows.mail("order-1")

    record_open(engine, mail, replica, state=state)

    assert ledger_rows.mail("order-1") == before


def test_a_sent_mail_cannot_become_open(engine: Engine, ledger_rows: Ledger, replica: UUID) -> None:
    """Outcomes that arrive in the wrong order leave the fact standing."""
    (mail,) = take_in(engine, replica, [new_mail("order-1")])
    record_sent(engine, mail)

    record_open(engine, mail, replica)

    assert ledger_rows.states() == {"SENT": 1}


def test_a_mail_that_is_too_old_when_taken_in_is_dead(
    engine: Engine, replica: UUID, ledger_rows: Ledger, opened: None
) -> None:
    """No attempt is begun after its time: the row says why, and nobody owns it."""
    claimed = take_in(engine, replica, [new_mail("order-1", give_up_in=-HOUR)])

    assert claimed == []
    row = ledger_rows.mail("order-1")
    assert (row["state"], row["reason"], row["owner"], row["attempts"]) == (
        "DEAD",
        "expired",
        None,
        0,
    )


def test_an_unknown_mail_that_is_too_old_waits_for_a_person(
    engine: Engine, replica: UUID, ledger_rows: Ledger
) -> None:
    """It may have been sent: it stays UNKNOWN, due no more."""
    put(ledger_rows, "order-1", "UNKNOWN", due_in=-1, give_up_in=-1)

    assert take_up(engine, replica) == []
    row = ledger_rows.mail("order-1")
    assert (row["state"], row["reason"], row["due_at"]) == ("UNKNOWN", "expired", None)


def test_only_old_closed_rows_without_a_record_are_purged(
    engine: Engine, replica: UUID, ledger_rows: Ledger
) -> None:
    """A row that is open, young, or whose record is still there, keeps its order from a mail."""
    claimed = [new_mail(f"order-{number}", offset=number) for number in range(6)]
    with engine.begin() as connection:
        taken_in = ledger.take_in(
            connection, replica_id=replica, mails=claimed, dead_letters=[], moves=[]
        )
        accepted = [(mail, "250") for mail in taken_in.claimed if mail.order_id != "order-0"]
        ledger.record_sent(connection, accepted, sent_by="replica", template_digest="d1")
    ledger_rows.change(
        "UPDATE deliveries SET taken_in_at = now() - interval '401 days'"
        " WHERE order_id <> 'order-1'"
    )
    ledger_rows.change("UPDATE deliveries SET topic_id = 'older' WHERE order_id = 'order-5'")
    ledger_rows.change("UPDATE deliveries SET partition = 1 WHERE order_id = 'order-2'")

    with engine.begin() as connection:
        counts = [ledger.purge(connection, {0: (TOPIC_ID, 4)}, days=400, limit=1) for _ in range(3)]

    assert counts == [1, 1, 0]
    assert set(ledger_rows.mails()) == {"order-0", "order-1", "order-2", "order-4"}
