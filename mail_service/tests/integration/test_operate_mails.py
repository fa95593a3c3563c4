"""`mails list|show|retry|settle`, `pause`, `resume`: what an operator sees and decides."""

import json
import time
from datetime import UTC, datetime, timedelta

import pytest
from harness import Ledger, Operator, Replicas, Topic, event_of, mailed, wait_for
from records import Row, order, orders
from sink import Rule, Sink

from mail_service.settings import TEST_TIMING

STATES = ("SENDING", "RETRY", "UNKNOWN", "HELD", "DEAD", "SENT", "ERASED")
NOON = datetime(2026, 11, 20, 12, tzinfo=UTC)
HOUR = timedelta(hours=1)
DAY = timedelta(days=1)


@pytest.fixture
def each_state(ledger_rows: Ledger) -> Ledger:
    """Return the ledger with a mail in each state, an hour apart, and a held UNKNOWN."""
    later = datetime.now(UTC) + DAY
    for number, state in enumerate(STATES):
        due = {"due_at": later} if state in ("RETRY", "UNKNOWN") else {}
        reason = None if state in ("SENT", "ERASED") else f"reason of {state}"
        at = NOON + number * HOUR
        ledger_rows.put(f"order-{state}", state, event_at=at, reason=reason, **due)
    ledger_rows.put("order-waits", "UNKNOWN", event_at=NOON + 9 * HOUR, unknown_count=2)
    ledger_rows.put("order-SENT", "DEAD", campaign="again", event_at=NOON + 10 * HOUR)
    return ledger_rows


def until(row: Row, name: str) -> timedelta:
    """Return how long it is until a time of a row."""
    moment: datetime = row[name]
    return moment - datetime.now(UTC)


def names(found: list[Row]) -> list[str]:
    """Return the orders of what was listed."""
    return [row["order_id"].removeprefix("order-") for row in found]


# list, show


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ([], ["SENDING", "RETRY", "UNKNOWN", "HELD", "DEAD", "waits", "SENT"]),
        (["--limit", "2"], ["SENDING", "RETRY"]),
        (["--state", "SENT", "--state", "ERASED"], ["SENT", "ERASED"]),
        (["--campaign", "again"], ["SENT"]),
        (["--reason", "of HELD"], ["HELD"]),
        (["--from", "2026-11-20T14:00Z", "--to", "2026-11-20T16:00+01:00"], ["UNKNOWN"]),
    ],
)
def test_mails_are_listed_by_what_is_asked_for(
    each_state: Ledger, operator: Operator, options: list[str], expected: list[str]
) -> None:
    """By the time of their orders; open ones unless others are named; `--to` is not included."""
    assert names(operator.ask("mails", "list", *options)) == expected


def test_an_address_is_shown_only_to_whom_asks(each_state: Ledger, operator: Operator) -> None:
    """Masked in list and show, as a table and as JSON; a closed mail has none."""
    commands = (["list"], ["list", "--json"], ["show", "order-HELD"])
    for command in commands:
        masked = operator.run("mails", *command)
        assert "@e***" in masked.stdout
        assert "@example.com" not in masked.stdout + masked.stderr
    assert "order-HELD@example.com" in operator.run("mails", "list", "--show-addresses").stdout
    (sent,) = operator.ask("mails", "list", "--state", "SENT", "--show-addresses")
    assert sent["recipient"] is None


def test_every_mail_of_an_order_is_shown(each_state: Ledger, operator: Operator) -> None:
    """One for each campaign, the first sending first; nothing found ends with 1."""
    shown = operator.ask("mails", "show", "order-SENT")
    assert [(row["campaign"], row["state"]) for row in shown] == [("", "SENT"), ("again", "DEAD")]
    assert operator.ask("mails", "show", "order-nobody-knows", code=1) == []


def test_an_empty_ledger_is_listed(ledger_rows: Ledger, operator: Operator) -> None:
    """For people a word, for scripts an empty array."""
    assert operator.run("mails", "list").stdout == "none\n"
    assert operator.ask("mails", "list") == []


# retry


def test_dead_and_held_mails_are_released(each_state: Ledger, operator: Operator) -> None:
    """Due now, with full time and all attempts; others are left, and named with exit 1."""
    each_state.change(
        "UPDATE deliveries SET attempts = 9, suspected_at = now(), give_up_at = now()"
    )
    before = {row["id"]: row for row in each_state.rows("SELECT * FROM deliveries")}
    orders_named = [f"order-{state}" for state in STATES]

    told = operator.ask("mails", "retry", *orders_named, "order-nobody-knows", "--yes", code=1)

    outcomes = {(row["order_id"], row["campaign"]): row["outcome"] for row in told}
    released = {key for key, outcome in outcomes.items() if outcome == "RETRY"}
    assert released == {("order-HELD", ""), ("order-DEAD", ""), ("order-SENT", "again")}
    assert outcomes["order-nobody-knows", ""] == "none in these states"
    assert outcomes["order-SENDING", ""] == "none in these states"
    for row in each_state.rows("SELECT * FROM deliveries"):
        if (row["order_id"], row["campaign"]) not in released:
            assert row == before[row["id"]]
            continue
        assert (row["state"], row["attempts"], row["suspected_at"]) == ("RETRY", 0, None)
        assert until(row, "due_at") <= timedelta(0)
        assert DAY - HOUR < until(row, "give_up_at") <= DAY
        assert row["event"] == before[row["id"]]["event"]


