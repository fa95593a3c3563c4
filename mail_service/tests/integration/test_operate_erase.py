"""`erase`: forget a customer's address, for good."""

import json
from datetime import UTC, datetime

import pytest
from harness import TABLES, Ledger, Operator, Replicas, Topic, event_of, mailed, wait_for
from records import dated, order
from sink import Rule, Sink

STATES = ("SENDING", "RETRY", "UNKNOWN", "HELD", "DEAD", "SENT", "ERASED")
CANARY = "canary-7f3a@example.com"


def tables_that_hold(ledger: Ledger, words: str) -> list[str]:
    """Return the tables in which these bytes stand anywhere, in text or in bytes."""
    return [
        name
        for name in (*TABLES, "control")
        if ledger.rows(
            f"SELECT 1 FROM {name} AS t WHERE strpos(t::text, :words) > 0"
            " OR strpos(t::text, encode(convert_to(:words, 'UTF8'), 'hex')) > 0"
            " OR strpos(t::text, encode(convert_to(:words, 'UTF8'), 'base64')) > 0",
            words=words,
        )
    ]


def test_a_mail_is_erased_in_every_state(ledger_rows: Ledger, operator: Operator) -> None:
    """With those of its campaigns; orders that were not named stay; a second time is harmless."""
    for state in STATES[:-1]:
        ledger_rows.put(f"order-{state}", state, reason="r", due_at=datetime.now(UTC))
    ledger_rows.put("order-ERASED", "ERASED")
    ledger_rows.put("order-SENT", "HELD", campaign="again")
    ledger_rows.put("order-other", "HELD")
    other = ledger_rows.mail("order-other")
    assert tables_that_hold(ledger_rows, "order-HELD@example.com") == ["deliveries"]
    named = [f"order-{state}" for state in STATES] + ["order-nobody-knows"]

    told = operator.ask("erase", *named, "--yes")

    assert told == {"order_ids": named, "erased": 7, "unknown_before": 1, "dead_letters": 0}
    assert ledger_rows.states() == {"ERASED": 9, "HELD": 1}
    assert ledger_rows.mail("order-other") == other
    erased = ledger_rows.rows("SELECT * FROM deliveries WHERE state = 'ERASED'")
    for row in erased:
        left = (row["event"], row["due_at"], row["owner"], row["reason"], row["reply"])
        assert left == (None,) * 5
    assert tables_that_hold(ledger_rows, "order-HELD@example.com") == []
    again = operator.ask("erase", *named, "--yes")
    assert (again["erased"], again["unknown_before"]) == (0, 0)
    assert ledger_rows.rows("SELECT * FROM deliveries WHERE state = 'ERASED'") == erased


def test_orders_come_from_standard_input(ledger_rows: Ledger, operator: Operator) -> None:
    """One a line, whatever is around it, as the order service prints them; more than a batch."""
    names = [f"order-{number}" for number in range(1200)]
    ended = operator.run("erase", "--yes", "--json", "-", told="\n".join([*names, "", " last \r"]))
    assert ended.returncode == 0, ended.stderr
    assert json.loads(ended.stdout)["unknown_before"] == 1201
    assert set(ledger_rows.mails()) == {*names, "last"}
    assert operator.run("erase", "-", told="order-x").returncode == 2
    assert operator.run("erase", "--yes", "-", told="\n").returncode == 2
    assert ledger_rows.mail("order-x") == {}


@pytest.mark.parametrize(
    "arguments",
    [[], ["a b"], ["."], ["a" * 65], ["order-1", "가"], ["a\n"], ["customer@example.com"]],
)
def test_what_is_no_order_id_erases_nothing(
    ledger_rows: Ledger, operator: Operator, arguments: list[str]
) -> None:
    """Exit 2, nor is any of the others erased."""
    ended = operator.run("erase", *arguments, "--yes")
    if arguments == ["a\n"]:
        # A line end belongs to the line.
        assert ended.returncode == 0
        return
    assert ended.returncode == 2
    assert ledger_rows.states() == {}


