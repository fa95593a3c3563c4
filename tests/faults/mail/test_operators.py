"""What operators do, and what goes wrong while they do it (faults.toml, F-R*, F-Q5, F-K9, F-L5)."""

import json
import random
import signal
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from tests.support.mail_side import MOST_IN_HAND, MailSide, once
from tests.support.proxy import Pass, Refuse, Reset
from tests.support.records import Row, dated, order, orders
from tests.support.sink import Delay, Rule, Settings

MONTH = 10_000
MISSING = 37
CAMPAIGN = "2026-10-again"
CAMPAIGN_ORDERS = 2_000
KILLS = 4
REPLAYED_ORDERS = 1_000
LIMIT = 10
BATCH_SECONDS = 1.0
# What starting a command takes, about: before it nothing is written.
COMMAND_SECONDS = 0.8
SEED = 7
PAUSED_ORDERS = 2_000
PAUSE_SECONDS = 2.0
SLOW_SECONDS = 0.02
LETTERS = 600
EXIT_REFUSED = 3
REFUSED_SECONDS = 60.0
MANY_SLOTS = {"MAIL_CONCURRENCY": "64"}
YESTERDAY = timedelta(hours=30)

USER, OLD_PASSWORD, NEW_PASSWORD = "shop", "correct-horse", "battery-staple"
RELAY = Settings(user=USER, password=OLD_PASSWORD, tls="starttls", is_tls_required=True)


@pytest.mark.fault("F-R1", "F-R2")
def test_last_months_confirmations_again(side: MailSide) -> None:
    """Nothing that was sent goes again, 37 that are missing go once, and live mail flows on."""
    since, until = last_month()
    step = (until - since) / MONTH
    records = [dated(record, since + n * step) for n, record in enumerate(orders(MONTH))]
    month = ("--from", since.isoformat(), "--to", until.isoformat())
    side.send(records)
    with side.running(**MANY_SLOTS) as replica:
        side.wait_for(lambda: side.states() == {"DEAD": MONTH}, seconds=60)
        side.command("mails", "retry", "--all", "--state", "DEAD", "--reason", "expired", "--yes")
        side.wait_until_sent(MONTH, seconds=300)
        first = side.copies()
        assert first == once(records)
        settle_commits(side)

        before = where_it_is(side)
        told = answer(side, "replay", *month, "--yes")
        assert told["events"] == {"SENT": MONTH}
        assert told["made_due"] == []
        assert where_it_is(side) == before

        missing = lose(side, MISSING)
        report = answer(side, "reconcile", *month, expected=1)
        assert set(report["missing"]) == missing
        with live_orders(side) as live, watched(side) as seen:
            told = answer(side, "replay", *month, "--yes")
            side.wait_for(lambda: len(live) > MISSING)
        assert told["events"] == {"SENT": MONTH - MISSING, "unknown": MISSING}
        assert set(told["made_due"]) == missing
        side.wait_until_sent(MONTH + len(live))
        assert side.copies() - first == once([*live, *(order(each) for each in bare(missing))])
        assert answer(side, "reconcile", *month)["states"] == {"SENT": MONTH}
        settle_commits(side)
        assert seen.members == {frozenset(side.members())}
        assert [where for where, each in seen.places.items() if not is_forward(each)] == []
        assert all(len(each) > 1 for each in seen.places.values())
        assert replica.is_ready()


@pytest.mark.fault("F-R1")
def test_ten_of_last_month_are_resent_for_a_look(side: MailSide) -> None:
    """A campaign sends as many as it may, under Message-IDs of its own, however often it runs."""
    records = recent(40)
    resend = ("mails", "resend", *range_of(records), *campaign("--limit", str(LIMIT)), "--yes")
    with side.running():
        side.send(records)
        side.wait_until_sent(len(records))
        made = made_by_two_at_once(side, *resend)
        assert sorted(made) == sorted(once(records[:LIMIT]))
        side.wait_until_sent(len(records) + LIMIT)
        told = answer(side, *resend)
        assert told["made_due"] == []
        assert told["left_alone"] == {
            "beyond the limit": len(records) - LIMIT,
            "in the campaign already": LIMIT,
        }
        assert side.states() == {"SENT": len(records) + LIMIT}
    assert message_ids(side) == expected_ids(records, resent=records[:LIMIT])


