"""The slots, against a real ledger and a real relay, where a process cannot show it."""

import json
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
from mail_service.senders import Senders
from mail_service.settings import TEST_TIMING, Settings
from mail_service.smtp import Relay, SmtpConnection

LEASE_SECONDS = 0.9
TakeIn = Callable[..., list[Mail]]


@pytest.fixture
def replica_id() -> UUID:
    """Return who sends here."""
    return uuid4()


@pytest.fixture
def senders(
    environment: Environment, engine: Engine, sink: Sink, replica_id: UUID
) -> Iterator[Senders]:
    """Run two slots under a short lease."""
    relay = Relay("127.0.0.1", sink.port, "off", None, None, final_dot_timeout_seconds=5.0)
    senders = Senders(
        count=2,
        engine=engine,
        lease=Lease(replica_id, name="replica", seconds=LEASE_SECONDS),
        connect=lambda: SmtpConnection(relay),
        confirmation=Confirmation(Shop.of(Settings.from_environment(environment))),
        judge=Judge(TEST_TIMING, resends_unknown=True),
    )
    senders.start()
    yield senders
    senders.drain()


@pytest.fixture
def take_in(engine: Engine, replica_id: UUID) -> TakeIn:
    """Return how one order's mail is claimed."""

    def take_in(order_id: str) -> list[Mail]:
        now = datetime.now(UTC)
        value = {"orderId": order_id, "userId": 1, "amount": 1, "email": "minji@example.com"}
        event = json.dumps(value).encode()
        new = NewMail(order_id, "<m@x>", event, now, now + timedelta(hours=1), "t", 0, 0)
        with engine.begin() as connection:
            return ledger.take_in(
                connection, replica_id=replica_id, mails=[new], dead_letters=[], moves=[]
            )

    return take_in


def test_a_slot_is_free_again_when_its_outcome_is_written(
    senders: Senders, take_in: TakeIn, ledger_rows: Ledger, sink: Sink
) -> None:
    """Not before: what is ours and in no slot is released as stray."""
    sink.script(Rule("dot", "delay:0.3"))

    senders.hand_out(take_in("order-1"), term=senders.term)

    assert senders.mail_ids() == [ledger_rows.mail("order-1")["id"]]
    assert senders.wait_for_free(0) == 1
    wait_for(senders.mail_ids, lambda in_slots: not in_slots)
    assert ledger_rows.mail("order-1")["state"] == "SENT"


def test_a_long_wait_for_the_250_keeps_the_lease(
    senders: Senders, take_in: TakeIn, ledger_rows: Ledger, engine: Engine, sink: Sink
) -> None:
    """The lease is renewed while slots wait: nobody takes over a live, merely slow send."""
    sink.script(Rule("dot", f"delay:{LEASE_SECONDS * 3}"))
    senders.hand_out(take_in("order-1"), term=senders.term)

    give_up_at = time.monotonic() + LEASE_SECONDS * 2.5
    while time.monotonic() < give_up_at:
        with engine.begin() as connection:
            assert ledger.end_leases(connection, is_resent=True, delay_seconds=0) == 0
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
        time.sleep(LEASE_SECONDS * 1.7)
        with engine.begin() as connection:
            assert ledger.end_leases(connection, is_resent=True, delay_seconds=600) == 1

    wait_for(senders.mail_ids, lambda in_slots: not in_slots)

    assert sink.accepted() == []
    assert ledger_rows.mail("order-1")["state"] == "UNKNOWN"


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

    wait_for(ledger_rows.states, lambda states: states == {"SENT": 1})
    assert len(sink.accepted()) == 1


def test_an_event_that_cannot_be_read_any_more_is_dead(
    senders: Senders, take_in: TakeIn, ledger_rows: Ledger
) -> None:
    """A row from before a stricter release ends that mail, not the process."""
    mails = take_in("order-1")
    broken = [
        Mail(**{name: getattr(mail, name) for name in Mail.__slots__} | {"event": b"{}"})
        for mail in mails
    ]

    senders.hand_out(broken, term=senders.term)

    wait_for(ledger_rows.states, lambda states: states == {"DEAD": 1}, seconds=5)
