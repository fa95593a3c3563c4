"""The slots, against a real ledger and a real relay, where a process cannot show it."""

import dataclasses
import json
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from uuid import UUID, uuid4

import pytest
from harness import Environment, Ledger, wait_for
from sink import Rule, Sink
from sqlalchemy import Engine, text

from mail_service import ledger
from mail_service.confirmation import Confirmation, Shop
from mail_service.judge import Judge
from mail_service.lease import Lease
from mail_service.ledger import Mail, NewMail
from mail_service.pace import Pace
from mail_service.senders import Senders, most_in_hand
from mail_service.settings import TEST_TIMING, Recipients, Settings
from mail_service.smtp import Relay, SmtpConnection

LEASE_SECONDS = 1.5
MOST = most_in_hand(2, is_rate_limited=False)
THREE = ("order-0", "order-1", "order-2")
TakeIn = Callable[..., list[Mail]]


@pytest.fixture
def replica_id() -> UUID:
    """Return who sends here."""
    return uuid4()


@pytest.fixture
def lease_seconds() -> float:
    """Return how long the lease runs."""
    return LEASE_SECONDS


@pytest.fixture
def senders(
    environment: Environment,
    engine: Engine,
    sink: Sink,
    replica_id: UUID,
    lease_seconds: float,
) -> Iterator[Senders]:
    """Run two slots under a short lease, with room for two mails more."""
    relay = Relay("127.0.0.1", sink.port, "off", None, None, TEST_TIMING)
    senders = Senders(
        count=2,
        engine=engine,
        lease=Lease(replica_id, name="replica", seconds=lease_seconds),
        connect=lambda: SmtpConnection(relay),
        confirmation=Confirmation(Shop.of(Settings.from_environment(environment))),
        recipients=Recipients.parse("*"),
        judge=Judge(TEST_TIMING, resends_unknown=True),
        pace=Pace(most=MOST, probe_seconds=TEST_TIMING.probe_seconds),
    )
    senders.start()
    yield senders
    senders.drain(threading.Event())


@pytest.fixture
def take_in(engine: Engine, replica_id: UUID) -> TakeIn:
    """Return how the mails of orders are claimed."""

    def new_mail(order_id: str) -> NewMail:
        now = datetime.now(UTC)
        value = {"orderId": order_id, "userId": 1, "amount": 1, "email": "minji@example.com"}
        event = json.dumps(value).encode()
        return NewMail(order_id, "<m@x>", event, now, now + timedelta(hours=1), "t", 0, 0)

    def take_in(*order_ids: str) -> list[Mail]:
        mails = [new_mail(order_id) for order_id in order_ids]
        with engine.begin() as connection:
            taken_in = ledger.take_in(
                connection, replica_id=replica_id, mails=mails, dead_letters=[], moves=[]
            )
        return list(taken_in.claimed)

    return take_in


def broken(mail: Mail) -> Mail:
    """Return a mail whose event is none."""
    return dataclasses.replace(mail, event=b"{}")


def test_a_slot_is_free_again_when_its_outcome_is_written(
    senders: Senders, take_in: TakeIn, ledger_rows: Ledger, sink: Sink
) -> None:
    """Not before: what is ours and in no slot is released as stray."""
    sink.script(Rule("dot", "delay:1"))

    (mail,) = take_in("order-1")
    senders.hand_out([mail], term=senders.term)

    assert senders.mail_ids() == [mail.id]
    assert senders.wait_for_room(0) == MOST - 1
    wait_for(senders.mail_ids, lambda in_hand: not in_hand)
    assert ledger_rows.mail("order-1")["state"] == "SENT"


def test_a_mail_claimed_ahead_follows_at_once(
    senders: Senders, take_in: TakeIn, ledger_rows: Ledger, sink: Sink
) -> None:
    """It waits for a slot, not for the ledger, and never are more dialogues held than slots."""
    sink.script(Rule("dot", "delay:0.5"))

    senders.hand_out(take_in(*THREE), term=senders.term)

    assert senders.wait_for_room(0) == MOST - len(THREE)
    wait_for(ledger_rows.states, lambda states: states == {"SENT": 3})
    times = sorted(mail.at for mail in sink.accepted())
    assert times[2] - times[0] > 0.4
    assert len({mail.connection for mail in sink.accepted()}) == 2


def test_a_mail_that_cannot_be_composed_needs_no_slot(
    senders: Senders, take_in: TakeIn, ledger_rows: Ledger, sink: Sink
) -> None:
    """Mails are composed before they have one: with it they would keep the relay waiting."""
    sink.script(Rule("dot", "delay:3"))
    first, second, third = take_in(*THREE)

    senders.hand_out([first, second, broken(third)], term=senders.term)

    wait_for(ledger_rows.states, lambda states: states.get("DEAD") == 1)
    assert ledger_rows.states() == {"SENDING": 2, "DEAD": 1}