@pytest.mark.fault("F-R1")
def test_a_limited_campaign_killed_until_it_ends_by_itself(side: MailSide) -> None:
    """All runs together make ten."""
    records = recent(40)
    resend = ("mails", "resend", *range_of(records), *campaign("--limit", str(LIMIT)), "--yes")
    with side.running(), slowed(side):
        side.send(records)
        side.wait_until_sent(len(records))
        with side.begun(*resend) as process:
            side.wait_for(lambda: is_adding(side))
            process.kill()
            process.wait()
        wait_until_committed(side)
        assert in_campaign(side) == 0
        after_seconds = COMMAND_SECONDS / 2
        while killed_after(side, after_seconds, *resend):
            after_seconds *= 1.5
            assert in_campaign(side) in {0, LIMIT}
        assert answer(side, *resend)["made_due"] == []
        side.wait_until_sent(len(records) + LIMIT)
    assert message_ids(side) == expected_ids(records, resent=records[:LIMIT])


@pytest.mark.fault("F-R1")
def test_a_campaign_killed_and_run_twice_at_once(side: MailSide) -> None:
    """Every order gets one mail of the campaign."""
    chance = random.Random(SEED)
    records = recent(CAMPAIGN_ORDERS)
    resend = ("mails", "resend", *range_of(records), *campaign(), "--yes")
    with side.running(**MANY_SLOTS):
        side.send(records)
        side.wait_until_sent(CAMPAIGN_ORDERS, seconds=60)
        with slowed(side):
            counts = [
                killed_as_soon_as_one_batch_is_written(side, lambda: in_campaign(side), resend)
            ]
            for _ in range(KILLS):
                killed_after(side, COMMAND_SECONDS + chance.uniform(0, 3 * BATCH_SECONDS), *resend)
                counts.append(in_campaign(side))
            assert counts == sorted(counts)
            assert 0 < counts[0] < CAMPAIGN_ORDERS
            made = made_by_two_at_once(side, *resend)
        assert len(made) == len(set(made)) == CAMPAIGN_ORDERS - counts[-1]
        assert in_campaign(side) == CAMPAIGN_ORDERS
        side.wait_until_sent(2 * CAMPAIGN_ORDERS, seconds=60)
    assert message_ids(side) == expected_ids(records, resent=records)


