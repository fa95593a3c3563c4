"""`docs/runbook.md` at its word: each section's situation on a real pair, and its commands run.

A scenario runs the blocks of its section one after the other, as they stand in the file, and does
between them what the prose says.
"""

import functools
import json
import re
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from deploy.embedded.state import fresh_root
from tests.support import runbook
from tests.support.installation import (
    PASSWORD,
    PATIENCE_SECONDS,
    RELAY,
    Done,
    Installation,
    running,
    table,
)
from tests.support.records import dated, order
from tests.support.runbook import Block
from tests.support.service import Service
from tests.support.sink import Delay, Drop, Rule

REPOSITORY = Path(__file__).parents[2]
STATES = REPOSITORY / ".run/runbook"
FOUND = 1
REFUSED = 3
SLOW_SECONDS = 2.0
# What a claim, its way to the relay and a busy machine add to a slow mail.
CLAIM_SECONDS = 4.0
MANY = 480
LIMIT = 10
A_DAY_AND_MORE = timedelta(hours=30)
RETENTION = timedelta(days=63)

Scenario = Callable[["Desk"], None]
SCENARIOS: dict[str, Scenario] = {}


@dataclass
class Desk:
    """An operator with the runbook open at a section: the pair, and the blocks not yet run."""

    pair: Installation
    left: list[Block] = field(default_factory=list)
    done: Block = field(default_factory=list)
    since: datetime = field(default_factory=lambda: datetime.now(UTC) - timedelta(seconds=1))

    def run(self, **variables: str) -> list[Done]:
        """Run the section's next block, line by line."""
        self.done = self.left.pop(0)
        return self.again(**variables)

    def again(self, **variables: str) -> list[Done]:
        """Run the last block once more."""
        return [self.pair.sh(line, **variables) for line in self.done]

    @property
    def span(self) -> dict[str, str]:
        """From when the scenario began until now, as $FROM and $TO."""
        return {"FROM": self.since.isoformat(), "TO": datetime.now(UTC).isoformat()}


def scenario(heading: str) -> Callable[[Scenario], Scenario]:
    """Make a test of what is to be run of a section: all of its blocks."""

    def decorate(act: Scenario) -> Scenario:
        @functools.wraps(act)
        def run(desk: Desk) -> None:
            desk.left = runbook.blocks()[heading]
            act(desk)
            assert desk.left == [], "blocks that were not run"

        assert heading not in SCENARIOS
        SCENARIOS[heading] = run
        return run

    return decorate


@pytest.fixture(scope="module")
def installation() -> Iterator[Installation]:
    with fresh_root(STATES) as root, running(root) as pair:
        yield pair


@pytest.fixture
def desk(installation: Installation) -> Desk:
    installation.reset()
    return Desk(installation)


@scenario("Stop sending now")
def test_stop_sending_now(desk: Desk) -> None:
    """No mail is claimed any more, orders are taken as before, and then each is mailed once."""
    pair = desk.pair
    pair.relay()
    replicas = [pair.replica(), pair.replica()]
    pair.sink.script(Rule("dot", Delay(SLOW_SECONDS)))
    order_ids = pair.add_orders(MANY)
    pair.wait_until_completed(order_ids)
    pair.wait_for(pair.sink.accepted)
    paused, listed = desk.run()
    paused_at = datetime.now(UTC).timestamp()
    assert codes(paused, listed) == [0, 0]
    assert "paused: wrong price in the template" in listed.out
    assert sum(int(row["lag"]) for row in table(listed.out)) > 0
    pair.wait_for(lambda: not pair.states()["SENDING"])
    accepted = pair.sink.accepted()
    assert max(mail.at for mail in accepted) < paused_at + SLOW_SECONDS + CLAIM_SECONDS
    assert len(accepted) < MANY
    order_ids += pair.place()
    pair.wait_until_completed(order_ids)
    assert pair.sink.accepted() == accepted
    # What was claimed and had not begun was given back.
    states = pair.states()
    assert (states["SENT"], set(states) <= {"SENT", "RETRY"}) == (len(accepted), True)
    assert all(replica.is_ready() for replica in replicas)

    pair.sink.script()
    (resumed,) = desk.run()
    assert resumed.code == 0
    pair.wait_until_sent(order_ids)
    assert pair.copies() == Counter(order_ids)


