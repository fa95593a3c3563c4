"""Faults of disks, descriptors, memory and clocks (faults.toml, F-D* and F-T*)."""

import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import psutil
import pytest

from deploy.embedded.services import MAIL_SERVICE
from tests.support.mail_side import (
    PARTITIONS,
    SLOTS,
    MailSide,
    once,
)
from tests.support.proxy import Reset
from tests.support.records import Row, order, orders
from tests.support.service import Service, running_service
from tests.support.sink import Delay, Drop, Rule, Silence

ORDERS = 20
FAILURES = 2
LARGE_BYTES = 200_000
LARGE_ORDERS = 60
# Less than these need.
HEADROOM_BYTES = 2 * 2**20
CLOCK = Path(__file__).parent / "clock"
HOUR_SECONDS = 3600
# Longer than the test profile's lease, shorter than its patience at the dot.
SLOW_SECONDS = 6.5
LEASE = timedelta(seconds=5)
DAY = timedelta(hours=24)
SUSPECT = "550 5.7.1 not this one"
# Where America/New_York or Asia/Seoul have an hour twice, none at all, or a day more.
INSTANTS = (
    "2026-11-01T01:30:00-04:00",
    "2026-11-01T01:30:00-05:00",
    "2026-03-08T01:59:59.999999-05:00",
    "2026-03-08T03:00:00-04:00",
    "2024-02-29T23:59:59+09:00",
    "2024-02-28T16:00:00+00:00",
)


class Clock:
    """The wall clock of the replicas that run by it; all other clocks go on."""

    def __init__(self, path: Path, off_seconds: float) -> None:
        self._path = path
        self.set(off_seconds)

    @property
    def environment(self) -> dict[str, str]:
        """What a replica needs to run by it."""
        return {"PYTHONPATH": str(CLOCK), "CLOCK_FILE": str(self._path)}

    def set(self, off_seconds: float) -> None:
        """Let it jump to so many seconds beside the true time."""
        draft = self._path.with_suffix(".new")
        draft.write_text(str(off_seconds), encoding="ascii")
        draft.replace(self._path)


@pytest.mark.fault("F-D1")
def test_a_log_on_a_full_device_stops_no_mail(side: MailSide) -> None:
    """Not one line can be written: one mail each all the same."""
    records = orders(ORDERS)
    argv = ["/bin/sh", "-c", f"exec {MAIL_SERVICE} consume >/dev/full 2>&1"]
    state = side.stack.state
    with running_service(state, side.ports, "mail-full", argv, side.environment) as replica:
        assert Path(f"/proc/{replica.pid}/fd/1").readlink() == Path("/dev/full")
        side.send(records)
        side.wait_until_sent(ORDERS)
        side.wait_for(lambda: replica.metric("mail_verdicts_total", verdict="SENT") == ORDERS)
        assert replica.is_live()
    assert state.log("mail-full").read_bytes() == b""
    assert side.copies() == once(records)


@pytest.mark.fault("F-D1")
def test_a_log_that_cannot_grow_stops_no_mail(side: MailSide) -> None:
    """While its disk is full lines are lost and no mail is; with room again there are lines."""
    first, later = orders(2 * ORDERS)[:ORDERS], orders(2 * ORDERS)[ORDERS:]
    with side.running() as replica:
        log = replica.part.command.log_path
        size = log.stat().st_size
        limit(replica, resource.RLIMIT_FSIZE, size)
        side.send(first)
        side.wait_until_sent(ORDERS)
        assert log.stat().st_size == size
        assert replica.is_ready()
        limit(replica, resource.RLIMIT_FSIZE, resource.RLIM_INFINITY)
        side.send(later)
        side.wait_until_sent(2 * ORDERS)
        side.wait_for(
            lambda: (
                {line["order_id"] for line in replica.logged("mail.judged")}
                >= {record["key"] for record in later}
            )
        )
    assert side.copies() == once([*first, *later])