@pytest.mark.parametrize(
    ("consent", "code", "said"),
    [
        (["--dry-run"], 0, "2 mails to 2 recipients would be sent"),
        (["--dry-run", "--yes"], 0, "2 mails to 2 recipients would be sent"),
        ([], 2, "nobody to ask: say --yes, or --dry-run"),
    ],
)
def test_nothing_is_released_without_consent(
    each_state: Ledger, operator: Operator, consent: list[str], code: int, said: str
) -> None:
    """What would happen is told first, to how many; without a terminal nobody can be asked."""
    before = each_state.everything()
    ended = operator.run("mails", "retry", "order-HELD", "order-DEAD", *consent)
    assert (ended.returncode, said in ended.stderr) == (code, True)
    assert each_state.everything() == before


def test_all_of_a_reason_are_released(ledger_rows: Ledger, operator: Operator) -> None:
    """More than one transaction holds, and none of another reason or state."""
    ledger_rows.change(
        "INSERT INTO deliveries (kind, order_id, campaign, state, message_id, event, event_at,"
        " give_up_at, reason) SELECT 'order-confirmation', 'order-' || number, '',"
        " CASE WHEN number < 1600 THEN 'DEAD' ELSE 'HELD' END, 'm', :event, now(), now(),"
        " CASE WHEN number < 1500 THEN 'expired' ELSE 'other' END"
        " FROM generate_series(1, 1699) AS number",
        event=event_of("order-1"),
    )
    told = operator.ask("mails", "retry", "--all", "--reason", "expired", "--yes")
    assert len(told) == 1499
    assert ledger_rows.states() == {"RETRY": 1499, "DEAD": 100, "HELD": 100}
    held = operator.run("mails", "retry", "--all", "--state", "HELD", "--yes")
    # Piped, nothing else is said: no progress, no colours.
    assert held.stderr == "100 mails to 1 recipients would be sent: 100 HELD (other)\n"
    assert "\x1b" not in held.stdout
    assert ledger_rows.states() == {"RETRY": 1599, "DEAD": 100}


def test_whoever_is_at_a_terminal_is_asked(each_state: Ledger, operator: Operator) -> None:
    """No is no; yes does it, and shows how far it is."""
    before = each_state.everything()
    code, seen = operator.at_a_terminal("mails", "retry", "order-HELD", told="n\n")
    assert (code, "Go on? [y/N]" in seen, "left alone" in seen) == (0, True, True)
    assert each_state.everything() == before

    code, seen = operator.at_a_terminal("mails", "retry", "order-HELD", told="y\n")

    assert (code, "releasing" in seen) == (0, True)
    assert each_state.mail("order-HELD")["state"] == "RETRY"


def test_a_released_mail_goes_out_once(
    replicas: Replicas, topic: Topic, sink: Sink, ledger_rows: Ledger, operator: Operator
) -> None:
    """Through a replica that runs; whoever releases it again finds it SENT, and nothing more."""
    sink.script(Rule("rcpt", "550 5.1.1 no such user", to="customer-0@"))
    topic.send(orders(2))
    replicas.start()
    wait_for(ledger_rows.states, lambda states: states == {"SENT": 1, "DEAD": 1})
    sink.script()

    operator.ask("mails", "retry", "order-0", "--yes")
    wait_for(ledger_rows.states, lambda states: states == {"SENT": 2})
    told = operator.ask("mails", "retry", "order-0", "--yes", code=1)

    assert told == [{"order_id": "order-0", "campaign": "", "outcome": "none in these states"}]
    assert mailed(sink) == {"order-0": 1, "order-1": 1}
    assert (ledger_rows.mail("order-0")["attempts"], ledger_rows.states()) == (1, {"SENT": 2})


# settle


@pytest.mark.parametrize(
    ("settlement", "state"), [("sent", "SENT"), ("send", "RETRY"), ("dead", "DEAD")]
)
def test_what_waits_for_a_person_is_settled(
    each_state: Ledger, operator: Operator, settlement: str, state: str
) -> None:
    """UNKNOWN that waits and HELD; the reason is kept; one that is due needs nobody."""
    before = each_state.mails()
    why = "in the relay's log"
    chosen = ["order-waits", "order-HELD", "order-UNKNOWN", "order-RETRY"]

    told = operator.ask(
        "mails", "settle", *chosen, f"--{settlement}", "--why", why, "--yes", code=1
    )

    left = {row["order_id"] for row in told if row["outcome"] == "none in these states"}
    assert left == {"order-UNKNOWN", "order-RETRY"}
    assert all(each_state.mail(order_id) == before[order_id] for order_id in left)
    for order_id in ("order-waits", "order-HELD"):
        row = each_state.mail(order_id)
        assert row["state"] == state
        assert (row["reply"] if state == "SENT" else row["reason"]) == f"settled: {why}"
        assert (row["event"] is None) == (state == "SENT")
        assert (row["sent_at"] is None) == (state != "SENT")
        assert row["unknown_count"] == before[order_id]["unknown_count"]
        assert row["attempts"] == before[order_id]["attempts"]
        if state == "RETRY":
            assert until(row, "due_at") <= timedelta(0)
            assert DAY - HOUR < until(row, "give_up_at") <= DAY
    again = operator.run("mails", "settle", "order-waits", "--sent", "--why", "again", "--yes")
    assert again.returncode == 1
    assert each_state.mail("order-waits")["state"] == state