@scenario("What happened to this order?")
def test_what_happened_to_this_order(desk: Desk) -> None:
    """Both sides show it, and a customer who asks gets the mail once more, under another name."""
    pair = desk.pair
    pair.relay()
    pair.replica()
    (order_id,) = pair.place()
    pair.wait_until_completed([order_id])
    pair.wait_until_sent([order_id])
    (mail,) = pair.mails([order_id])
    event, shown = desk.run(ORDER=order_id)
    assert codes(event, shown) == [0, 0]
    assert "COMPLETED" in event.out
    for told in ("SENT", "250 ", str(mail.message_id)):
        assert told in shown.out
    (resent,) = desk.run(ORDER=order_id)
    (repeated,) = desk.again(ORDER=order_id)
    assert codes(resent, repeated) == [0, 0]
    assert "in the campaign already" in repeated.out
    pair.wait_for(lambda: pair.states() == {"SENT": 2})
    named = str(mail.message_id).replace("@", "+asked-for-it@")
    assert [mail.message_id for mail in pair.mails([order_id])] == [mail.message_id, named]


@scenario("Was everything mailed?")
def test_was_everything_mailed(desk: Desk) -> None:
    """What the ledger does not know is named and sent; a campaign sends ten of the rest again."""
    pair = desk.pair
    pair.relay()
    replica = pair.replica()
    mailed = pair.place(LIMIT + 2)
    pair.wait_until_sent(mailed)
    pair.wait_until_read()
    replica.part.stop()
    (passed_over,) = pair.place()
    pair.wait_until_completed([passed_over])
    row = pair.outbox(passed_over)
    # As somebody who moves positions by hand.
    pair.change_ledger(
        "UPDATE positions SET next_offset = %s WHERE partition = %s",
        row["offset"] + 1,
        row["partition"],
    )
    pair.replica()
    span = desk.span
    events, mails = desk.run(**span)
    assert codes(events, mails) == [0, FOUND]
    assert missing(mails.out) == [passed_over]
    dry, replayed = desk.run(**span)
    assert codes(dry, replayed) == [0, 0]
    assert "1 mails to 1 recipients would be sent" in dry.err
    assert "0 made due" in dry.out
    pair.wait_until_sent([*mailed, passed_over])
    assert pair.copies() == Counter([*mailed, passed_over])

    (resent,) = desk.run(**span)
    assert resent.code == 0
    pair.wait_for(lambda: pair.states() == {"SENT": len(mailed) + 1 + LIMIT})
    assert sorted(pair.copies().values()) == [1] * 3 + [2] * LIMIT
    (repeated,) = desk.again(**span)
    assert repeated.out.startswith("0 made due")


