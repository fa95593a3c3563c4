"""Faults of more than can be mailed: growing topics, storms, returns (faults.toml, F-B*)."""

import itertools
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import pytest

from tests.support.mail_side import MailSide, once
from tests.support.proxy import Pass, Refuse
from tests.support.records import order, orders
from tests.support.scale import scaled
from tests.support.sink import Delay, Rule

LARGE_BYTES = 200_000
LARGE_ORDERS = scaled(3_000)
SLOW_SECONDS = 0.2
SLOWEST_SECONDS = 1.0
MOST_GROWTH_BYTES = 40 * 2**20
WAITING = scaled(5_000)
PROBES = scaled(20)
PROBE_SECONDS = 1.0
REPLICAS = 3
RATE_PER_SECOND = 100
# What is claimed together goes out in any order.
SLOTS_OF_EACH = 64
WINDOW_SECONDS = 2.0
FAILED = scaled(3_000)
BINS = 10
# Of the test profile.
RETRY_BASE_SECONDS = 0.2
RETRY_CAP_SECONDS = 2.0

# As a take-in and a 451 leave them, each a second older than the next.
INSERT_WAITING = """
    INSERT INTO deliveries (kind, order_id, campaign, message_id, event, event_at, topic_id,
                            partition, "offset", give_up_at, due_at, state, attempts, reason)
    SELECT 'order-confirmation', 'order-' || number, '',
           '<order-confirmation.order-' || number || '@teahouse.example>',
           convert_to(replace(%s, 'NUMBER', number::text), 'UTF8'), now(), 'earlier', 0, number,
           now() + interval '24 hours', now() - (%s - number) * interval '1 second', 'RETRY', 1,
           'CONNECT: the relay was away'
      FROM generate_series(0, %s - 1) AS number
"""


@pytest.mark.fault("F-B1", "F-D3")
def test_a_topic_that_grows_faster_than_mails_go_out(side: MailSide) -> None:
    """Lag grows and memory does not; what is in flight is bounded, and in the end all is sent."""
    warm = large_orders("warm", 60)
    records = large_orders("more", LARGE_ORDERS)
    with side.running() as replica:
        side.send(warm)
        side.wait_until_sent(len(warm))
        side.sink.script(Rule("dot", Delay(SLOWEST_SECONDS)))
        with replica.peak_memory() as most_bytes:
            before = most_bytes()
            began_at = time.monotonic()
            side.send(records)
            written_per_second = LARGE_ORDERS / (time.monotonic() - began_at)
            grown = [lag(side)]
            for _ in range(3):
                time.sleep(0.5)
                grown.append(lag(side))
            sent_per_second = (grown[0] - grown[-1]) / 1.5
            assert written_per_second > 2 * sent_per_second
            assert min(grown) > LARGE_ORDERS / 2
            assert replica.is_ready()
            side.sink.script()
            side.wait_until_sent(len(warm) + LARGE_ORDERS, seconds=scaled(300))
            assert most_bytes() - before < MOST_GROWTH_BYTES < LARGE_ORDERS * LARGE_BYTES
    assert lag(side) == 0
    assert side.copies() == once([*warm, *records])


@pytest.mark.fault("F-B2")
def test_mails_that_waited_for_the_relay(side: MailSide) -> None:
    """With the relay back the rate of all replicas ramps up to its limit, oldest mail first."""
    records = orders(WAITING)
    settings = {
        "MAIL_RATE_PER_SECOND": str(RATE_PER_SECOND),
        "MAIL_CONCURRENCY": str(SLOTS_OF_EACH),
    }
    # One mail at a time is then five a second.
    side.sink.script(Rule("dot", Delay(SLOW_SECONDS)))
    side.smtp.set(Refuse())
    side.send(records)
    with ExitStack() as up:
        replicas = [
            up.enter_context(side.running(is_waited_for=False, **settings)) for _ in range(REPLICAS)
        ]
        side.wait_for(lambda: all(replica.is_ready() for replica in replicas))
        side.wait_for(lambda: all(r.metric("mail_breaker_is_open") for r in replicas))
        assert side.sink.accepted() == []
        # Each replica tries once a second, in the test profile.
        time.sleep(PROBES * PROBE_SECONDS)
        tried = side.mails()
        assert len(tried) < WAITING / 2
        assert {row["state"] for row in tried.values()} <= {"RETRY", "SENDING"}
        assert {row["attempts"] for row in tried.values() if row["state"] == "RETRY"} == {0}
        side.smtp.set(Pass())
        side.wait_until_sent(WAITING, seconds=scaled(600))
        assert all(r.metric("mail_breaker_is_open") == 0 for r in replicas)
    assert side.copies() == once(records)
    accepted = side.sink.accepted()
    accepted_at = [mail.at for mail in accepted]
    assert sum(at < accepted_at[0] + 1 for at in accepted_at) < RATE_PER_SECOND / 4
    # What a relay that was held up took at once had been granted one by one.
    held_up_seconds = max(later - at for at, later in itertools.pairwise(accepted_at))
    most = RATE_PER_SECOND * (1.1 + held_up_seconds / WINDOW_SECONDS)
    assert 0.5 * RATE_PER_SECOND < busiest(accepted_at) <= most
    mails = side.mails()
    for partition in side.ends():
        rows = [mails[str(mail.order_id)] for mail in accepted if mail.order_id not in tried]
        offsets = [row["offset"] for row in rows if row["partition"] == partition]
        assert most_displaced(offsets) < SLOTS_OF_EACH