def test_nothing_is_erased_without_consent(ledger_rows: Ledger, operator: Operator) -> None:
    """What would be is told, and no address with it."""
    ledger_rows.put("order-1", "HELD")
    ledger_rows.put_letter(event_of("order-1"))
    before = ledger_rows.everything()
    dry = operator.run("erase", "order-2", "--email", "ORDER-1@example.com", "--dry-run")
    assert (dry.returncode, dry.stdout) == (
        0,
        "0 mails erased, 0 orders were not known, 0 dead letters emptied\n",
    )
    assert dry.stderr == "the mails of 2 orders, and dead letters with O***@e*** would be erased\n"
    assert operator.run("erase", "order-1").returncode == 2
    assert ledger_rows.everything() == before


LETTERS = {
    "its JSON": (event_of("order-1"), True),
    "another's JSON": (event_of("order-10"), False),
    "an integer's JSON": (b'{"orderId": 1, "note": "order-10"}', False),
    "another's that names it": (event_of("order-10", note="after order-1"), False),
    "its UTF-16": (event_of("order-1").decode().encode("utf-16"), True),
    "its escaped JSON": (b'{"orderId": "order\\u002d1"', True),
    "its beginning": (event_of("order-1")[:40], True),
    "another's beginning": (event_of("order-10")[:40], False),
    "a text that names it": (b"order-1; x", True),
    "a text that names another": (b"order-10, order-1.5, xorder-1", False),
    "another name for the field": (b'{"order_id": "order-1"}', True),
}


@pytest.mark.parametrize(("value", "is_its"), LETTERS.values(), ids=LETTERS.keys())
def test_dead_letters_of_an_order_are_emptied(
    ledger_rows: Ledger, operator: Operator, value: bytes, *, is_its: bool
) -> None:
    """Whatever could not be read of them; those of order-10 are not those of order-1."""
    ledger_rows.put_letter(value)
    (before,) = ledger_rows.dead_letters()

    told = operator.ask("erase", "order-1", "--yes")

    (letter,) = ledger_rows.dead_letters()
    assert told["dead_letters"] == int(is_its)
    if is_its:
        assert (letter["value"], letter["key"], letter["headers"]) == (None, None, [])
        assert (letter["reason"], letter["value_sha256"]) == ("erased", "")
        assert letter["offset"] == before["offset"]
        assert operator.ask("dead-letters", "retry", "--all", "--yes", code=1)
        assert operator.ask("dead-letters", "list")[0]["value"] is None
        assert operator.ask("erase", "order-1", "--yes")["dead_letters"] == 0
    else:
        assert letter == before


def test_an_address_is_erased_wherever_it_stands(ledger_rows: Ledger, operator: Operator) -> None:
    """In open mails, however written; in dead letters by value, key, header and other codes."""
    korean = "민지@example.com"
    for number, address in enumerate((CANARY, CANARY.upper(), korean, "other@example.com")):
        event = event_of(f"order-{number}", email=address)
        ledger_rows.put(f"order-{number}", "HELD", event=event)
    headers = json.dumps([["to", CANARY]])
    ledger_rows.put_letter(event_of("order-5", email=CANARY, amount=None))
    ledger_rows.put_letter(b"x", key=CANARY.encode())
    ledger_rows.put_letter(b"y", headers=headers)
    ledger_rows.put_letter(f"to {CANARY.upper()}".encode("utf-16-be"))
    ledger_rows.put_letter(b"other@example.com")
    ledger_rows.put_letter(event_of("order-6", email=korean, amount=None))
    ledger_rows.put_letter(event_of("order-7", email="other@example.com", amount=None))

    told = operator.ask("erase", "--email", CANARY, "--yes")

    assert told["order_ids"] == ["order-0", "order-1"]
    assert (told["erased"], told["dead_letters"]) == (2, 4)
    assert operator.ask("erase", "--email", korean, "--yes")["dead_letters"] == 1
    assert ledger_rows.states() == {"ERASED": 3, "HELD": 1}
    assert [letter["value"] is None for letter in ledger_rows.dead_letters()] == [
        *(True,) * 4,
        False,
        True,
        False,
    ]
    for words in (CANARY, CANARY.upper(), korean):
        assert tables_that_hold(ledger_rows, words) == []