@scenario("A customer wants to be forgotten")
def test_a_customer_wants_to_be_forgotten(desk: Desk) -> None:
    """No mail of theirs is left, nor sent: neither ours, nor one on its way, nor another's."""
    pair, email = desk.pair, "forget.me@example.com"
    relay = pair.relay()
    replica = pair.replica()
    pair.sink.script(Rule("rcpt", "451 4.7.1 later", to="forget.me"))
    (refused,) = pair.place(email=email)
    pair.wait_until_completed([refused])
    pair.send(order("theirs", email=email), {"key": "broken", "value": f'{{"email": "{email}'})
    pair.wait_for(lambda: pair.states() == {"RETRY": 2})
    relay.part.stop()
    (on_its_way,) = pair.place(email=email)
    pair.wait_for(lambda: letters(pair))
    began = datetime.now(UTC)
    ours, theirs = desk.run(EMAIL=email)
    assert codes(ours, theirs) == [0, 0], ours.err + theirs.err
    assert ours.out.startswith("1 mails erased, 1 orders were not known, ")
    until = re.search(r"the topic order-created keeps .* until (\S+) at the latest", ours.err)
    assert until
    assert datetime.fromisoformat(until[1]) > began + RETENTION
    assert theirs.out.startswith("1 mails erased, 0 orders were not known")
    assert "dead letters emptied" in theirs.out
    assert pair.mail_sql("SELECT reason, value FROM dead_letters") == [("erased", None)]

    pair.sink.script()
    pair.relay()
    others = pair.place(3)
    pair.wait_until_completed([on_its_way, *others])
    pair.wait_until_read()
    pair.wait_until_sent(others)
    assert pair.states() == {"SENT": len(others), "ERASED": 3}
    assert pair.copies() == Counter(others)
    assert replica.is_ready()


@scenario("The topic lost what it had acknowledged")
def test_the_topic_lost_what_it_had_acknowledged(desk: Desk) -> None:
    """A comparison finds what was COMPLETED and is gone; published again it sends no mail."""
    pair = desk.pair
    pair.relay()
    pair.replica()
    (lost,) = pair.place()
    pair.wait_until_completed([lost])
    pair.wait_until_sent([lost])
    pair.wait_until_read()
    pair.expire(lost)
    others = pair.place(3)
    pair.wait_until_completed(others)
    compared, republished = desk.run(ORDER=lost, **desk.span)
    assert codes(compared, republished) == [FOUND, 0]
    assert missing(compared.out) == [lost]
    pair.wait_until_completed([lost])
    pair.wait_until_sent([lost, *others])
    pair.wait_until_read()
    assert pair.copies() == Counter([lost, *others])
    assert pair.sh(desk.done[0], **desk.span).code == 0


@scenario("The topic was deleted")
def test_the_topic_was_deleted(desk: Desk) -> None:
    """All events are published again; what was mailed is not mailed again, what was not is."""
    pair = desk.pair
    relay, replica = pair.relay(), pair.replica()
    mailed = pair.place(5)
    pair.wait_until_completed(mailed)
    pair.wait_until_sent(mailed)
    replica.part.stop()
    unread = pair.place(3)
    pair.wait_until_completed(unread)
    pair.delete_topic()
    made, listed = desk.run()
    assert codes(made, listed) == [0, 0]
    assert "created" in made.out
    pair.wait_for(lambda: relay.logged("topic.recreated"))
    pair.wait_until_completed([*mailed, *unread])
    replica = pair.replica()
    pair.wait_until_sent([*mailed, *unread])
    pair.wait_until_read()
    gaps = waiting_gaps(pair)
    listed, accepted, compared = desk.run(GAPS=" ".join(gaps), **desk.span)
    assert codes(listed, accepted, compared) == [FOUND, 0, 0]
    assert [(row["id"], row["reason"]) for row in gaps_in(listed.out)] == [
        (gap, "topic recreated") for gap in gaps
    ]
    assert len(gaps) == len(pair.ends())
    assert accepted.out.count("accepted") == len(gaps)
    assert waiting_gaps(pair) == []
    assert pair.copies() == Counter([*mailed, *unread])
    assert replica.is_ready()