@pytest.mark.fault("F-B2")
def test_fresh_mail_between_a_backlog_of_retries(side: MailSide) -> None:
    """What waits in the ledger goes oldest first, and does not starve what comes meanwhile."""
    event = str(order("NUMBER")["value"])
    waiting = WAITING // 2
    side.sql(INSERT_WAITING, event, waiting, waiting)
    fresh = [order(f"fresh-{number}") for number in range(10)]
    side.sink.script(Rule("dot", Delay(SLOW_SECONDS)))
    with side.running():
        side.wait_for(lambda: side.states()["SENT"] > waiting // 10)
        side.send(fresh)
        before = len(side.sink.accepted())
        side.wait_until_sent(waiting + len(fresh), seconds=scaled(600))
    assert side.copies() == once([*orders(waiting), *fresh])
    came = [str(mail.order_id) for mail in side.sink.accepted()]
    keys = {str(record["key"]) for record in fresh}
    assert max(came.index(key) for key in keys) < before + (waiting - before) / 2
    numbers = [int(key.removeprefix("order-")) for key in came if key not in keys]
    assert most_displaced(numbers) < SLOTS_OF_EACH


@pytest.mark.fault("F-B3")
def test_retries_are_spread_over_the_whole_wait(side: MailSide) -> None:
    """What failed at one moment comes again at all moments of its wait, not at one."""
    records = orders(FAILED)
    put_off = Rule("rcpt", "451 4.7.1 later")
    side.sink.script(put_off)
    with waits(side) as fractions, side.running(MAIL_CONCURRENCY="64"):
        side.send(records)
        side.wait_for(lambda: len(fractions()) >= FAILED, seconds=60)
        side.sink.script()
        side.wait_until_sent(FAILED, seconds=120)
        found = fractions()
    assert all(0 <= fraction < 1 for fraction in found)
    histogram = [sum(int(each * BINS) == number for each in found) for number in range(BINS)]
    even = len(found) / BINS
    # Of chance alone a bin has half of its share now and then.
    assert all(even / 3 < count < even * 3 for count in histogram), histogram
    assert side.copies() == once(records)


def large_orders(name: str, count: int) -> list[dict[str, object]]:
    return [order(f"{name}-{number}", note="x" * LARGE_BYTES) for number in range(count)]


def lag(side: MailSide) -> int:
    return sum(side.ends().values()) - sum(side.positions().values())


def busiest(accepted_at: list[float]) -> float:
    """Return the highest rate of any window, a second."""
    most = max(
        sum(start <= at < start + WINDOW_SECONDS for at in accepted_at) for start in accepted_at
    )
    return most / WINDOW_SECONDS


def most_displaced(numbers: list[int]) -> int:
    """Return how far from its place in the order of all the farthest number came."""
    places = {number: place for place, number in enumerate(sorted(numbers))}
    return max(abs(places[number] - came) for came, number in enumerate(numbers))


@contextmanager
def waits(side: MailSide) -> Iterator[Callable[[], list[float]]]:
    """Note each wait that a mail is given, as a fraction of the longest there could be."""
    side.sql(
        "CREATE TABLE waits (fraction float);"
        " CREATE FUNCTION note() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN"
        " INSERT INTO waits SELECT extract(epoch FROM NEW.due_at - now())"
        f" / least({RETRY_CAP_SECONDS}, {RETRY_BASE_SECONDS} * 2 ^ (NEW.attempts - 1));"
        " RETURN NULL; END $$;"
        " CREATE TRIGGER note AFTER UPDATE ON deliveries FOR EACH ROW"
        " WHEN (OLD.state = 'SENDING' AND NEW.state = 'RETRY') EXECUTE FUNCTION note()"
    )
    try:
        yield lambda: [row["fraction"] for row in side.sql("SELECT fraction FROM waits")]
    finally:
        side.sql("DROP FUNCTION note CASCADE; DROP TABLE waits")