@pytest.mark.fault("F-R1")
def test_a_replay_killed_half_way(side: MailSide) -> None:
    """Run again it makes due what is still missing, and each missing mail goes out once."""
    records = recent(REPLAYED_ORDERS)
    replay = ("replay", *range_of(records), "--yes")
    with side.running(**MANY_SLOTS):
        side.send(records)
        side.wait_until_sent(REPLAYED_ORDERS)
        missing = lose(side, REPLAYED_ORDERS * 3 // 4)
        first = side.copies()

        def done() -> int:
            return len(side.mails()) - REPLAYED_ORDERS + len(missing)

        with slowed(side):
            counts = [killed_as_soon_as_one_batch_is_written(side, done, replay)]
            killed_after(side, COMMAND_SECONDS + BATCH_SECONDS, *replay)
            counts.append(done())
            assert 0 < counts[0] <= counts[1] <= len(missing)
            assert counts[0] < len(missing)
            assert len(answer(side, *replay)["made_due"]) == len(missing) - counts[1]
        side.wait_until_sent(REPLAYED_ORDERS)
    assert side.copies() - first == Counter(missing)


@pytest.mark.fault("F-L5")
def test_a_ledger_restored_to_an_hour_ago(side: MailSide) -> None:
    """No replica starts; after a rewind what may have been sent is HELD until it is settled."""
    early, never = named("early", 5), named("never", 5)
    # So many, and so slow, that some are not taken in yet when the backup begins.
    records = [*early, *never, *orders(80)]
    refused = Rule("rcpt", "451 4.7.1 later", to="customer-never-")
    put_off = Rule("rcpt", "451 4.7.1 later", to="customer-early-")
    side.sink.script(refused, put_off, Rule("dot", Delay(0.6)))
    with side.running():
        side.send(records)
        side.wait_for(lambda: side.states()["SENT"] > 10 and side.states()["RETRY"] > 5)
        backup = side.dump()
        side.sink.script(refused)
        side.wait_for(lambda: side.positions() == side.ends())
        side.wait_until_sent(len(records) - len(never), seconds=60)
        side.wait_for(lambda: side.commits() == side.ends())
    sent = side.copies()
    side.restore(backup)
    then = side.states()
    assert then["RETRY"] > 0
    assert then["SENDING"] > 0
    assert 0 < then["SENT"] < len(sent)
    assert sum(side.ends().values()) > sum(side.positions().values())
    assert_refused(side)
    assert side.copies() == sent

    side.command("positions", "rewind", "--yes")
    fresh = named("fresh", 3)
    side.sink.script()
    with side.running():
        side.send(fresh)
        side.wait_for(lambda: side.positions() == side.ends())
        held = len(records) - then["SENT"]
        side.wait_for(lambda: side.states() == {"SENT": then["SENT"] + len(fresh), "HELD": held})
        assert side.copies() == sent + once(fresh)
        waiting = {each["order_id"] for each in answer(side, "mails", "list", "--state", "HELD")}
        assert waiting == set(once(records)) - closed(side)
        in_log = [order_id for order_id in waiting if order_id in sent]
        assert len(in_log) == held - len(never)
        side.command("mails", "settle", *in_log, "--sent", "--why", "the relay's log", "--yes")
        assert side.copies() == sent + once(fresh)
        side.command("mails", "retry", "--all", "--state", "HELD", "--yes")
        side.wait_until_sent(len(records) + len(fresh))
        assert answer(side, "mails", "list") == []
    assert side.copies() == once([*records, *fresh])


@pytest.mark.fault("F-L5")
def test_a_ledger_restored_that_had_read_everything(side: MailSide) -> None:
    """Its positions tell nothing, so who restores says it: what was due is HELD, and goes once."""
    records = named("early", 8)
    side.sink.script(Rule("rcpt", "451 4.7.1 later"))
    with side.running():
        side.send(records)
        side.wait_for(lambda: side.positions() == side.ends())
        backup = side.dump()
        side.sink.script()
        side.wait_until_sent(len(records))
    side.restore(backup)
    assert set(side.states()) <= {"RETRY", "SENDING"}
    side.command("positions", "rewind", "--hold-due", "--yes")
    with side.running():
        side.send(named("fresh", 3))
        side.wait_until_sent(3)
        assert side.states() == {"SENT": 3, "HELD": len(records)}
        settle_as_sent(side)
    assert side.states() == {"SENT": 3 + len(records)}
    assert side.copies() == once([*records, *named("fresh", 3)])


@pytest.mark.fault("F-L5")
def test_a_ledger_lost_entirely(side: MailSide) -> None:
    """An empty schema: as one restored, and all that the group had read is HELD."""
    records, fresh = orders(40), named("fresh", 3)
    with side.running():
        side.send(records)
        side.wait_until_sent(len(records))
        side.wait_for(lambda: side.commits() == side.ends())
    side.lose_ledger()
    side.command("migrate")
    assert_refused(side)
    side.command("positions", "rewind", "--yes")
    with side.running():
        side.send(fresh)
        side.wait_for(lambda: side.states() == {"SENT": len(fresh), "HELD": len(records)})
        assert side.positions() == side.ends()
        assert side.copies() == once([*records, *fresh])
        waiting = {each["order_id"] for each in answer(side, "mails", "list", "--state", "HELD")}
        assert waiting == set(once(records))
        settle_as_sent(side)
    assert side.states() == {"SENT": len(records) + len(fresh)}
    assert side.copies() == once([*records, *fresh])


@pytest.mark.fault("F-L5")
def test_a_ledger_restored_after_the_topic_was_made_anew(side: MailSide) -> None:
    """That the group has had a topic before is no reason to believe a ledger that is behind."""
    records, more, later = orders(10), named("more", 10), named("later", 10)
    with side.running():
        side.send(records)
        side.wait_until_sent(10)
    make_anew(side, more)
    with side.running():
        side.wait_until_sent(20)
        backup = side.dump()
        side.send(later)
        side.wait_until_sent(30)
        side.wait_for(lambda: side.commits() == side.ends())
    side.restore(backup)
    assert_refused(side)
    side.command("positions", "rewind", "--yes")
    with side.running():
        side.wait_for(lambda: side.states() == {"SENT": 20, "HELD": len(later)})
    assert side.copies() == once([*records, *more, *later])


@pytest.mark.fault("F-L5")
def test_a_ledger_restored_under_a_replica_at_work(side: MailSide) -> None:
    """It waited for its ledger; it ends when another comes back, and sends nothing twice."""
    early, later = named("early", 8), named("later", 10)
    side.sink.script(Rule("rcpt", "451 4.7.1 later", to="customer-early-"))
    with side.running() as replica:
        side.send([*early, *orders(10)])
        side.wait_for(lambda: side.states()["SENT"] == 10 and side.states()["RETRY"] > 4)
        backup = side.dump()
        side.sink.script()
        side.send(later)
        side.wait_until_sent(10 + len(early) + len(later))
        side.database.set(Refuse())
        side.wait_for(lambda: not replica.is_ready())
        side.restore(backup)
        side.database.set(Pass())
        assert replica.wait_for_end(seconds=REFUSED_SECONDS) == EXIT_REFUSED
    assert side.copies() == once([*early, *orders(10), *later])


@pytest.mark.fault("F-L5")
def test_a_250_that_comes_into_a_restored_ledger(side: MailSide) -> None:
    """A replica was frozen meanwhile; what it knows is not written on the mail of another order."""
    known, others = named("known", 4), named("a", 4)
    with side.running():
        side.send(orders(1))
        side.wait_until_sent(1)
    backup = side.dump()
    with side.running("m.after_250=sleep:3000") as frozen:
        side.send([{**record, "partition": 0} for record in known])
        side.wait_for(lambda: len(side.sink.accepted()) == 1 + len(known))
        before = side.mails()
        frozen.signal(signal.SIGSTOP)
        side.restore(backup)
        side.command("positions", "rewind", "--yes")
        side.send([{**record, "partition": 0} for record in others])
        side.sink.script(refused := Rule("rcpt", "451 4.7.1 later", to="customer-a-"))
        with side.running(is_waited_for=False):
            side.wait_for(lambda: side.sink.fired(refused) >= len(others))
            after = side.mails()
            assert {after[key]["id"] for key in once(others)} & {
                before[key]["id"] for key in once(known)
            }
            frozen.signal(signal.SIGCONT)
            frozen.signal(signal.SIGTERM)
            frozen.wait_for_end()
            assert closed(side) <= set(side.copies())
            side.sink.script()
            side.wait_for(lambda: closed(side) >= set(once(others)))
    assert side.copies() == once([*orders(1), *known, *others])


def test_a_backlog_of_a_day(side: MailSide) -> None:
    """What is too old when it comes is DEAD and not sent; a person has it sent, once each."""
    records = [dated(record, datetime.now(UTC) - YESTERDAY) for record in orders(60)]
    side.send(records)
    with side.running() as replica:
        side.wait_for(lambda: side.states() == {"DEAD": len(records)})
        side.wait_for(
            lambda: (
                replica.metric("mail_records_taken_in_total", **{"as": "expired"}) == len(records)
            )
        )
        assert {row["reason"] for row in side.mails().values()} == {"expired"}
        assert side.sink.accepted() == []
        retry = ("mails", "retry", "--all", "--state", "DEAD", "--reason", "expired")
        side.command(*retry, "--dry-run")
        assert side.states() == {"DEAD": len(records)}
        side.command(*retry, "--yes")
        side.wait_until_sent(len(records))
        assert answer(side, *retry, "--yes") == []
    assert side.copies() == once(records)


def test_stop_sending_now(side: MailSide) -> None:
    """Two seconds after `pause` no mail goes out any more; `resume` sends the rest, once each."""
    records = orders(PAUSED_ORDERS)
    side.sink.script(Rule("dot", Delay(SLOW_SECONDS)))
    with side.running() as one, side.running() as other:
        side.send(records)
        side.wait_for(lambda: side.states()["SENT"] > PAUSED_ORDERS // 20)
        side.command("pause", "--reason", "wrong price")
        paused_at = time.time()
        time.sleep(PAUSE_SECONDS)
        accepted = side.sink.accepted()
        time.sleep(PAUSE_SECONDS / 2)
        assert side.sink.accepted() == accepted
        assert max(mail.at for mail in accepted) < paused_at + PAUSE_SECONDS
        assert 0 < len(accepted) < PAUSED_ORDERS
        # What was claimed and had not begun was given back.
        mails = side.mails().values()
        waiting = [row for row in mails if row["state"] != "SENT"]
        assert len(mails) - len(waiting) == len(accepted)
        assert {(row["state"], row["reason"]) for row in waiting} <= {("RETRY", "not begun")}
        assert len(waiting) <= 2 * MOST_IN_HAND
        told = answer(side, "positions", "list")
        assert told["paused"] == "wrong price"
        assert sum(each["lag"] for each in told["positions"]) == PAUSED_ORDERS - len(mails)
        assert one.is_ready()
        assert other.is_ready()
        assert sum(map(len, side.members().values())) == len(side.ends())
        side.command("resume")
        side.wait_until_sent(PAUSED_ORDERS)
    assert side.copies() == once(records)


@pytest.mark.fault("F-S16")
def test_the_relays_password_is_changed(side: MailSide) -> None:
    """Nothing is lost, no attempt counts, and with the new password each mail goes out once."""
    first, later = orders(20), named("later", 20)
    secret = side.stack.state.root / "relay-password"
    secret.write_text(f"{OLD_PASSWORD}\n")
    environment = {
        "SMTP_TLS": "starttls",
        "SMTP_USER": USER,
        "SMTP_PASSWORD_FILE": str(secret),
        "SSL_CERT_FILE": str(side.sink.authority),
    }
    side.sink.configure(RELAY)
    with side.running(**environment) as replica:
        side.send(first)
        side.wait_until_sent(len(first))
        side.sink.configure(replace(RELAY, password=NEW_PASSWORD))
        side.smtp.set(Reset())
        side.send(later)
        side.wait_for(lambda: replica.metric("mail_breaker_is_open") == 1)
        side.wait_for(lambda: side.sink.counters().stages["auth"] > 3)
        side.wait_for(lambda: side.states()["RETRY"])
        (opened,) = replica.logged("breaker.changed")
        assert "535 5.7.8" in opened["answer"]
        waiting = [row for row in side.mails().values() if row["state"] == "RETRY"]
        assert waiting
        assert {row["attempts"] for row in waiting} == {0}
        assert set(side.states()) <= {"SENT", "RETRY", "SENDING"}
    assert side.copies() == once(first)
    secret.write_text(f"{NEW_PASSWORD}\n")
    with side.running(**environment) as replica:
        side.wait_until_sent(len(first) + len(later))
        assert replica.logged("breaker.changed") == []
    assert {row["attempts"] for row in side.mails().values()} == {1}
    assert {mail.user for mail in side.sink.accepted()} == {USER}
    assert side.copies() == once([*first, *later])


@pytest.mark.fault("F-K9")
def test_events_of_a_gap_are_published_once_more(side: MailSide) -> None:
    """The gap is listed and accepted; its events, byte for byte as they were, are mailed once."""
    moment = datetime.now(UTC) - YESTERDAY
    read = [{**order("read"), "partition": 0}]
    lost = [dated({**order(f"lost-{n}"), "partition": 0}, moment) for n in range(10)]
    lost.insert(5, poison("lost"))
    kept = [{**order(f"kept-{n}"), "partition": n % 3} for n in range(12)]
    kept.insert(5, poison("kept"))
    with side.running():
        side.send(read)
        side.wait_until_sent(1)
    side.send(lost)
    end = side.ends()[0]
    side.expire_before(0, end)
    side.send(kept)
    with side.running(is_waited_for=False) as replica:
        side.wait_for(lambda: replica.logged("gap.found"))
        beside = [record for record in kept if record["partition"] != 0]
        side.wait_until_sent(1 + len(beside))
        assert not replica.is_ready()
        assert replica.is_live()
        (gap,) = answer(side, "positions", "list", expected=1)["gaps"]
        assert (gap["partition"], gap["first_offset"], gap["end_offset"]) == (0, 1, end)
        side.command("positions", "accept-gap", str(gap["id"]), "--yes")
        side.wait_until_sent(1 + 12)
        side.wait_for(replica.is_ready)
        assert answer(side, "positions", "list")["gaps"] == []
        assert len(side.dead_letters()) == 1
        side.send(lost)
        side.wait_until_sent(1 + 12 + 10)
        side.wait_for(lambda: len(side.dead_letters()) == 2)
        side.wait_for(lambda: side.positions() == side.ends())
        assert side.states() == {"SENT": 1 + 12 + 10}
    mailed = [each for each in (*read, *lost, *kept) if not str(each["key"]).startswith("poison")]
    assert side.copies() == once(mailed)


@pytest.mark.fault("F-K8")
@pytest.mark.parametrize("is_away", [True, False], ids=["replica away", "replica at work"])
def test_a_topic_made_anew_with_its_events(side: MailSide, is_away: bool) -> None:  # noqa: FBT001
    """Nothing is sent twice; what was never read of the old one is a gap, listed and accepted."""
    records, more = orders(30), named("more", 6)
    with side.running() as replica:
        side.send(records)
        side.wait_until_sent(len(records))
        before = side.sql("SELECT topic_id, partition, next_offset FROM positions")
        if not is_away:
            make_anew(side, [*records, *more])
            side.wait_until_sent(len(records) + len(more), seconds=60)
            side.wait_for(replica.is_ready)
    if is_away:
        make_anew(side, [*records, *more])
    with side.running():
        side.wait_until_sent(len(records) + len(more))
        gaps = answer(side, "positions", "list", expected=1)["gaps"]
        found = {(gap["topic_id"], gap["partition"]): gap["first_offset"] for gap in gaps}
        for row in before:
            # A replica at work may take what comes first for the old topic's.
            beyond = found.pop((row["topic_id"], row["partition"])) - row["next_offset"]
            assert beyond == 0 if is_away else beyond >= 0
        assert found == {}
        assert {gap["reason"] for gap in gaps} == {"topic recreated"}
        side.command("positions", "accept-gap", *(str(gap["id"]) for gap in gaps), "--yes")
        assert answer(side, "positions", "list")["gaps"] == []
    assert side.states() == {"SENT": len(records) + len(more)}
    assert side.copies() == once([*records, *more])


@pytest.mark.fault("F-Q3", "F-Q4", "F-Q5")
def test_dead_letters_retried_and_killed_half_way(side: MailSide) -> None:
    """Run again it does the rest: each once, duplicates not at all, and what cannot be stays."""
    readable = [newer(order(number)) for number in range(LETTERS)]
    known = [newer(order("known")), order("known")]
    unreadable = [poison("one"), poison("two")]
    retry = ("dead-letters", "retry", "--all", "--yes")
    with side.running():
        side.send([*readable, *known, *unreadable])
        side.wait_for(lambda: len(side.dead_letters()) == LETTERS + 1 + len(unreadable))
        side.wait_until_sent(1)
        # As if a release had learnt to read them.
        side.sql("""UPDATE dead_letters SET headers = '[]' WHERE headers::text LIKE '%%v2%%'""")
        with side.begun(*retry) as process:
            side.wait_for(lambda: len(side.mails()) > LETTERS // 10)
            process.kill()
            process.wait()
        wait_until_committed(side)
        done = len(side.mails()) - 1
        assert 0 < done < LETTERS
        outcomes = Counter(each["outcome"] for each in answer(side, *retry, expected=1))
        # The duplicate may have been among those that were done.
        assert outcomes["RETRY"] == LETTERS - done
        assert outcomes["duplicate"] <= 1
        assert len(side.dead_letters()) == len(unreadable)
        side.wait_until_sent(LETTERS + 1)
        assert {each["outcome"] for each in answer(side, *retry, expected=1)} == {
            "not JSON: JSONDecodeError"
        }
    assert side.copies() == once([*readable, order("known")])


# Records


def last_month() -> tuple[datetime, datetime]:
    """Return the last month of which every order is too old to be mailed by itself."""
    young = timedelta(hours=24, minutes=10)
    day = (datetime.now(UTC) - young).replace(day=1)
    until = day.replace(hour=0, minute=0, second=0, microsecond=0)
    return (until - timedelta(days=1)).replace(day=1), until


def recent(count: int) -> list[Row]:
    """Return records of so many orders of the last hour, in their order."""
    since = datetime.now(UTC) - timedelta(hours=1)
    return [dated(record, since + timedelta(seconds=n)) for n, record in enumerate(orders(count))]


def range_of(records: Sequence[Row]) -> tuple[str, ...]:
    """Return the options for the range of time that dated records lie in."""
    first, last = (
        datetime.fromtimestamp(int(records[n]["timestamp"]) / 1000, UTC) for n in (0, -1)
    )
    second = timedelta(seconds=1)
    return "--from", (first - second).isoformat(), "--to", (last + second).isoformat()


def named(name: str, count: int) -> list[Row]:
    return [order(f"{name}-{number}") for number in range(count)]


def poison(name: str) -> Row:
    return {"key": f"poison-{name}", "value": "{", "partition": 0}


def newer(record: Row) -> Row:
    """Return a record of a major version that nobody can read yet."""
    return {**record, "headers": {"ce_type": "order.created.v2"}}


def bare(order_ids: set[str]) -> list[str]:
    return [order_id.removeprefix("order-") for order_id in order_ids]


def make_anew(side: MailSide, records: Sequence[Row]) -> None:
    side.recreate_topic()
    side.send(records)


# Commands


def campaign(*options: str) -> tuple[str, ...]:
    return "--campaign", CAMPAIGN, "--reason", "the price was missing", *options


def answer(side: MailSide, *arguments: str, expected: int | None = 0) -> Any:
    """Return what a command tells in JSON, which must end with this code if one is said."""
    done = side.command(*arguments, "--json", check=False)
    assert expected in (None, done.returncode), done.stderr
    assert done.stdout, done.stderr
    return json.loads(done.stdout)


def made_by_two_at_once(side: MailSide, *arguments: str) -> list[str]:
    """Run a command twice at once; return the orders that either made due."""
    made: list[str] = []
    with side.begun(*arguments, "--json") as one, side.begun(*arguments, "--json") as other:
        for process in (one, other):
            output, errors = process.communicate(timeout=60)
            assert output, errors
            made += json.loads(output)["made_due"]
    return made


def killed_after(side: MailSide, seconds: float, *arguments: str) -> bool:
    """Kill a command after so long; say whether it was still at work."""
    with side.begun(*arguments) as process:
        try:
            assert process.wait(seconds) == 0
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            wait_until_committed(side)
            return True
    return False


def killed_as_soon_as_one_batch_is_written(
    side: MailSide, count: Callable[[], int], arguments: Sequence[str]
) -> int:
    """Kill a command between two of its transactions; return how much it did."""
    before = count()
    with side.begun(*arguments) as process:
        side.wait_for(lambda: count() > before)
        process.kill()
        process.wait()
    wait_until_committed(side)
    return count()


def wait_until_committed(side: MailSide) -> None:
    """Wait until what a killed command had begun to commit is committed, or undone."""
    side.wait_for(lambda: not side.sql("SELECT 1 FROM pg_locks WHERE locktype = 'advisory'"))


@contextmanager
def slowed(side: MailSide) -> Iterator[None]:
    """Make each statement that adds mails last a while: that is when a kill comes."""
    side.sql(
        "CREATE FUNCTION slow() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN"
        f" PERFORM pg_sleep({BATCH_SECONDS}); RETURN NULL; END $$;"
        " CREATE TRIGGER slow AFTER INSERT ON deliveries"
        " FOR EACH STATEMENT EXECUTE FUNCTION slow()"
    )
    try:
        yield
    finally:
        side.sql("DROP FUNCTION slow CASCADE")


# The ledger


def is_adding(side: MailSide) -> bool:
    """Say whether somebody is where `slowed` holds them up."""
    return bool(side.sql("SELECT 1 FROM pg_stat_activity WHERE wait_event = 'PgSleep'"))


def in_campaign(side: MailSide) -> int:
    (row,) = side.sql("SELECT count(*) AS count FROM deliveries WHERE campaign = %s", CAMPAIGN)
    return int(row["count"])


def closed(side: MailSide) -> set[str]:
    return {order_id for order_id, row in side.mails().items() if row["state"] == "SENT"}


def lose(side: MailSide, count: int) -> set[str]:
    """Take mails out of the ledger, anywhere; return their orders."""
    lost = set(random.Random(SEED).sample(sorted(side.mails()), count))
    side.sql("DELETE FROM deliveries WHERE order_id = ANY(%s)", list(lost))
    return lost


def where_it_is(side: MailSide) -> tuple[object, ...]:
    """Return all that says how far the group is: its commits, the positions, its members."""
    rows = side.sql("SELECT * FROM positions ORDER BY partition")
    return side.commits(), rows, side.members()


def settle_commits(side: MailSide) -> None:
    side.wait_for(lambda: side.commits() == side.positions() == side.ends())


def settle_as_sent(side: MailSide) -> None:
    """Say of all that a rewind held that it had arrived."""
    which = ("--all", "--state", "HELD", "--reason", "a rewind")
    side.command("mails", "settle", *which, "--sent", "--why", "the relay's log", "--yes")


def assert_refused(side: MailSide) -> None:
    """See a replica refuse a ledger that is behind the group, and that it sent nothing."""
    accepted, connections = side.sink.accepted(), side.smtp.accepted
    rows = answer(side, "positions", "list", expected=None)["positions"]
    assert any(row["committed"] > (row["next_offset"] or 0) for row in rows)
    with side.running(is_waited_for=False) as replica:
        assert replica.wait_for_end(seconds=REFUSED_SECONDS) == EXIT_REFUSED
        assert "positions rewind" in replica.part.command.log_path.read_text()
    assert side.sink.accepted() == accepted
    assert side.smtp.accepted == connections


# The relay


def message_ids(side: MailSide) -> Counter[str | None]:
    return Counter(mail.message_id for mail in side.sink.accepted())


def expected_ids(records: Sequence[Row], *, resent: Sequence[Row]) -> Counter[str]:
    """Return one Message-ID for each mail and one for each of the campaign."""
    ids = [str(record["key"]) for record in records]
    ids += [f"{record['key']}+{CAMPAIGN}" for record in resent]
    return Counter(f"<order-confirmation.{each}@teahouse.example>" for each in ids)


# What goes on meanwhile


@contextmanager
def live_orders(side: MailSide) -> Iterator[list[Row]]:
    """Place orders while the block runs; give those that were."""
    placed: list[Row] = []

    def place() -> None:
        new = [dated(order(f"live-{len(placed) + n}"), datetime.now(UTC)) for n in range(5)]
        side.send(new)
        placed.extend(new)

    with repeated(place, seconds=0.1):
        yield placed


@dataclass
class Seen:
    """Each partition's position and commit as they were seen, and the group's members."""

    places: dict[tuple[str, int], list[int]] = field(default_factory=dict)
    members: set[frozenset[str]] = field(default_factory=set)


@contextmanager
def watched(side: MailSide) -> Iterator[Seen]:
    """Look again and again where the group is while the block runs."""
    seen = Seen()

    def look() -> None:
        for name, found in (("position", side.positions()), ("commit", side.commits())):
            for partition, offset in found.items():
                seen.places.setdefault((name, partition), []).append(offset)
        seen.members.add(frozenset(side.members()))

    with repeated(look, seconds=0.1):
        yield seen


@contextmanager
def repeated(do: Callable[[], None], *, seconds: float) -> Iterator[None]:
    """Do something again and again in a thread while the block runs."""
    stop = threading.Event()
    failures: list[BaseException] = []

    def run() -> None:
        try:
            while not stop.is_set():
                do()
                stop.wait(seconds)
        except BaseException as error:  # noqa: BLE001 - told where it is seen
            failures.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
    assert failures == []


def is_forward(offsets: Sequence[int]) -> bool:
    return list(offsets) == sorted(offsets)
