"""Faults of the ledger, at each step that needs it (faults.toml, F-L*)."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from tests.support.mail_side import SLOTS, MailSide, once
from tests.support.proxy import Pass, Refuse, Reset, SwallowReplies, Trigger
from tests.support.records import Row, order, orders
from tests.support.service import Service
from tests.support.sink import Rule

ORDERS = 20
FAILURES = 1
INTERRUPTIONS = 2
DEFERRED = 5
# Of the test profile.
LEASE_SECONDS = 5.0
HELD = "m.after_250=sleep:3000@1"
# Where these statements of the ledger end, each a transaction by itself.
TAKEN_IN = b"FROM may LEFT JOIN written ON true\n\0"
SENT = b"deliveries.sent_at IS NULL\n\0"
AT = {
    "take_in": "INSERT ON deliveries",
    "take_up": "UPDATE ON deliveries",
    "sent": "UPDATE ON deliveries",
}
WHEN = {
    "take_in": "true",
    "take_up": "OLD.state = 'RETRY' AND NEW.state = 'SENDING'",
    "sent": "NEW.state = 'SENT'",
}


@pytest.mark.fault("F-L1")
@pytest.mark.parametrize("how", ["refused", "stopped"])
def test_the_ledger_is_away_before_records_are_taken_in(side: MailSide, how: str) -> None:
    """Nothing is sent, not ready and alive; after its return one mail each."""
    first, *others = records = orders(ORDERS)
    with side.running() as replica:
        side.send([first])
        side.wait_until_sent(1)
        with ledger_away(side, how):
            side.send(others)
            side.wait_for(lambda: len(replica.logged("round.interrupted")) >= INTERRUPTIONS)
            assert not replica.is_ready()
            assert replica.is_live()
            assert side.copies() == once([first])
        side.wait_until_sent(ORDERS)
        side.wait_for(replica.is_ready)
        assert replica.part.is_running
    assert side.copies() == once(records)
    assert {row["attempts"] for row in side.mails().values()} == {1}


@pytest.mark.fault("F-L2")
def test_a_250_is_kept_while_the_ledger_is_away(side: MailSide) -> None:
    """It is written when the ledger is back, though the lease ended meanwhile: one copy."""
    records = orders(ORDERS)
    with side.running(HELD) as replica:
        in_flight = cut_after_250(side, replica, records)
        side.wait_for(lambda: lease_ended(side), seconds=LEASE_SECONDS * 2)
        side.wait_for(lambda: replica.logged("outcomes.not_recorded"))
        assert {side.mails()[order_id]["state"] for order_id in in_flight} == {"SENDING"}
        assert not replica.is_ready()
        assert replica.is_live()
        side.database.set(Pass())
        side.wait_until_sent(ORDERS)
        assert replica.metric("mail_leases_ended_total") == 0
    assert side.copies() == once(records)
    mails = side.mails()
    assert {mails[order_id]["attempts"] for order_id in in_flight} == {1}
    assert {row["unknown_count"] for row in mails.values()} == {0}


@pytest.mark.fault("F-L2")
def test_a_250_dies_with_its_replica_while_the_ledger_is_away(side: MailSide) -> None:
    """What was accepted and not written is UNKNOWN, and comes once more; all else comes once."""
    records = orders(ORDERS)
    with side.running(HELD) as replica:
        in_flight = cut_after_250(side, replica, records)
        side.wait_for(lambda: replica.logged("outcomes.not_recorded"))
        replica.kill()
        killed_at, mails = time.time(), side.mails()
    side.database.set(Pass())
    sent = {order_id for order_id, row in mails.items() if row["state"] == "SENT"}
    with side.running() as replica:
        side.wait_until_sent(ORDERS)
        assert replica.metric("mail_leases_ended_total") >= len(in_flight)
    accepted = side.accepted_of(killed_at)
    assert side.unexplained(accepted=accepted, sent=sent) == []
    twice = side.copies() - once(records)
    assert set(twice) == {mail.order_id for mail in accepted} - sent
    assert set(twice) >= in_flight
    assert set(side.copies()) == set(once(records))
    mails = side.mails()
    assert {mails[str(order_id)]["unknown_count"] for order_id in twice} == {1}


@pytest.mark.fault("F-L3")
@pytest.mark.parametrize(
    ("sqlstate", "when"), [("40001", "by its commit"), ("40P01", "by its statement")]
)
def test_what_the_ledger_undid_is_done_again(side: MailSide, sqlstate: str, when: str) -> None:
    """Take-in, take-up and SENT are each undone: nothing is lost, and one mail each."""
    records = orders(ORDERS)
    later = [str(record["key"]) for record in records[:DEFERRED]]
    script_later(side, later)
    with undone(side, sqlstate, when) as tries, side.running() as replica:
        side.send(records)
        side.wait_until_sent(ORDERS)
        assert all(tries(moment) > FAILURES for moment in AT)
        # Take-in and take-up.
        assert len(replica.logged("round.interrupted")) == 2 * FAILURES
        assert replica.logged("outcomes.not_recorded")
    assert side.copies() == once(records)
    attempts = {order_id: row["attempts"] for order_id, row in side.mails().items()}
    assert attempts == {str(r["key"]): 1 + (r["key"] in later) for r in records}


@pytest.mark.fault("F-L3")
def test_a_deadlock_between_take_in_and_another(side: MailSide) -> None:
    """PostgreSQL ends the take-in of two that wait for each other: it is done again, once each."""
    records = orders(SLOTS)
    before = deadlocks(side)
    with side.running() as replica:
        side.send([order("first")])
        side.wait_until_sent(1)
        with side.session() as other, other.cursor() as cursor:
            cursor.execute(
                "INSERT INTO deliveries (kind, order_id, campaign, state, message_id, event,"
                ' event_at, topic_id, partition, "offset", give_up_at)'
                " VALUES ('order-confirmation', 'order-0', '', 'DEAD', '', '', now(), '', 0, 0,"
                " now())"
            )
            side.send(records)
            side.wait_for(lambda: is_blocked_by(side, other.info.backend_pid))
            # The take-in waited first, so it is the first to look for a circle.
            cursor.execute("UPDATE positions SET next_offset = next_offset")
            side.wait_for(lambda: replica.logged("round.interrupted"))
            other.rollback()
        side.wait_until_sent(1 + SLOTS)
    # A server's process tells of what it counted some time later, at its end at the latest.
    side.wait_for(lambda: deadlocks(side) == before + 1)
    assert side.copies() == once([order("first"), *records])
    assert {row["attempts"] for row in side.mails().values()} == {1}


@pytest.mark.fault("F-L4")
@pytest.mark.parametrize("is_done", [True, False], ids=["done", "not done"])
def test_a_commit_without_an_answer(side: MailSide, is_done: bool) -> None:  # noqa: FBT001
    """Take-in and SENT are read again, released or written again: one mail each."""
    records = orders(2 * SLOTS)
    with audited(side) as changes, side.running() as replica:
        lost = lose(side, TAKEN_IN, is_done=is_done)
        side.send(records[:SLOTS])
        side.wait_until_sent(SLOTS)
        assert lost.fired == 1
        assert len(replica.logged("round.interrupted")) == 1
        # Only claims that were committed unheard have to be released.
        assert bool(changes("claim not confirmed")) == is_done
        lost = lose(side, SENT, is_done=is_done)
        side.send(records[SLOTS:])
        side.wait_until_sent(2 * SLOTS)
        side.wait_for(lambda: replica.logged("outcomes.not_recorded"))
        assert lost.fired == 1
        assert len(replica.logged("round.interrupted")) == 1
    assert side.copies() == once(records)
    mails = side.mails()
    assert {row["attempts"] for row in mails.values()} == {1}
    assert {row["unknown_count"] for row in mails.values()} == {0}
    assert side.positions() == side.ends()


@contextmanager
def ledger_away(side: MailSide, how: str) -> Iterator[None]:
    """Take the ledger away for as long as the block runs."""
    if how == "stopped":
        side.stack.stop("mail-db")
        try:
            yield
        finally:
            side.stack.start("mail-db")
    else:
        side.database.set(Refuse())
        try:
            yield
        finally:
            side.database.set(Pass())


def cut_after_250(side: MailSide, replica: Service, records: list[Row]) -> set[str]:
    """Cut the ledger off while a 250 has come and none is written; return whose they are."""
    side.send(records)
    side.wait_for(lambda: replica.hits)
    side.database.set(Refuse())
    accepted = {mail.order_id for mail in side.sink.accepted()}
    in_flight = {
        order_id
        for order_id, row in side.mails().items()
        if row["state"] == "SENDING" and order_id in accepted
    }
    assert in_flight
    return in_flight


def lease_ended(side: MailSide) -> bool:
    return bool(side.sql("SELECT 1 FROM replicas WHERE lease_until < now()"))


def deadlocks(side: MailSide) -> int:
    """Return how many the ledger's database has seen."""
    seen = "SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()"
    return int(side.sql(seen)[0]["deadlocks"])


