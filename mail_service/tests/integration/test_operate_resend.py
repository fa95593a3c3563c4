"""`mails resend`: mails that were sent, once more, on purpose."""

import json
import threading
from collections import Counter
from datetime import UTC, datetime, timedelta

import pytest
from harness import Ledger, Operator, Replicas, Topic, mailed, wait_for
from records import Row, dated, order, orders
from sink import Sink
from sqlalchemy import Connection, Engine

from mail_service import decisions
from mail_service.decisions import Campaign
from mail_service.ledger import NewMail

CAMPAIGN = ("--campaign", "2026-10-again", "--reason", "the price was missing")
RANGE = ("--from", "2026-10-01T00:00Z", "--to", "2999-12-31T00:00Z")
DAY = timedelta(days=1)


def resent(ledger: Ledger, campaign: str = "2026-10-again") -> dict[str, Row]:
    """Return a campaign's mails by order."""
    found = ledger.rows("SELECT * FROM deliveries WHERE campaign = :campaign", campaign=campaign)
    return {row["order_id"]: row for row in found}


@pytest.mark.fault("F-R1")
def test_a_mail_is_sent_once_more_under_a_name_of_its_own(
    replicas: Replicas, topic: Topic, sink: Sink, ledger_rows: Ledger, operator: Operator
) -> None:
    """Read back from the topic; the first mail's row stays as it is; a second run sends nothing."""
    records = [dated(each, datetime.now(UTC) - 3 * DAY) for each in orders(4)]
    places = ledger_rows.take_in(topic, records)
    before = ledger_rows.mails()
    replicas.start()

    told = operator.ask("mails", "resend", "order-1", "order-2", *CAMPAIGN, "--yes")

    assert sorted(told["made_due"]) == ["order-1", "order-2"]
    wait_for(lambda: len(sink.accepted()), lambda count: count == 2)
    wait_for(ledger_rows.states, lambda states: states == {"SENT": 6})
    assert {mail.message_id for mail in sink.accepted()} == {
        f"<order-confirmation.order-{number}+2026-10-again@shop.example>" for number in (1, 2)
    }
    assert {mail.recipient for mail in sink.accepted()} == {
        "customer-1@example.com",
        "customer-2@example.com",
    }
    row = resent(ledger_rows)["order-1"]
    assert (row["partition"], row["offset"]) == places["order-1"]
    assert timedelta(hours=23) < row["give_up_at"] - datetime.now(UTC) <= DAY
    assert row["event"] is None
    first = ledger_rows.rows("SELECT * FROM deliveries WHERE campaign = ''")
    assert {each["order_id"]: each for each in first} == before
    (campaign,) = ledger_rows.rows("SELECT name, reason FROM campaigns")
    assert campaign == {"name": "2026-10-again", "reason": "the price was missing"}

    again = operator.ask("mails", "resend", "order-1", "order-2", *CAMPAIGN, "--yes")

    assert again == {"made_due": [], "left_alone": {"in the campaign already": 2}, "refused": {}}
    assert ledger_rows.states() == {"SENT": 6}
    assert mailed(sink) == {"order-1": 1, "order-2": 1}


def test_only_what_was_sent_and_can_be_read_is_sent_once_more(
    topic: Topic, ledger_rows: Ledger, operator: Operator
) -> None:
    """Each other is refused by name, with the reason and exit 1; the good one goes all the same."""
    record = {**order("expired"), "partition": 0}
    ledger_rows.take_in(topic, [record])
    topic.delete_before(0, 1)
    states = ("SENDING", "RETRY", "UNKNOWN", "HELD", "DEAD", "ERASED")
    for state in states:
        ledger_rows.take_in(topic, [order(state)], state=state)
    ledger_rows.take_in(topic, [order(name) for name in ("other", "good", "changed", "gone")])
    ledger_rows.take_in(topic, [order("third")])
    ledger_rows.take_in(topic, [order("old")], topic_id="an earlier topic")
    ((partition, offset),) = topic.send([{"value": b"no event", "partition": 2}])
    ledger_rows.change(
        'UPDATE deliveries SET (partition, "offset") = (SELECT partition, "offset" FROM deliveries'
        " AS third WHERE third.order_id = 'order-third') WHERE order_id = 'order-other'"
    )
    ledger_rows.change(
        'UPDATE deliveries SET partition = :partition, "offset" = :offset'
        " WHERE order_id = 'order-changed'",
        partition=partition,
        offset=offset,
    )
    ledger_rows.change("UPDATE deliveries SET \"offset\" = 999 WHERE order_id = 'order-gone'")
    ledger_rows.put("order-before", "ERASED", topic_id=None, partition=None, offset=None)
    names = ["expired", "other", "good", "changed", "gone", "old", "before", "nobody", *states]
    before = ledger_rows.mails()

    told = operator.ask(
        "mails", "resend", *(f"order-{name}" for name in names), *CAMPAIGN, "--yes", code=1
    )

    assert told["made_due"] == ["order-good"]
    assert told["refused"] == {
        "order-expired": "gone from the topic",
        "order-old": "gone from the topic",
        "order-gone": "gone from the topic",
        "order-other": "another record lies there",
        "order-changed": "another record lies there",
        "order-before": "ERASED",
        "order-nobody": "unknown to the ledger",
        **{f"order-{state}": state for state in states},
    }
    assert sum(told["left_alone"].values()) == len(told["refused"])
    event = json.loads(bytes(resent(ledger_rows)["order-good"]["event"]))
    assert event == json.loads(order("good")["value"])
    ledger_rows.change("DELETE FROM deliveries WHERE campaign <> ''")
    assert ledger_rows.mails() == before
    people = operator.run("mails", "resend", "order-expired", *CAMPAIGN, "--yes")
    assert "order-expired  gone from the topic" in people.stdout


