"""Faults of the SMTP relay: it refuses, breaks off, is slow or babbles (faults.toml, F-S*)."""

import signal
import subprocess
import time
from datetime import UTC, datetime, timedelta

import pytest

from tests.support.mail_side import MOST_IN_HAND, SLOTS, MailSide, once
from tests.support.proxy import Blackhole, Mode, Pass, Refuse, ResetAfter
from tests.support.records import Row, order, orders
from tests.support.service import Service
from tests.support.sink import EXTENSIONS, Delay, Drop, Raw, Rule, Settings, Stage, Tarpit

# The mail service's times under APP_ENV=test, and those that are the same everywhere.
PROBE_SECONDS = 1.0
ENVELOPE_SECONDS = 5.0
GROWTH_SECONDS = 10.0
SUSPECT_DELAY = timedelta(minutes=15)

# The share of two drops one after the other that lets half through.
HALF_IN_TWO = 0.293
TOO_LARGE_BYTES = 20_000
# More than both ends' buffers hold: the write before the last cannot be through.
LONG_ITEMS = 2_000
LONG_BYTES = 5_000_000
MOST_GROWTH_KIB = 16 * 1024


def is_open(replica: Service) -> bool:
    """Say whether its metric calls the breaker open."""
    return replica.metric("mail_breaker_is_open") == 1


def changes(replica: Service) -> list[bool]:
    """Return what the breaker became, each time."""
    return [line["is_open"] for line in replica.logged("breaker.changed")]


def judged(replica: Service, number: int | str) -> list[tuple[str, str | None]]:
    """Return verdict and reason of each attempt at an order's mail that came to an end.

    Where the machine stalls for longer than a lease what was in hand is given back first.
    """
    return [
        (line["verdict"], line["reason"])
        for line in replica.logged("mail.judged")
        if line["order_id"] == f"order-{number}"
        and not str(line["reason"]).startswith(("not begun", "stopped:"))
    ]


def verdicts(replica: Service, number: int | str) -> list[str]:
    """Return the verdict on each attempt at an order's mail."""
    return [verdict for verdict, _ in judged(replica, number)]


def wait_until_told(side: MailSide, replica: Service, attempts: int) -> None:
    """Wait until so many attempts are counted and logged, which comes behind their commit."""
    side.wait_for(lambda: len(replica.logged("mail.judged")) >= attempts)


def dead(replica: Service) -> float:
    """Return how many mails its metric calls dead."""
    return replica.metric("mail_verdicts_total", verdict="DEAD")


def row(side: MailSide, number: int | str) -> Row:
    """Return an order's row of the ledger."""
    return side.mails()[f"order-{number}"]


def state(side: MailSide, number: int | str) -> str | None:
    """Return an order's state; None while nobody knows it."""
    return side.mails().get(f"order-{number}", {}).get("state")


def make_due(side: MailSide, number: int | str) -> None:
    """Have an order's mail tried again now."""
    side.sql("UPDATE deliveries SET due_at = now() WHERE order_id = %s", f"order-{number}")


def to(number: int | str) -> str:
    """Return what only this order's recipient holds."""
    return f"customer-{number}@"


def long_order(number: int | str, *, items: int) -> Row:
    """Return a record whose mail is some 3 kB an item."""
    item = {"sku": "TEA", "name": "&" * 200, "quantity": 1, "unitPrice": "1"}
    return order(number, items=[item] * items)


def resident_kib(replica: Service) -> int:
    """Return how much memory the process has."""
    command = ["ps", "-o", "rss=", "-p", str(replica.pid)]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