@pytest.mark.parametrize(
    "arguments",
    [
        ["order-waits", "--why", "who knows"],
        ["order-waits", "--sent"],
        ["order-waits", "--sent", "--why", " "],
        ["--sent", "--why", "who knows"],
        ["order-waits", "--all", "--sent", "--why", "who knows"],
        ["order-waits", "--sent", "--why", "who knows"],
    ],
    ids=["as what", "no reason", "an empty reason", "which", "one and all", "nobody to ask"],
)
def test_what_is_not_said_wholly_settles_nothing(
    each_state: Ledger, operator: Operator, arguments: list[str]
) -> None:
    """Exit 2, and the ledger is as before."""
    before = each_state.everything()
    assert operator.run("mails", "settle", *arguments).returncode == 2
    assert each_state.everything() == before


def test_a_settled_mail_whose_answer_is_lost_again_waits_again(
    replicas: Replicas, topic: Topic, sink: Sink, ledger_rows: Ledger, operator: Operator
) -> None:
    """A third copy only by a person, a fourth only by a person; then it is settled as sent."""
    sink.script(Rule("dot", "drop", to="customer-0@"))
    topic.send(orders(1))
    replicas.start()
    for count in (2, 3):
        wait_for(lambda: ledger_rows.mail("order-0"), lambda row, count=count: waits(row, count))
        assert mailed(sink) == {"order-0": count}
        time.sleep(TEST_TIMING.unknown_delay_seconds + 1 if count == 3 else 0)
        assert mailed(sink) == {"order-0": count}
        if count == 2:
            operator.ask("mails", "settle", "order-0", "--send", "--why", "not there", "--yes")

    operator.ask("mails", "settle", "order-0", "--sent", "--why", "there now", "--yes")

    row = ledger_rows.mail("order-0")
    assert (row["state"], row["unknown_count"], row["event"]) == ("SENT", 3, None)
    assert len({mail.message_id for mail in sink.accepted()}) == 1


def waits(row: Row, count: int) -> bool:
    """Say whether a mail waits for a person after so many lost answers."""
    return bool(
        row
        and row["state"] == "UNKNOWN"
        and row["unknown_count"] == count
        and row["due_at"] is None
    )


# pause, resume


def test_a_pause_stops_all_claims_until_it_ends(
    replicas: Replicas, topic: Topic, sink: Sink, ledger_rows: Ledger, operator: Operator
) -> None:
    """Fresh mails and due ones; its reason is told to whoever looks, and to whoever comes later."""
    replica = replicas.start()
    replica.wait_until_placed()
    assert operator.ask("pause", "--reason", "wrong price") == {
        "outcome": "paused",
        "reason": "wrong price",
    }
    ledger_rows.put("order-due", "RETRY", due_at=datetime.now(UTC), event=event_of("order-due"))
    topic.send(orders(20))
    assert operator.ask("pause", "--reason", "another") == {
        "outcome": "paused already",
        "reason": "wrong price",
    }
    assert operator.ask("positions", "list")["paused"] == "wrong price"
    assert "paused: wrong price" in operator.run("positions", "list").stdout
    assert ledger_rows.states() == {"RETRY": 1}
    assert (replica.status("livez"), mailed(sink)) == (200, {})

    ended = operator.ask("resume")

    assert ended == {"outcome": "resumed", "reason": "wrong price"}
    wait_for(ledger_rows.states, lambda states: states == {"SENT": 21})
    assert operator.ask("resume") == {"outcome": "was not paused", "reason": None}
    assert set(mailed(sink).values()) == {1}


def test_a_pause_without_a_reason_is_none(ledger_rows: Ledger, operator: Operator) -> None:
    """Whoever comes next would not know."""
    assert operator.run("pause", "--reason", "").returncode == 2
    assert ledger_rows.rows("SELECT is_paused FROM control") == [{"is_paused": False}]


def test_no_output_holds_control_characters(ledger_rows: Ledger, operator: Operator) -> None:
    """A relay's words and a record's fields cannot write on the terminal."""
    ledger_rows.put("order-1", "DEAD", event=event_of("order-1", email="\x1b[2J@example.com"))
    listed = operator.run("mails", "list", "--show-addresses")
    assert "\x1b" not in listed.stdout
    assert json.loads(order(1)["value"])["orderId"] in listed.stdout