def test_what_was_erased_stays_so(
    replicas: Replicas, topic: Topic, sink: Sink, ledger_rows: Ledger, operator: Operator
) -> None:
    """Its record that comes later, a 250 that comes later, a replay, a campaign, a dead letter."""
    at = datetime.now(UTC)
    sink.script(Rule("dot", "delay:5", to=CANARY))
    records = [dated(order(number, email=CANARY), at) for number in range(2)]
    operator.ask("erase", "order-1", "--yes")
    replica = replicas.start()
    topic.send([*records, order("other")])
    wait_for(lambda: ledger_rows.mail("order-0").get("state"), lambda state: state == "SENDING")
    wait_for(lambda: ledger_rows.mail("order-other").get("state"), lambda state: state == "SENT")
    operator.ask("erase", "order-0", "--yes")
    assert ledger_rows.mail("order-0")["state"] == "ERASED"

    row = wait_for(lambda: ledger_rows.mail("order-0"), lambda row: row["sent_at"])

    assert (row["state"], row["event"], row["reply"][:3]) == ("ERASED", None, "250")
    topic.send(records)
    wait_for(ledger_rows.positions, lambda positions: positions == topic.ends())
    letter_id = ledger_rows.put_letter(event_of("order-1", email=CANARY))
    since = at.replace(microsecond=0).isoformat()
    assert operator.ask("replay", "--from", since, "--yes")["made_due"] == []
    campaign = ("--campaign", "c", "--reason", "r", "--yes")
    resent = operator.ask("mails", "resend", "order-0", "order-1", *campaign, code=1)
    assert resent["refused"] == {"order-0": "ERASED", "order-1": "ERASED"}
    retried = operator.ask("dead-letters", "retry", letter_id, "--yes")
    assert retried == [{"id": letter_id, "outcome": "duplicate"}]
    for command in ("retry", "settle"):
        options = ["--send", "--why", "w"] if command == "settle" else []
        told = operator.ask("mails", command, "order-0", *options, "--yes", code=1)
        assert told[0]["outcome"] == "none in these states"
    assert ledger_rows.states() == {"ERASED": 2, "SENT": 1}
    assert mailed(sink) == {"order-0": 1, "order-other": 1}
    assert tables_that_hold(ledger_rows, CANARY) == []
    assert CANARY not in json.dumps(replica.logged())


def test_no_table_holds_an_address_of_what_is_closed(
    replicas: Replicas, topic: Topic, sink: Sink, ledger_rows: Ledger, operator: Operator
) -> None:
    """Sent, refused by a relay that repeats it, unreadable: after the erasure none is left."""
    echo = f"<{CANARY}>: Recipient address rejected"
    sink.script(
        Rule("rcpt", f"550 5.1.1 {echo}", times=1),
        Rule("rcpt", f"450 4.2.1 {echo}", times=1),
        Rule("dot", f"250 2.1.5 {CANARY} queued"),
    )
    records = [order(number, email=CANARY) for number in range(6)]
    topic.send([*records, {"value": json.dumps({"orderId": "order-9", "email": CANARY})}])
    replica = replicas.start()
    wait_for(ledger_rows.states, lambda states: states == {"SENT": 5, "DEAD": 1})
    wait_for(ledger_rows.dead_letters, bool)
    listed = operator.run("mails", "list", "--state", "DEAD", "--state", "SENT").stdout
    shown = operator.run("mails", "show", "order-0", "--json").stdout
    assert CANARY not in listed + shown + json.dumps(replica.logged())

    operator.ask("erase", "--email", CANARY, "--yes")

    assert tables_that_hold(ledger_rows, CANARY) == []
    assert [row["state"] for row in ledger_rows.mails().values()].count("ERASED") == 1