@pytest.mark.fault("F-S1")
@pytest.mark.parametrize(
    "stages", [("banner",), ("ehlo",), ("mail", "rcpt", "data")], ids=["banner", "EHLO", "envelope"]
)
def test_a_relay_that_closes_down(side: MailSide, stages: tuple[Stage, ...]) -> None:
    """421: one mail a probe, no attempt burnt, and one copy of each when the relay is back."""
    sent: list[Row] = []
    with side.running() as replica:
        for stage in stages:
            side.sink.script(closing := Rule(stage, "421 4.3.2 closing down"))
            records = [order(f"{stage}-{number}") for number in range(20)]
            began_at = time.monotonic()
            side.send(records)
            side.wait_for(lambda: is_open(replica))
            burst = side.sink.fired(closing)
            side.wait_for(lambda rule=closing, most=burst: side.sink.fired(rule) >= most + 2)
            counters = side.sink.counters()
            seconds = time.monotonic() - began_at
            assert counters.fired[0] <= SLOTS + 1 + seconds / PROBE_SECONDS
            assert counters.open <= 1
            waiting = [each for each in side.mails().values() if each["state"] == "RETRY"]
            assert {each["attempts"] for each in waiting} <= {0}
            reasons = ("421 4.3.2 closing", "not begun")
            assert [e for e in waiting if not any(told in e["reason"] for told in reasons)] == []
            side.sink.script()
            sent += records
            side.wait_until_sent(len(sent))
        assert changes(replica) == [True, False] * len(stages)
        assert dead(replica) == 0
    assert {each["attempts"] for each in side.mails().values()} == {1}
    assert side.copies() == once(sent)


@pytest.mark.fault("F-S3")
def test_a_mailbox_that_is_full_or_busy(side: MailSide) -> None:
    """452 and, at RCPT, 552: RETRY twice, then SENT, and the neighbours do not wait."""
    replies = ("452 4.5.3 too many recipients", "552 5.2.2 mailbox full", "552 no room")
    side.sink.script(
        *(Rule("rcpt", reply, to=to(f"full-{n}"), times=2) for n, reply in enumerate(replies))
    )
    records = [*(order(f"full-{number}") for number in range(len(replies))), *orders(3)]
    side.send(records)
    with side.running() as replica:
        side.wait_until_sent(len(records))
        wait_until_told(side, replica, len(records) + 2 * len(replies))
        for number, reply in enumerate(replies):
            refused = ("RETRY", f"RCPT: {reply}")
            assert judged(replica, f"full-{number}") == [refused, refused, ("SENT", None)]
            assert row(side, f"full-{number}")["attempts"] == 3
        assert all(verdicts(replica, number) == ["SENT"] for number in range(3))
        assert changes(replica) == []
    assert side.copies() == once(records)


@pytest.mark.fault("F-S4")
def test_addresses_that_the_relay_refuses(side: MailSide) -> None:
    """Dead at once with its words where no such address exists, in doubt where it may be us."""
    for_good = (
        "550 5.1.1 no such user",
        "550 5.1.10 null MX",
        "551 5.1.6 moved away",
        "553 5.1.3 bad address",
        "553 5.1.2 no such domain",
    )
    in_doubt = ("550 mailbox unavailable", "551 5.7.1 not local", "553 5.7.1 not allowed")
    replies = (*for_good, *in_doubt)
    rules = [Rule("rcpt", reply, to=to(f"no-{n}")) for n, reply in enumerate(replies)]
    side.sink.script(*rules)
    side.send(orders(1))
    side.send(order(f"no-{number}") for number in range(len(replies)))
    side.send(order(f"next-{number}") for number in range(9))
    expected = {"SENT": 10, "DEAD": len(for_good), "RETRY": len(in_doubt)}
    with side.running() as replica:
        side.wait_for(lambda: side.states() == expected)
        wait_until_told(side, replica, sum(expected.values()))
        assert dead(replica) == len(for_good)
        for number, reply in enumerate(replies):
            verdict = "DEAD" if reply in for_good else "RETRY"
            found = row(side, f"no-{number}")
            assert judged(replica, f"no-{number}") == [(verdict, f"RCPT: {reply}")]
            assert (found["reason"], found["attempts"]) == (f"RCPT: {reply}", 1)
            assert (found["due_at"] is None) == (verdict == "DEAD")
        assert changes(replica) == []
        assert side.sink.counters().fired == [1] * len(replies)
    assert side.copies() == once([order(0), *(order(f"next-{number}") for number in range(9))])