def test_a_mail_that_has_not_begun_is_given_back_in_trouble(
    senders: Senders, take_in: TakeIn, ledger_rows: Ledger, sink: Sink
) -> None:
    """The breaker opens: what was claimed ahead has cost no attempt and meets no relay."""
    sink.script(Rule("mail", "421 4.3.2 not now"))

    senders.hand_out(take_in(*THREE), term=senders.term)

    wait_for(ledger_rows.states, lambda states: states == {"RETRY": 3})
    rows = [ledger_rows.mail(order_id) for order_id in THREE]
    assert sum(row["reason"] == "not begun" for row in rows) >= 1
    assert {row["attempts"] for row in rows} == {0}
    assert sink.accepted() == []


def test_a_mail_that_has_not_begun_is_given_back_at_the_end(
    senders: Senders, take_in: TakeIn, ledger_rows: Ledger, sink: Sink
) -> None:
    """Dots that went out are waited for, what waits for a slot is not begun."""
    sink.script(Rule("dot", "delay:1"))
    senders.hand_out(take_in(*THREE), term=senders.term)
    wait_for(sink.accepted, lambda accepted: len(accepted) == 2)

    senders.drain(threading.Event())

    assert ledger_rows.states() == {"SENT": 2, "RETRY": 1}
    assert ledger_rows.mail("order-2")["attempts"] == 0
    assert len(sink.accepted()) == 2


@pytest.mark.fault("F-S11")
@pytest.mark.parametrize("lease_seconds", [3.0])
def test_a_long_wait_for_the_250_keeps_the_lease(
    senders: Senders,
    take_in: TakeIn,
    ledger_rows: Ledger,
    engine: Engine,
    sink: Sink,
    lease_seconds: float,
) -> None:
    """The lease is renewed while slots wait: nobody takes over a live, merely slow send."""
    sink.script(Rule("dot", f"delay:{lease_seconds * 2.3}"))
    senders.hand_out(take_in("order-1"), term=senders.term)

    give_up_at = time.monotonic() + lease_seconds * 2.2
    while time.monotonic() < give_up_at:
        with engine.begin() as connection:
            assert ledger.end_leases(connection, in_hand=(), is_resent=True, delay_seconds=0) == 0
        time.sleep(0.05)

    wait_for(ledger_rows.states, lambda states: states == {"SENT": 1})


def test_a_lease_that_ended_and_was_taken_anew_finishes_no_older_mail(
    senders: Senders, take_in: TakeIn, ledger_rows: Ledger, engine: Engine, sink: Sink
) -> None:
    """While the ledger stalled the row became another's: the dot must not follow."""
    sink.script(Rule("data", f"delay:{LEASE_SECONDS * 3}", times=1))
    senders.hand_out(take_in("order-1"), term=senders.term)
    with engine.begin() as stalled:
        stalled.execute(text("LOCK TABLE replicas IN EXCLUSIVE MODE"))
        time.sleep(LEASE_SECONDS * 1.2)
        with engine.begin() as connection:
            assert ledger.end_leases(connection, in_hand=(), is_resent=True, delay_seconds=600) == 1

    wait_for(senders.mail_ids, lambda in_hand: not in_hand)

    assert sink.accepted() == []
    assert ledger_rows.mail("order-1")["state"] == "UNKNOWN"


@pytest.mark.fault("F-L2")
def test_a_250_is_not_forgotten_while_the_ledger_is_away(
    senders: Senders, take_in: TakeIn, ledger_rows: Ledger, engine: Engine, sink: Sink
) -> None:
    """It is written when the ledger answers again, once the mail went out."""
    mails = take_in("order-1")
    with engine.begin() as stalled:
        stalled.execute(text("LOCK TABLE deliveries IN EXCLUSIVE MODE"))
        senders.hand_out(mails, term=senders.term)
        wait_for(sink.accepted, len)
        stalled.execute(
            text(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                " WHERE pid <> pg_backend_pid() AND usename = current_user"
            )
        )
    # Ours in the pool are ended as well.
    engine.dispose()

    wait_for(ledger_rows.states, lambda states: states == {"SENT": 1})
    assert len(sink.accepted()) == 1


def test_an_event_that_cannot_be_read_any_more_is_dead(
    senders: Senders, take_in: TakeIn, ledger_rows: Ledger
) -> None:
    """A row from before a stricter release ends that mail, not the process."""
    (mail,) = take_in("order-1")

    senders.hand_out([broken(mail)], term=senders.term)

    wait_for(ledger_rows.states, lambda states: states == {"DEAD": 1})