@pytest.mark.parametrize(
    "arguments",
    [
        ["order-1", "--campaign", "a b", "--reason", "r"],
        ["order-1", "--campaign", "a+b", "--reason", "r"],
        ["order-1", "--campaign", "a\n", "--reason", "r"],
        ["order-1", "--campaign", "", "--reason", "r"],
        ["order-1", "--campaign", "a" * 65, "--reason", "r"],
        ["order-1", "--campaign", "가", "--reason", "r"],
        ["order-1", "--campaign", "a"],
        ["order-1", "--campaign", "a", "--reason", " "],
        ["order-1", "--reason", "r"],
        ["--campaign", "a", "--reason", "r"],
        ["order-1", *RANGE, *CAMPAIGN],
        ["order-1", *RANGE[:2], *CAMPAIGN],
        [*RANGE[:2], *CAMPAIGN],
        ["--from", RANGE[3], "--to", RANGE[1], *CAMPAIGN],
        ["--from", "2026-10-01T00:00", "--to", RANGE[3], *CAMPAIGN],
        ["order-1", *CAMPAIGN, "--limit", "0"],
    ],
)
def test_what_is_not_said_wholly_sends_nothing(
    ledger_rows: Ledger, operator: Operator, arguments: list[str]
) -> None:
    """Exit 2 with a message, before anything is looked at."""
    ended = operator.run("mails", "resend", *arguments, "--yes")
    assert (ended.returncode, "Error: " in ended.stderr) == (2, True)
    assert ledger_rows.rows("SELECT * FROM campaigns") == []


def test_nothing_is_sent_without_consent(
    topic: Topic, ledger_rows: Ledger, operator: Operator
) -> None:
    """What would happen is told; the ledger, campaigns too, is as before."""
    ledger_rows.take_in(topic, orders(3))
    before = ledger_rows.everything()
    dry = operator.run("mails", "resend", "order-1", "order-2", *CAMPAIGN, "--dry-run")
    assert dry.returncode == 0
    assert "campaign 2026-10-again: 2 mails would be sent once more" in dry.stderr
    assert operator.run("mails", "resend", "order-1", *CAMPAIGN).returncode == 2
    assert ledger_rows.everything() == before


def test_a_campaign_run_twice_at_once_has_each_order_once(
    topic: Topic, ledger_rows: Ledger, operator: Operator
) -> None:
    """Two operators, the same range, at the same moment."""
    ledger_rows.take_in(topic, orders(60))
    command = ("mails", "resend", *RANGE, *CAMPAIGN, "--yes", "--json")

    told = [json.loads(each.stdout) for each in operator.at_once(command, command)]

    made = Counter(order_id for each in told for order_id in each["made_due"])
    assert made == Counter(f"order-{number}" for number in range(60))
    assert set(resent(ledger_rows)) == set(made)


def test_a_campaigns_limit_holds_over_all_its_runs(
    topic: Topic, ledger_rows: Ledger, operator: Operator
) -> None:
    """Exactly so many, the oldest first, however often and however many at once."""
    at = datetime(2026, 11, 10, tzinfo=UTC)
    for number in range(10):
        moment = at + number * timedelta(hours=1)
        ledger_rows.take_in(topic, [dated(order(number), moment)], event_at=moment)
    command = ("mails", "resend", *RANGE, *CAMPAIGN, "--yes")

    told = operator.ask(*command, "--limit", "3")
    assert sorted(told["made_due"]) == ["order-0", "order-1", "order-2"]
    assert told["left_alone"] == {"beyond the limit": 7}
    assert operator.ask(*command, "--limit", "3")["made_due"] == []
    assert operator.ask(*command, "--limit", "2")["made_due"] == []
    both = operator.at_once((*command, "--limit", "6"), (*command, "--limit", "6"))
    assert all(each.returncode in (0, 1) for each in both)
    assert set(resent(ledger_rows)) == {f"order-{number}" for number in range(6)}
    assert len(operator.ask(*command)["made_due"]) == 4