@pytest.mark.fault("F-S5")
@pytest.mark.parametrize(
    ("extensions", "stage"),
    [(EXTENSIONS, "MAIL"), (tuple(each for each in EXTENSIONS if each != "SIZE"), "final dot")],
    ids=["SIZE", "content"],
)
def test_a_mail_too_large_for_the_relay(
    side: MailSide, extensions: tuple[str, ...], stage: str
) -> None:
    """552, to our SIZE or to the content: DEAD at once, and its neighbours are sent."""
    side.sink.configure(Settings(extensions=extensions, max_bytes=TOO_LARGE_BYTES))
    side.send([long_order("long", items=50), *orders(5)])
    with side.running() as replica:
        side.wait_for(lambda: side.states() == {"SENT": 5, "DEAD": 1})
        wait_until_told(side, replica, 6)
        assert judged(replica, "long") == [("DEAD", f"{stage}: 552 5.3.4 too large")]
        assert (dead(replica), changes(replica)) == (1, [])
    assert row(side, "long")["due_at"] is None
    assert side.copies() == once(orders(5))


@pytest.mark.fault("F-S5")
def test_a_content_that_the_relay_refuses(side: MailSide) -> None:
    """554: again after 15 minutes; dead only when the relay took another mail in between."""
    side.sink.script(spam := Rule("dot", "554 5.7.1 looks like spam", to=to("spam")))
    side.send([order("spam")])
    with side.running() as replica:
        for attempt in (1, 2):
            side.wait_for(lambda count=attempt: len(verdicts(replica, "spam")) == count)
            found = row(side, "spam")
            assert (found["state"], found["attempts"]) == ("RETRY", attempt)
            assert found["reason"] == "final dot: 554 5.7.1 looks like spam"
            left = found["due_at"] - datetime.now(UTC)
            assert SUSPECT_DELAY - timedelta(seconds=10) < left <= SUSPECT_DELAY
            if attempt == 1:
                # No other mail was accepted: it may be the relay.
                make_due(side, "spam")
        side.send(orders(1))
        side.wait_until_sent(1)
        make_due(side, "spam")
        side.wait_for(lambda: row(side, "spam")["state"] == "DEAD")
        assert side.sink.fired(spam) == 3
        side.wait_for(lambda: dead(replica) == 1)
        assert changes(replica) == []
    reason = "refused again by a relay that accepts others; final dot: 554 5.7.1 looks like spam"
    assert row(side, "spam")["reason"] == reason
    assert side.copies() == once(orders(1))


@pytest.mark.fault("F-S9")
def test_a_long_content_cut_before_its_last_part(side: MailSide) -> None:
    """The dot was not sent: RETRY, and one copy."""
    record = long_order("long", items=LONG_ITEMS)
    cut = side.smtp.when_sent(b"DATA\r\n", ResetAfter("up", 100_000))
    resets = side.smtp.resets
    side.send([record])
    with side.running() as replica:
        side.wait_until_sent(1)
        assert (cut.fired, side.smtp.resets - resets) == (1, 1)
        wait_until_told(side, replica, 2)
        (first, _), (second, _) = judged(replica, "long")
        assert (first, second) == ("RETRY", "SENT")
    assert row(side, "long")["unknown_count"] == 0
    assert side.sink.accepted()[0].size > LONG_BYTES
    assert side.copies() == once([record])
    assert side.sink.counters().stages["dot"] == 1


@pytest.mark.fault("F-S9")
def test_a_content_cut_after_its_dot_was_written(side: MailSide) -> None:
    """A short one leaves in one write with its dot: UNKNOWN, as nobody knows; resent, one copy."""
    cut = side.smtp.when_sent(b"DATA\r\n", ResetAfter("up", 500))
    resets = side.smtp.resets
    side.send(orders(1))
    with side.running() as replica:
        side.wait_until_sent(1)
        assert (cut.fired, side.smtp.resets - resets) == (1, 1)
        wait_until_told(side, replica, 2)
        assert verdicts(replica, 0) == ["UNKNOWN", "SENT"]
    assert row(side, 0)["unknown_count"] == 1
    assert side.copies() == once(orders(1))
    assert side.sink.counters().stages["dot"] == 1