@pytest.mark.fault("F-D1")
def test_the_ledgers_disk_is_full(side: MailSide) -> None:
    """What was accepted is written, and what was not taken in is, when there is room: once each."""
    records = orders(2 * ORDERS)
    slow = Rule("dot", Delay(3.0), times=SLOTS)
    side.sink.script(slow)
    with side.running() as replica:
        side.send(records[:SLOTS])
        side.wait_for(lambda: side.sink.fired(slow) == SLOTS)
        with full_disk(side):
            side.wait_for(lambda: replica.logged("outcomes.not_recorded"))
            side.send(records[SLOTS:])
            side.wait_for(lambda: len(replica.logged("outcomes.not_recorded")) > 2 * SLOTS)
            assert side.states() == {"SENDING": SLOTS}
            assert len(side.sink.accepted()) == SLOTS
            assert replica.is_live()
        side.wait_until_sent(len(records))
    assert side.copies() == once(records)
    assert {row["attempts"] for row in side.mails().values()} == {1}


@pytest.mark.fault("F-D2")
def test_no_descriptors_are_left(side: MailSide) -> None:
    """Relay and ledger cannot be reached anew: no attempt is burnt, and then one mail each."""
    first, later = orders(SLOTS), orders(2 * ORDERS)[SLOTS:]
    with side.running() as replica:
        side.send(first)
        side.wait_until_sent(SLOTS)
        before = psutil.Process(replica.pid).num_fds()
        limit(replica, resource.RLIMIT_NOFILE, 3)
        side.smtp.set(Reset())
        side.send(later)
        side.wait_for(lambda: refused_by_the_system(replica))
        side.database.set(Reset())
        side.wait_for(lambda: len(replica.logged("round.interrupted")) >= FAILURES)
        # Nobody can ask it how it is, either.
        assert not replica.is_live()
        assert replica.part.is_running
        _, most = resource.prlimit(replica.pid, resource.RLIMIT_NOFILE)
        limit(replica, resource.RLIMIT_NOFILE, most)
        side.wait_until_sent(len(first) + len(later))
        side.wait_for(replica.is_ready)
        side.wait_for(lambda: psutil.Process(replica.pid).num_fds() <= before + SLOTS)
    assert side.copies() == once([*first, *later])
    assert {row["attempts"] for row in side.mails().values()} == {1}