def test_a_range_is_of_the_orders_time(
    topic: Topic, ledger_rows: Ledger, operator: Operator
) -> None:
    """From its beginning, up to and not including its end, whatever offset they are named in."""
    at = datetime(2026, 10, 31, 15, tzinfo=UTC)
    for name, moment in {
        "before": at - timedelta(milliseconds=1),
        "first": at,
        "last": at + DAY - timedelta(milliseconds=1),
        "end": at + DAY,
    }.items():
        ledger_rows.take_in(topic, [order(name)], event_at=moment)
    day = ("--from", "2026-11-01T00:00+09:00", "--to", "2026-11-02T00:00+09:00")

    told = operator.ask("mails", "resend", *day, *CAMPAIGN, "--yes")

    assert sorted(told["made_due"]) == ["order-first", "order-last"]


def test_an_order_erased_in_between_is_not_sent_once_more(
    topic: Topic, ledger_rows: Ledger, operator: Operator
) -> None:
    """Nor is its mail of the campaign that had been made due."""
    ledger_rows.take_in(topic, orders(2))
    operator.ask("mails", "resend", "order-0", *CAMPAIGN, "--yes")
    operator.ask("erase", "order-0", "--yes")
    told = operator.ask(
        "mails", "resend", "order-0", "--campaign", "b", "--reason", "r", "--yes", code=1
    )
    assert told["refused"] == {"order-0": "ERASED"}
    assert resent(ledger_rows)["order-0"]["state"] == "ERASED"
    assert resent(ledger_rows, "b") == {}


def test_records_far_apart_are_read_back(
    topic: Topic, ledger_rows: Ledger, operator: Operator
) -> None:
    """The reader goes on elsewhere, in each partition, instead of reading all that lies between."""
    first, last = ({**order(name), "partition": 0} for name in ("first", "last"))
    between = [{"value": b"x", "partition": 0}] * 5_100
    ledger_rows.take_in(topic, [first])
    topic.send(between)
    ledger_rows.take_in(topic, [last, {**order("other"), "partition": 2}])
    told = operator.ask("mails", "resend", *RANGE, *CAMPAIGN, "--yes")
    assert sorted(told["made_due"]) == ["order-first", "order-last", "order-other"]


# What is decided in one transaction, however late the choice was made


def new_mail(name: str) -> NewMail:
    """Return a mail as it is read back."""
    now = datetime.now(UTC)
    return NewMail(
        order_id=f"order-{name}",
        message_id=f"<{name}@shop.example>",
        event=b"{}",
        event_at=now,
        give_up_at=now,
        topic_id="t",
        partition=0,
        offset=0,
    )


def make_due(connection: Connection, *names: object, limit: int | None = None) -> list[str]:
    """Make mails of a campaign due; return those that are new."""
    made = decisions.make_due(
        connection,
        [new_mail(str(name)) for name in names],
        patience=DAY,
        reason="r",
        campaign=Campaign("c", "r", limit),
    )
    return [order_id.removeprefix("order-") for order_id in made]


def test_a_limit_counts_what_is_there_already(engine: Engine, ledger_rows: Ledger) -> None:
    """Whoever wrote it since the mails were chosen."""
    with decisions.deciding(engine) as connection:
        assert make_due(connection, 1, 2, 3, 4, limit=3) == ["1", "2", "3"]
        assert make_due(connection, 5, 6, limit=3) == []
        assert make_due(connection, 1, 5, 6, limit=4) == ["5"]
    assert len(resent(ledger_rows, "c")) == 4


def test_one_decision_waits_for_another(engine: Engine, ledger_rows: Ledger) -> None:
    """So that two runs of a campaign together keep to its limit."""
    later: list[str] = []

    def decide() -> None:
        with decisions.deciding(engine) as connection:
            later.extend(make_due(connection, 3, 4, limit=3))

    thread = threading.Thread(target=decide)
    with decisions.deciding(engine) as connection:
        make_due(connection, 1, limit=3)
    with decisions.deciding(engine) as connection:
        make_due(connection, 2, limit=3)
        thread.start()
        thread.join(0.3)
        assert thread.is_alive()
    thread.join()
    assert later == ["3"]


def test_what_was_erased_since_it_was_chosen_is_not_made_due(
    engine: Engine, ledger_rows: Ledger
) -> None:
    """In no campaign, and not under the record's own name either."""
    ledger_rows.put("order-1", "ERASED")
    with decisions.deciding(engine) as connection:
        assert make_due(connection, 1, 2) == ["2"]
        made = decisions.make_due(connection, [new_mail("1")], patience=DAY, reason="replayed")
    assert made == []