@pytest.mark.fault("F-S10")
@pytest.mark.parametrize(
    "farewell", ["421 4.3.2 closing down", Drop(is_reset=True)], ids=["421", "reset"]
)
def test_a_farewell_that_goes_wrong(side: MailSide, farewell: str | Drop) -> None:
    """A bad end at RSET or QUIT is nothing: what was answered 250 is SENT, once, and stays so."""
    side.sink.script(
        resetting := Rule("rset", farewell),
        quitting := Rule("quit", farewell),
        Rule("rcpt", "550 5.1.1 no such user", to=to("nobody")),
        slow := Rule("dot", Delay(1.0), to=to("last")),
    )
    records = [*orders(3), order("last")]
    side.send({**record, "partition": 0} for record in (records[0], order("nobody"), *records[1:]))
    with side.running(MAIL_CONCURRENCY="1") as replica:
        side.wait_for(lambda: side.sink.fired(slow) == 1)
        # It says QUIT right after the 250.
        replica.signal(signal.SIGTERM)
        assert replica.wait_for_end() == 0
        assert (side.sink.fired(resetting), side.sink.fired(quitting)) == (1, 1)
        assert verdicts(replica, "nobody") == ["DEAD"]
        assert changes(replica) == []
    assert side.states() == {"SENT": len(records), "DEAD": 1}
    assert {each["attempts"] for each in side.mails().values()} == {1}
    side.send([order("next")])
    with side.running():
        side.wait_until_sent(len(records) + 1)
    assert side.copies() == once([*records, order("next")])


@pytest.mark.fault("F-S12")
def test_a_relay_that_answers_byte_by_byte(side: MailSide) -> None:
    """Before the dot the dialogue has an end, as if silent; after it the 250 is waited for."""
    side.sink.script(
        slow := Rule("rcpt", Tarpit(1.0), to=to("before"), times=1),
        patient := Rule("dot", Tarpit(0.3), to=to("after"), times=1),
        banner := Rule("banner", Tarpit(1.0), connection=1),
    )
    records = [order("before"), order("after"), *orders(6)]
    side.send(records)
    with side.running() as replica:
        began_at = time.monotonic()
        side.wait_for(lambda: "RETRY" in verdicts(replica, "before"))
        # The whole reply would have taken three times as long.
        assert time.monotonic() - began_at < 2 * ENVELOPE_SECONDS
        side.wait_until_sent(len(records))
        assert [side.sink.fired(rule) for rule in (slow, patient, banner)] == [1, 1, 1]
        reasons = " ".join(str(reason) for _, reason in judged(replica, "before"))
        assert "RCPT: no reply TimeoutError" in reasons
        side.wait_for(lambda: verdicts(replica, "after")[-1:] == ["SENT"])
    assert {each["unknown_count"] for each in side.mails().values()} == {0}
    assert side.copies() == once(records)


BABBLE = {
    "endless": Raw(b"250-more\r\n", times=None),
    "megabyte": Raw(b"2" * 1_000_000 + b"\r\n"),
    "no-line-end": Raw(b"250 " + b"x" * 4096, times=None),
    "binary": Raw(bytes(range(256)) * 16 + b"\r\n"),
    "no-code": Raw(b"25\r\n"),
    "no-smtp-code": Raw(b"199 what is that\r\n"),
}


@pytest.mark.fault("F-S13")
def test_babble_before_the_dot(side: MailSide) -> None:
    """Reading ends, memory is flat: RETRY with a reason, then one copy of each."""
    side.sink.script(
        *(Rule("rcpt", raw, to=to(kind), times=1) for kind, raw in BABBLE.items()),
        banner := Rule("banner", BABBLE["endless"], connection=1),
    )
    records = [order(kind) for kind in BABBLE]
    with side.running() as replica:
        before_kib = resident_kib(replica)
        side.send(records)
        side.wait_until_sent(len(records))
        assert resident_kib(replica) - before_kib < MOST_GROWTH_KIB
        assert set(side.sink.counters().fired) == {1}
        assert side.sink.fired(banner) == 1
        side.wait_for(lambda: all(verdicts(replica, kind)[-1:] == ["SENT"] for kind in BABBLE))
        for kind in BABBLE:
            assert set(verdicts(replica, kind)[:-1]) == {"RETRY"}, kind
    assert side.copies() == once(records)