@scenario(
    "The order database was restored to an earlier state,"
    " or failed over to a standby that was behind"
)
def test_the_order_database_was_restored(desk: Desk) -> None:
    """What went back is completed again, orders that are gone are named, nobody is mailed twice."""
    pair = desk.pair
    relay = pair.relay()
    pair.replica()
    kept = pair.place(3)
    pair.wait_until_completed(kept)
    relay.part.stop()
    went_back = pair.place(2)
    backup = pair.back_up_orders()
    relay = pair.relay()
    gone = pair.place(2)
    placed = [*kept, *went_back, *gone]
    pair.wait_until_completed(placed)
    pair.wait_until_sent(placed)
    relay.part.stop()
    pair.restore_orders(backup)
    assert pair.outbox(went_back[0])["state"] == "INIT"
    relay = pair.relay()
    pair.wait_until_completed([*kept, *went_back])
    pair.wait_for(lambda: len(relay.logged("event.phantom")) == len(gone))
    (compared,) = desk.run(**desk.span)
    assert compared.code == FOUND
    assert sorted(named("ghost", compared.out)) == sorted(gone)
    assert missing(compared.out) == []
    fresh = pair.place()
    pair.wait_until_sent([*placed, *fresh])
    pair.wait_until_read()
    assert pair.copies() == Counter([*placed, *fresh])


@scenario("The ledger was restored to an earlier state, or lost")
def test_the_ledger_was_restored(desk: Desk) -> None:
    """No replica starts, then what may have been sent is HELD until a person has decided."""
    pair = desk.pair
    pair.relay()
    replica = pair.replica()
    pair.sink.script(Rule("rcpt", "451 4.7.1 later", to="never"))
    early = pair.place(3)
    (never,) = pair.place(email="never@example.com")
    pair.wait_until_sent(early)
    pair.wait_for(lambda: pair.states([never]) == {"RETRY": 1})
    backup = pair.back_up_ledger()
    (forgotten,) = pair.place()
    pair.wait_until_sent([forgotten])
    pair.wait_for(
        lambda: pair.commits() == {where: end for where, end in pair.ends().items() if end}
    )
    replica.part.stop()
    pair.restore_ledger(backup)
    before = pair.copies()
    pair.sink.script()
    assert pair.replica(is_waited_for=False).wait_for_end(seconds=PATIENCE_SECONDS) == REFUSED

    dry, rewound = desk.run()
    assert codes(dry, rewound) == [0, 0]
    assert "what is due now would be HELD" in dry.err
    assert dry.out == "left alone\n"
    assert rewound.out == "rewound; 1 mails HELD\n"
    pair.replica()
    fresh = pair.place()
    pair.wait_until_sent(fresh)
    pair.wait_for(lambda: pair.states([never, forgotten]) == {"HELD": 2})
    pair.wait_until_read()
    assert pair.copies() == before + Counter(fresh)

    listed, settled, retried = desk.run(ORDER=forgotten)
    assert codes(listed, settled, retried) == [0, 0, 0]
    assert {row["order_id"] for row in table(listed.out)} == {never, forgotten}
    assert "1 mails to 1 recipients would be sent" in retried.err
    pair.wait_until_sent([*early, never, forgotten, *fresh])
    assert pair.copies() == Counter([*early, never, forgotten, *fresh])


@scenario("A partition of the mail service stops")
def test_a_partition_stops(desk: Desk) -> None:
    """One replica is not ready and the others send; then it goes on, and the gap is filled."""
    pair = desk.pair
    pair.relay()
    replicas = [pair.replica(), pair.replica()]
    read = pair.place(3)
    pair.wait_until_sent(read)
    pair.wait_until_read()
    pair.change_ledger("UPDATE control SET is_paused = true")
    (lost,) = pair.place()
    pair.wait_until_completed([lost])
    partition, offset = pair.expire(lost)
    behind = dated({**order("behind"), "partition": partition}, desk.since - A_DAY_AND_MORE)
    beside = [{**order(n), "partition": n} for n in range(3) if n != partition]
    pair.send(behind, *beside)
    pair.change_ledger("UPDATE control SET is_paused = false")
    pair.wait_for(lambda: any(replica.logged("gap.found") for replica in replicas))
    pair.wait_until_sent([record["key"] for record in beside])
    pair.wait_for(lambda: sorted(is_ready(replicas)) == [False, True])
    (gap,) = waiting_gaps(pair)
    listed, accepted = desk.run(GAP=gap)
    assert codes(listed, accepted) == [FOUND, 0]
    (row,) = gaps_in(listed.out)
    assert (row["id"], row["partition"], row["end_offset"]) == (
        gap,
        str(partition),
        str(offset + 1),
    )
    assert f"goes on at {offset + 1}" in accepted.out
    pair.wait_until_sent([behind["key"]])
    pair.wait_for(lambda: is_ready(replicas) == [True, True])
    assert pair.sh(desk.done[0]).code == 0

    assert not pair.copies([lost])
    compared, republished = desk.run(ORDER=lost, **desk.span)
    assert codes(compared, republished) == [FOUND, 0]
    assert lost in missing(compared.out)
    pair.wait_until_sent([lost])
    pair.sh(f"order-service outbox republish {read[0]}")
    pair.wait_until_completed([lost, *read])
    pair.wait_until_read()
    records = [behind, *beside]
    assert pair.copies() == Counter([lost, *read, *(record["key"] for record in records)])