def is_blocked_by(side: MailSide, pid: int) -> bool:
    return bool(
        side.sql(
            "SELECT 1 FROM pg_stat_activity WHERE %s = ANY(pg_blocking_pids(pid))",
            pid,
        )
    )


def script_later(side: MailSide, order_ids: list[str]) -> None:
    """Have the relay put off the first attempt at each of these orders."""
    names = [order_id.replace("order-", "customer-") for order_id in order_ids]
    side.sink.script(*(Rule("rcpt", "451 4.7.1 later", to=f"{n}@", times=1) for n in names))


@contextmanager
def undone(side: MailSide, sqlstate: str, when: str) -> Iterator[Callable[[str], int]]:
    """Have the ledger undo the first transactions of each moment; give how many were tried."""
    deferred = "DEFERRABLE INITIALLY DEFERRED" if when == "by its commit" else ""
    # A sequence remembers what was undone.
    side.sql(
        "CREATE FUNCTION undo() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN"
        f" IF nextval('tries_' || TG_ARGV[0]) <= {FAILURES} THEN"
        f" RAISE EXCEPTION 'again' USING ERRCODE = '{sqlstate}'; END IF; RETURN NULL; END $$;"
        + ";".join(
            f"CREATE SEQUENCE tries_{moment};"
            f" CREATE CONSTRAINT TRIGGER undo_{moment} AFTER {event} {deferred}"
            f" FOR EACH ROW WHEN ({WHEN[moment]}) EXECUTE FUNCTION undo('{moment}')"
            for moment, event in AT.items()
        )
    )
    try:
        yield lambda moment: int(
            side.sql(f"SELECT last_value FROM tries_{moment}")[0]["last_value"]
        )
    finally:
        side.sql(
            "DROP FUNCTION undo CASCADE;"
            + ";".join(f"DROP SEQUENCE tries_{moment}" for moment in AT)
        )


@contextmanager
def audited(side: MailSide) -> Iterator[Callable[[str], int]]:
    """Note every change of a mail's row; give how many were made for a reason."""
    side.sql(
        "CREATE TABLE changes (reason text);"
        " CREATE FUNCTION note() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN"
        " INSERT INTO changes VALUES (NEW.reason); RETURN NULL; END $$;"
        " CREATE TRIGGER note AFTER INSERT OR UPDATE ON deliveries"
        " FOR EACH ROW EXECUTE FUNCTION note()"
    )
    try:
        yield lambda reason: len(side.sql("SELECT 1 FROM changes WHERE reason = %s", reason))
    finally:
        side.sql("DROP FUNCTION note CASCADE; DROP TABLE changes")


def lose(side: MailSide, statement_end: bytes, *, is_done: bool) -> Trigger:
    """Break the next connection at this statement, which commits itself, or does not arrive."""
    if is_done:
        return side.database.when_sent(statement_end, SwallowReplies(reset_after_bytes=1))
    return side.database.when_sent(statement_end, Reset(), is_forwarded=False)