@pytest.mark.fault("F-D3")
def test_no_memory_is_left(side: MailSide) -> None:
    """It ends by an error, as if killed, and the next replica finishes what is left."""
    slow = [order(f"slow-{number}") for number in range(SLOTS // 2)]
    records = [*slow, *large_orders(LARGE_ORDERS)]
    unanswered = Rule("dot", Silence(), to="slow-", times=len(slow))
    side.sink.script(unanswered)
    with side.running() as replica:
        side.send(slow)
        side.wait_for(lambda: side.sink.fired(unanswered) == len(slow))
        data = psutil.Process(replica.pid).memory_info().data
        limit(replica, resource.RLIMIT_DATA, data + HEADROOM_BYTES)
        side.send(records[len(slow) :])
        assert replica.wait_for_end() != 0
        ended_at, mails = time.time(), side.mails()
    sent = {order_id for order_id, row in mails.items() if row["state"] == "SENT"}
    assert len(sent) < LARGE_ORDERS
    with side.running():
        side.wait_until_sent(len(records))
    accepted = side.accepted_of(ended_at)
    assert side.unexplained(accepted=accepted, sent=sent) == []
    copies = side.copies()
    assert set(copies) == set(once(records))
    assert {copies[record["key"]] for record in slow} == {2}


@pytest.mark.fault("F-T1")
def test_the_wall_clock_jumps_while_mails_are_under_way(side: MailSide, tmp_path: Path) -> None:
    """An hour forth and two back: no lease ends, nobody steals, and nothing is due early."""
    clock = Clock(tmp_path / "clock", 0)
    slow = [order(f"slow-{number}") for number in range(SLOTS // 2)]
    later = [order(f"later-{number}") for number in range(ORDERS)]
    # Whoever of two replicas has a partition logs one of these.
    back = [{**order(f"back-{each}"), "partition": each} for each in range(PARTITIONS)]
    hold = Rule("dot", Delay(SLOW_SECONDS), to="slow-", times=len(slow))
    side.sink.script(hold, Rule("rcpt", "451 4.7.1 later", to="later-"))
    with side.running(**clock.environment) as jumping:
        side.send(later)
        side.wait_for(lambda: postponed(side) == ORDERS)
        before = side.mails()
        side.send(slow)
        side.wait_for(lambda: side.sink.fired(hold) == len(slow))
        clock.set(HOUR_SECONDS)
        side.send([order("forth")])
        side.wait_until_sent(1)
        with side.running() as other:
            clock.set(-HOUR_SECONDS)
            side.send(back)
            side.wait_until_sent(1 + len(back) + len(slow))
            leases = side.sql("SELECT lease_until - now() AS left FROM replicas")
            assert len(leases) == 2
            assert all(timedelta(0) < lease["left"] <= LEASE for lease in leases)
            for replica in (jumping, other):
                assert replica.metric("mail_leases_ended_total") == 0
        side.wait_for(lambda: {*map(hours_off, jumping.logged("mail.judged"))} >= {-1, 1})
    assert side.copies() == once([*slow, order("forth"), *back])
    after = side.mails()
    for record in later:
        assert after[record["key"]] == before[record["key"]]


@pytest.mark.fault("F-T1")
def test_a_clock_that_was_set_back_confirms_no_suspicion(side: MailSide, tmp_path: Path) -> None:
    """What the relay accepted before it refused a mail says nothing against this mail."""
    clock = Clock(tmp_path / "clock", 0)
    refuse = Rule("rcpt", SUSPECT, to="suspect", times=2)
    side.sink.script(refuse)
    with side.running(**clock.environment):
        side.send([order("accepted")])
        side.wait_until_sent(1)
        clock.set(-HOUR_SECONDS)
        side.send([order("suspect")])
        side.wait_for(lambda: side.sink.fired(refuse) == 1 and side.states()["RETRY"] == 1)
        hurry(side)
        side.wait_for(lambda: side.sink.fired(refuse) == 2 and not side.states()["SENDING"])
        assert side.mails()["order-suspect"]["state"] == "RETRY"
        hurry(side)
        side.wait_until_sent(2)


@pytest.mark.fault("F-T2")
@pytest.mark.parametrize("off_seconds", [600, -600], ids=["ahead", "behind"])
def test_a_clock_that_is_not_the_databases(
    side: MailSide, tmp_path: Path, off_seconds: int
) -> None:
    """Retries, a lost answer and times in the ledger are as ever: by the database's clock."""
    clock = Clock(tmp_path / "clock", off_seconds)
    records = orders(ORDERS)
    put_off = Rule("rcpt", "451 4.7.1 later", times=3)
    lost = Rule("dot", Drop(is_accepted=False), times=1)
    refused = Rule("rcpt", SUSPECT, to="suspect", times=1)
    side.sink.script(refused, put_off, lost)
    began_at = now(side)
    with side.running(**clock.environment) as replica:
        side.send([*records, order("suspect")])
        side.wait_until_sent(ORDERS)
        assert side.sink.fired(put_off) == 3
        assert side.sink.fired(lost) == side.sink.fired(refused) == 1
        offsets = {round(seconds_off(line) / 60) for line in replica.logged("mail.judged")}
    assert offsets == {off_seconds // 60}
    mails = side.mails()
    assert mails.pop("order-suspect")["state"] == "RETRY"
    assert side.copies() == once(records)
    assert sum(row["unknown_count"] for row in mails.values()) == 1
    assert sum(row["attempts"] for row in mails.values()) == ORDERS + 3 + 1
    for row in mails.values():
        assert began_at < row["taken_in_at"] < row["sent_at"] < now(side)


@pytest.mark.fault("F-T2")
def test_no_mail_expires_by_the_clock_of_its_replica(side: MailSide, tmp_path: Path) -> None:
    """Ten minutes ahead, with five left to the mail: put off once, it is sent."""
    clock = Clock(tmp_path / "clock", 600)
    at = now(side) - timedelta(minutes=55)
    put_off = Rule("rcpt", "451 4.7.1 later", times=1)
    side.sink.script(put_off)
    with side.running(MAIL_GIVE_UP_HOURS="1", **clock.environment):
        side.send([at_time(order("old"), at.isoformat())])
        side.wait_for(lambda: side.sink.fired(put_off) == 1 and not side.states()["SENDING"])
        assert side.mails()["order-old"]["state"] != "DEAD"
        side.wait_until_sent(1)


@pytest.mark.fault("F-T3")
@pytest.mark.parametrize("zone", ["America/New_York", "Asia/Seoul"])
def test_what_is_stored_are_instants(side: MailSide, zone: str) -> None:
    """Whatever TZ says, around summer time and leap days: no time is an hour or a day off."""
    records = [at_time(order(number), instant) for number, instant in enumerate(INSTANTS)]
    stamps = [datetime.fromisoformat(instant) for instant in INSTANTS]
    stamped = [
        {**order(f"stamped-{number}"), "timestamp": int(at.timestamp() * 1000)}
        for number, at in enumerate(stamps)
    ]
    put_off = Rule("rcpt", "451 4.7.1 later", times=1)
    side.sink.script(put_off)
    began_at = now(side)
    with side.running(TZ=zone) as replica:
        assert psutil.Process(replica.pid).environ()["TZ"] == zone
        side.send([*records, *stamped, order("fresh")])
        side.wait_until_sent(1)
        side.wait_for(lambda: side.states() == {"SENT": 1, "DEAD": 2 * len(INSTANTS)})
    assert side.sink.fired(put_off) == 1
    mails = side.mails()
    fresh = mails.pop("order-fresh")
    assert began_at < fresh["taken_in_at"] < fresh["sent_at"] < now(side)
    assert {row["give_up_at"] - row["event_at"] for row in [fresh, *mails.values()]} == {DAY}
    for number, at in enumerate(stamps):
        assert mails[f"order-{number}"]["event_at"] == at
        off = at - mails[f"order-stamped-{number}"]["event_at"]
        assert timedelta(0) <= off < timedelta(milliseconds=1)


def limit(replica: Service, kind: int, soft: int) -> None:
    """Set a limit of a process while it runs; it can be raised again."""
    _, hard = resource.prlimit(replica.pid, kind)
    resource.prlimit(replica.pid, kind, (soft, hard))


@contextmanager
def full_disk(side: MailSide) -> Iterator[None]:
    """Have the ledger refuse every row, as with no room left, until the block ends."""
    side.sql(
        "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN"
        " RAISE EXCEPTION 'could not extend file: No space left on device'"
        " USING ERRCODE = 'disk_full'; END $$;"
        " CREATE TRIGGER refuse BEFORE INSERT OR UPDATE ON deliveries"
        " FOR EACH ROW EXECUTE FUNCTION refuse()"
    )
    try:
        yield
    finally:
        side.sql("DROP FUNCTION refuse CASCADE")


def refused_by_the_system(replica: Service) -> bool:
    return any(
        "Too many open files" in line["answer"] for line in replica.logged("breaker.changed")
    )


def large_orders(count: int) -> list[Row]:
    return [order(f"large-{number}", note="x" * LARGE_BYTES) for number in range(count)]


def now(side: MailSide) -> datetime:
    """Return the database's time."""
    at = side.sql("SELECT clock_timestamp() AS at")[0]["at"]
    assert isinstance(at, datetime)
    return at


def at_time(record: Row, instant: str) -> Row:
    return {**record, "headers": {"ce_time": instant}}


def hurry(side: MailSide) -> None:
    side.sql("UPDATE deliveries SET due_at = now() WHERE state = 'RETRY'")


def postponed(side: MailSide) -> int:
    """Put off for half an hour what is to be tried again; return how much is."""
    side.sql(
        "UPDATE deliveries SET due_at = now() + interval '30 minutes'"
        " WHERE state = 'RETRY' AND due_at < now() + interval '10 minutes'"
    )
    later = "state = 'RETRY' AND due_at >= now() + interval '10 minutes'"
    return len(side.sql(f"SELECT id FROM deliveries WHERE {later}"))


def seconds_off(line: Row) -> float:
    """Say by how much a line's clock was off, give or take the age of the test."""
    return (datetime.fromisoformat(line["timestamp"]) - datetime.now(UTC)).total_seconds()


def hours_off(line: Row) -> int:
    return round(seconds_off(line) / HOUR_SECONDS)
