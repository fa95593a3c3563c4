"""What slots are for: many mails at once from one partition, and none that waits for another."""

from tests.support.mail_side import MailSide, once
from tests.support.records import order, orders
from tests.support.scale import IS_LONG
from tests.support.sink import Delay, Rule

DELAY_SECONDS = 0.1
SLOTS = 32
ORDERS = 3_000
SERIAL_ORDERS = 40
# So many for each slot: the fastest stretch tells the rate, whatever else the machine did.
STRETCH_MAILS = 20
# A broker takes no session shorter than this, nor a poll interval shorter than the session.
POLL_INTERVAL_SECONDS = 45 if IS_LONG else 6
# The test profile waits 8 s for an answer to the dot, so short of the long run it is a little more.
SLOW_MAIL_SECONDS = 3 * POLL_INTERVAL_SECONDS if IS_LONG else 1.2 * POLL_INTERVAL_SECONDS


def test_thirty_two_slots_do_the_work_of_twenty_five(side: MailSide) -> None:
    """One partition, a relay that takes 100 ms for each mail: 25 times the serial rate and more."""
    side.reset(partitions=1)
    side.sink.script(Rule("dot", Delay(DELAY_SECONDS)))
    serial = rate(side, SERIAL_ORDERS, slots=1)
    side.reset(partitions=1)
    side.sink.script(Rule("dot", Delay(DELAY_SECONDS)))
    parallel = rate(side, ORDERS, slots=SLOTS)
    assert parallel >= 25 * serial, f"{parallel:.0f}/s against {serial:.1f}/s"


def test_a_mail_slower_than_any_poll_delays_no_other(side: MailSide) -> None:
    """Its neighbours are mailed while it hangs, nobody is evicted, and it is sent once."""
    side.reset(partitions=1)
    side.sink.script(slow := Rule("dot", Delay(SLOW_MAIL_SECONDS), to="customer-slow@"))
    records = [order("slow"), *orders(100)]
    side.send(records)
    with side.running(
        APP_ENV="development" if IS_LONG else "test",
        KAFKA_MAX_POLL_INTERVAL_MS=str(1000 * POLL_INTERVAL_SECONDS),
    ) as replica:
        side.wait_for(
            lambda: (
                {each for each, row in side.mails().items() if row["state"] != "SENT"}
                == {"order-slow"}
            )
        )
        assert side.mails()["order-slow"]["state"] == "SENDING"
        placed = replica.logged("partition.placed")
        side.wait_until_sent(len(records), seconds=SLOW_MAIL_SECONDS + 10)
        assert side.sink.fired(slow) == 1
        # Whoever is evicted is placed again.
        assert replica.logged("partition.placed") == placed
        assert list(side.members().values()) == [{0}]
    assert side.copies() == once(records)


def rate(side: MailSide, count: int, *, slots: int) -> float:
    """Return how many mails a second a replica with so many slots sends of a backlog."""
    side.send(orders(count))
    with side.running(MAIL_CONCURRENCY=str(slots)):
        side.wait_until_sent(count, seconds=2 * count * DELAY_SECONDS / slots + 30)
    times = sorted(mail.at for mail in side.sink.accepted())
    assert len(times) == count
    stretch = STRETCH_MAILS * slots
    return max(stretch / (end - begin) for begin, end in zip(times, times[stretch:], strict=False))