@scenario("A backlog of a day")
def test_a_backlog_of_a_day(desk: Desk) -> None:
    """What is young goes out by itself; what is too old waits for a person, and goes once."""
    pair = desk.pair
    old, young = pair.place(3), pair.place(3)
    pair.make_older(old, A_DAY_AND_MORE)
    pair.relay()
    pair.wait_until_completed([*old, *young])
    pair.replica()
    pair.wait_until_sent(young)
    pair.wait_for(lambda: pair.states(old) == {"DEAD": len(old)})
    assert pair.copies() == Counter(young)
    listed, dry, retried = desk.run()
    assert codes(listed, dry, retried) == [0, 0, 0]
    assert {row["order_id"] for row in table(listed.out)} == set(old)
    assert f"{len(old)} mails to 1 recipients would be sent: {len(old)} DEAD (expired)" in dry.err
    assert dry.out.count("left alone") == len(old)
    pair.wait_until_sent([*old, *young])
    assert pair.copies() == Counter([*old, *young])


@scenario("The relay's password was changed")
def test_the_relays_password_was_changed(desk: Desk) -> None:
    """No attempt counts, nothing dies, and with the new password each mail goes out once."""
    pair = desk.pair
    pair.relay()
    replicas = [pair.replica(), pair.replica()]
    first = pair.place(6)
    pair.wait_until_sent(first)
    # As a relay that was restarted with it: connections that are kept are logged in already.
    pair.sink.configure(replace(RELAY, password=PASSWORD[::-1]))
    pair.sink.stop()
    pair.sink.start()
    later = pair.add_orders(30)
    pair.wait_until_completed(later)
    pair.wait_for(lambda: any(replica.metric("mail_breaker_is_open") for replica in replicas))
    pair.wait_for(lambda: pair.states()["RETRY"])
    pair.wait_for(lambda: pair.sink.counters().stages["auth"] > 3)
    answers = [line["answer"] for each in replicas for line in each.logged("breaker.changed")]
    assert any("535" in answer for answer in answers)
    (listed,) = desk.run()
    assert listed.code == 0
    rows = table(listed.out)
    assert {row["state"] for row in rows} <= {"RETRY", "SENDING"}
    assert {row["attempts"] for row in rows if row["state"] == "RETRY"} == {"0"}
    assert set(pair.states()) <= {"SENT", "RETRY", "SENDING"}
    assert pair.copies() == Counter(first)

    pair.password_file.write_text(f"{PASSWORD[::-1]}\n")
    for replica in replicas:
        replica.part.stop()
        restarted = pair.replica()
        pair.wait_for(lambda: any(mail.order_id in later for mail in pair.sink.accepted()))
        assert restarted.logged("breaker.changed") == []
    pair.wait_until_sent([*first, *later])
    assert pair.copies() == Counter([*first, *later])
    assert pair.mail_sql("SELECT DISTINCT attempts FROM deliveries") == [(1,)]