@pytest.mark.fault("F-S13")
def test_babble_after_the_dot(side: MailSide) -> None:
    """Nobody knows what the relay has: UNKNOWN, resent once, a second copy where it had it."""
    raws = {kind: Raw(raw.data, raw.times, is_accepted=False) for kind, raw in BABBLE.items()}
    side.sink.script(
        *(Rule("dot", raw, to=to(kind), times=1) for kind, raw in raws.items()),
        Rule("dot", BABBLE["endless"], to=to("accepted"), times=1),
    )
    records = [order(kind) for kind in (*BABBLE, "accepted")]
    with side.running() as replica:
        before_kib = resident_kib(replica)
        side.send(records)
        side.wait_until_sent(len(records))
        assert resident_kib(replica) - before_kib < MOST_GROWTH_KIB
        assert set(side.sink.counters().fired) == {1}
        side.wait_for(lambda: replica.metric("mail_verdicts_total", verdict="SENT") == len(records))
        # What had not begun when the breaker opened was given back first.
        found = {kind: verdicts(replica, kind)[-2:] for kind in (*BABBLE, "accepted")}
    assert set(map(tuple, found.values())) == {("UNKNOWN", "SENT")}
    assert side.copies() == once(records) + once([order("accepted")])


@pytest.mark.fault("F-S14")
@pytest.mark.parametrize(
    "mode", [Refuse(), Blackhole(), ResetAfter("down", 1)], ids=["refused", "swallowed", "reset"]
)
def test_a_relay_that_cannot_be_reached(side: MailSide, mode: Mode) -> None:
    """The breaker opens, nothing but probes is taken in, and one probe mail closes it."""
    records = orders(60)
    side.smtp.set(mode)
    accepted, resets = side.smtp.accepted, side.smtp.resets
    side.send(records)
    began_at = time.monotonic()
    with side.running() as replica:
        side.wait_for(lambda: is_open(replica))
        ended = len(replica.logged("mail.judged"))
        side.wait_for(lambda: len(replica.logged("mail.judged")) >= ended + 3)
        mails = side.mails().values()
        seconds = time.monotonic() - began_at
        assert len(mails) <= MOST_IN_HAND + 1 + seconds / PROBE_SECONDS < len(records)
        assert {each["state"] for each in mails} <= {"RETRY", "SENDING"}
        assert {each["attempts"] for each in mails if each["state"] == "RETRY"} == {0}
        # Another probe may be taken in between the two.
        side.wait_for(lambda: sum(side.positions().values()) == len(side.mails()))
        assert (changes(replica), replica.is_ready()) == ([True], True)
        assert side.sink.counters().stages["mail"] == 0
        if mode == Refuse():
            assert "ConnectionRefusedError" in replica.logged("breaker.changed")[0]["answer"]
        else:
            assert side.smtp.accepted > accepted
            assert isinstance(mode, Blackhole) or side.smtp.resets > resets
        side.sink.script(probe := Rule("dot", Delay(1.5), times=1))
        served_at = time.monotonic()
        side.smtp.set(Pass())
        side.wait_for(lambda: side.sink.fired(probe) == 1)
        probes = side.sink.counters().stages["mail"]
        assert probes <= 1 + (time.monotonic() - served_at) / PROBE_SECONDS
        side.wait_until_sent(len(records))
        assert (changes(replica), is_open(replica)) == ([True, False], False)
    assert {each["attempts"] for each in side.mails().values()} == {1}
    assert side.copies() == once(records)