@scenario("Mails are UNKNOWN")
def test_mails_are_unknown(desk: Desk) -> None:
    """Resent once; when that answer is lost too the mail waits, and a person settles it."""
    pair = desk.pair
    pair.relay()
    pair.replica()
    pair.sink.script(Rule("dot", Drop(), to="lost.answer"))
    (order_id,) = pair.place(email="lost.answer@example.com")
    waits = "SELECT order_id FROM deliveries WHERE state = 'UNKNOWN' AND due_at IS NULL"
    pair.wait_for(lambda: pair.mail_sql(waits) == [(order_id,)])
    assert pair.copies() == {order_id: 2}
    listed, settled = desk.run(ORDER=order_id)
    assert codes(listed, settled) == [0, 0]
    assert [row["order_id"] for row in table(listed.out)] == [order_id]
    others = pair.place(3)
    pair.wait_until_sent([order_id, *others])
    assert pair.copies() == {order_id: 2, **Counter(others)}


@scenario("Mails are DEAD")
def test_mails_are_dead(desk: Desk) -> None:
    """The relay's words are kept; once the cause is mended the mail goes out."""
    pair = desk.pair
    pair.relay()
    replica = pair.replica()
    pair.sink.script(Rule("rcpt", "550 5.1.1 no such user here", to="moved"))
    (order_id,) = pair.place(email="moved@example.com")
    pair.wait_for(lambda: pair.states() == {"DEAD": 1})
    pair.wait_for(lambda: replica.logged("mail.judged"))
    (judged,) = replica.logged("mail.judged")
    assert (judged["order_id"], judged["verdict"]) == (order_id, "DEAD")
    assert replica.metric("mail_verdicts_total", verdict="DEAD") == 1
    pair.sink.script()
    listed, retried = desk.run(ORDER=order_id)
    assert codes(listed, retried) == [0, 0]
    (row,) = table(listed.out)
    assert row["order_id"] == order_id
    assert "550 5.1.1 no such user here" in row["reason"]
    pair.wait_until_sent([order_id])
    assert pair.copies() == {order_id: 1}


@scenario("Dead letters")
def test_dead_letters(desk: Desk) -> None:
    """Neighbours go on; what a newer release can read becomes a mail, the rest stays."""
    pair = desk.pair
    replica = pair.replica()
    newer = {**order("newer"), "headers": {"ce_type": "order.created.v2"}}
    broken = {"key": "broken", "value": '{"email": "minji@example.com'}
    good = [order(number) for number in range(6)]
    pair.send(*good[:3], newer, broken, *good[3:])
    pair.wait_until_sent([record["key"] for record in good])
    pair.wait_for(lambda: len(letters(pair)) == 2)
    assert len(replica.logged("record.unreadable")) == 2
    pair.wait_for(
        lambda: replica.metric("mail_records_taken_in_total", **{"as": "dead_letter"}) == 2
    )
    # As if a release had learnt to read them.
    pair.change_ledger("UPDATE dead_letters SET headers = '[]' WHERE key = %s", b"order-newer")
    listed, shown, retried, exported = desk.run(LETTER=str(letters(pair)[b"broken"]))
    assert codes(listed, shown, retried, exported) == [0, 0, FOUND, 0]
    assert {row["key"] for row in table(listed.out)} == {"order-newer", "broken"}
    assert "m***@e***" in shown.out
    assert "minji" not in shown.out
    outcomes = {int(row["id"]): row["outcome"] for row in table(retried.out)}
    assert "RETRY" in outcomes.values()
    assert outcomes[letters(pair)[b"broken"]].startswith("not JSON")
    (line,) = exported.out.splitlines()
    assert json.loads(line)["key"] == "broken"
    pair.wait_until_sent([*(record["key"] for record in good), "order-newer"])
    assert pair.copies() == Counter([*(record["key"] for record in good), "order-newer"])


# The document


def test_every_section_with_commands_has_its_scenario() -> None:
    """No command of the runbook is unproven, and no scenario has lost its section."""
    assert sorted(SCENARIOS) == sorted(runbook.blocks())


def test_every_command_named_in_the_prose_exists() -> None:
    """Both services' help, and the Makefile, have each command and option that is named."""
    trees = {f"{name}-service": commands(name) for name in ("order", "mail")}
    targets = re.findall(r"^([a-z-]+):", (REPOSITORY / "Makefile").read_text(), re.MULTILINE)
    every = {words: options for tree in trees.values() for words, options in tree.items() if words}
    unknown = []
    for span in runbook.spans():
        program, *words = span.split()
        if program == "make":
            is_known = words[0] in targets
        elif program in trees:
            is_known = has(trees[program], words)
        elif program in {words.split()[0] for words in every}:
            is_known = any(has(tree, [program, *words]) for tree in trees.values())
        elif program.startswith("--"):
            is_known = any(program in options for options in every.values())
        else:
            continue
        unknown += [] if is_known else [span]
    assert unknown == []


def test_every_event_and_metric_that_is_named_exists() -> None:
    """What an operator is told to look for is in the services' code under that name."""
    code = "".join(
        path.read_text()
        for name in ("order", "mail")
        for path in (REPOSITORY / f"{name}_service/src").rglob("*.py")
    )
    named = set()
    for span in runbook.spans():
        named |= set(re.findall(r"^[a-z_]+(?:\.[a-z_]+)+$", span))
        named |= set(re.findall(r"^(?:order|mail)_[a-z_]+", span))
    assert len(named) > 10
    assert {name for name in named if f'"{name}"' not in code} == set()


def commands(service: str) -> dict[str, list[str]]:
    """Return the options of each command of a service, by its words."""
    program = f"""
import json
from {service}_service.cli import commands

def walk(command, words):
    names = [name for each in command.params for name in (*each.opts, *each.secondary_opts)]
    yield " ".join(words), names
    for name, inner in getattr(command, "commands", {{}}).items():
        yield from walk(inner, [*words, name])

print(json.dumps(dict(walk(commands, []))))
"""
    python = REPOSITORY / f".venv/{service}/bin/python"
    done = subprocess.run(
        [python, "-c", program], capture_output=True, text=True, timeout=60, check=True
    )
    return dict(json.loads(done.stdout))


def has(tree: Mapping[str, Sequence[str]], arguments: Sequence[str]) -> bool:
    """Say whether a service has a command with these words and options."""
    words: list[str] = []
    for word in arguments:
        if " ".join([*words, word]) not in tree:
            break
        words.append(word)
    rest = arguments[len(words) :]
    is_group = any(command.startswith(" ".join([*words, ""])) for command in tree)
    options = {word for word in rest if word.startswith("--")}
    return bool(words) and not (is_group and rest) and options <= set(tree[" ".join(words)])


# What is asked and read


def codes(*done: Done) -> list[int]:
    return [each.code for each in done]


def named(what: str, text: str) -> list[str]:
    """Return the orders that `reconcile` names."""
    return re.findall(rf"^{what}  (\S+)$", text, re.MULTILINE)


def missing(text: str) -> list[str]:
    return named("missing", text)


def letters(pair: Installation) -> dict[bytes, int]:
    """Return the dead letters' ids by their keys."""
    rows = pair.mail_sql("SELECT key, id FROM dead_letters")
    return {bytes(key): letter_id for key, letter_id in rows}


def waiting_gaps(pair: Installation) -> list[str]:
    """Return the ids of the gaps that wait for a person."""
    rows = pair.mail_sql("SELECT id FROM gaps WHERE accepted_at IS NULL ORDER BY id")
    return [str(gap_id) for (gap_id,) in rows]


def gaps_in(text: str) -> list[dict[str, str]]:
    """Return the gaps that `positions list` names."""
    return table(text.partition("`positions accept-gap`\n")[2])


def is_ready(replicas: Sequence[Service]) -> list[bool]:
    return [replica.is_ready() for replica in replicas]