@pytest.mark.fault("F-S17")
def test_a_relay_whose_name_does_not_resolve(side: MailSide) -> None:
    """The breaker opens, no attempt is burnt, and a rebalance shows that polling goes on."""
    records = orders(30)
    side.send(records)
    with side.running(SMTP_HOST="relay.invalid") as lost:
        side.wait_for(lambda: len(lost.logged("mail.judged")) >= SLOTS + 2)
        assert changes(lost) == [True]
        assert "gaierror" in lost.logged("breaker.changed")[0]["answer"]
        waiting = [each for each in side.mails().values() if each["state"] == "RETRY"]
        assert {each["attempts"] for each in waiting} == {0}
        with side.running() as found:
            side.wait_for(lambda: sorted(map(len, side.members().values())) == [1, 2])
            assert (lost.is_live(), lost.is_ready()) == (True, True)
            lost.part.stop()
            side.wait_until_sent(len(records))
            assert dead(found) == 0
    assert {each["attempts"] for each in side.mails().values()} == {1}
    assert side.copies() == once(records)


@pytest.mark.fault("F-S18")
def test_a_relay_that_takes_three_connections(side: MailSide) -> None:
    """421 to the fourth: fewer are kept, no attempt is burnt, and in time there are more again."""
    records = orders(300)
    side.sink.configure(Settings(max_connections=3))
    side.sink.script(Rule("dot", Delay(0.2)))
    side.send(records)
    with side.running() as replica:
        side.wait_for(lambda: side.states()["SENT"] >= 30)
        few = side.sink.counters()
        assert 1 <= few.too_many <= SLOTS + 2
        assert 1 <= few.open <= 3
        # It would take all now, and nobody asks yet.
        side.sink.configure(Settings())
        lifted_at = time.monotonic()
        side.wait_for(lambda: side.sink.counters().open > few.open)
        assert time.monotonic() - lifted_at > GROWTH_SECONDS / 2
        assert side.sink.counters().open == few.open + 1
        side.sink.script()
        side.wait_until_sent(len(records))
        assert side.sink.counters().too_many == few.too_many
        # A connection that was late may find the breaker closed again.
        assert changes(replica).count(True) <= 2
        assert not is_open(replica)
    assert {each["attempts"] for each in side.mails().values()} == {1}
    assert side.copies() == once(records)


@pytest.mark.fault("F-S20")
def test_a_relay_without_smtputf8(side: MailSide) -> None:
    """An address that needs it is DEAD, which the reason says; the neighbours are sent."""
    side.sink.configure(Settings(extensions=tuple({*EXTENSIONS} - {"SMTPUTF8"})))
    side.send([order("utf8", email="ü@example.com"), *orders(9)])
    with side.running() as replica:
        side.wait_for(lambda: side.states() == {"SENT": 9, "DEAD": 1})
        wait_until_told(side, replica, 10)
        assert (dead(replica), changes(replica)) == (1, [])
        assert "SMTPUTF8" in row(side, "utf8")["reason"]
    assert side.copies() == once(orders(9))


@pytest.mark.fault("F-S20")
def test_a_relay_with_smtputf8(side: MailSide) -> None:
    """An address that needs it gets its mail."""
    side.send([order("utf8", email="ü@example.com")])
    with side.running():
        side.wait_for(lambda: state(side, "utf8") in ("SENT", "DEAD"))
    assert row(side, "utf8")["reason"] is None
    assert [mail.recipient for mail in side.sink.accepted()] == ["ü@example.com"]


@pytest.mark.fault("F-S21")
def test_a_relay_that_breaks_off_every_other_dialogue(side: MailSide) -> None:
    """All are sent, once each; the breaker does not close and open all the time."""
    records = orders(40)
    rules = [Rule(stage, "drop", share=HALF_IN_TWO, seed=21) for stage in ("rcpt", "data")]
    side.sink.script(*rules)
    side.send(records)
    with side.running() as replica:
        side.wait_until_sent(len(records))
        assert sum(side.sink.counters().fired) >= len(records) / 2
        assert dead(replica) == 0
        openings = changes(replica).count(True)
    assert side.copies() == once(records)
    assert openings <= 1
