"""What all commands have in common."""

import shlex
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import click
import pytest
from click.testing import CliRunner
from harness import Environment, Ledger, Operator, Replicas, Topic, event_of, run, wait_for
from records import Row, order
from sink import Rule, Sink

from mail_service.cli import commands

ORDER_ID = "01936f6e-7c1a-7000-8000-000000000001"
NOWHERE = "127.0.0.1:1"
AWAY_DATABASE = {"DATABASE_URL": f"postgresql://x@{NOWHERE}/x"}
AWAY_KAFKA = {"KAFKA_BOOTSTRAP_SERVERS": NOWHERE}
SINCE = (datetime.now(UTC) - timedelta(days=1)).isoformat()
CANARY = "canary-7f3a@example.com"
LEDGER_ONLY = [
    ["mails", "list"],
    ["mails", "show", "order-1"],
    ["mails", "retry", "order-1", "--yes"],
    ["mails", "settle", "order-1", "--sent", "--why", "w", "--yes"],
    ["dead-letters", "list"],
    ["dead-letters", "show", "1"],
    ["dead-letters", "retry", "--all", "--yes"],
    ["dead-letters", "export"],
    ["pause", "--reason", "r"],
    ["resume"],
    ["positions", "accept-gap", "1", "--yes"],
    ["erase", "order-1", "--yes"],
]
BOTH = [
    ["mails", "resend", "order-1", "--campaign", "c", "--reason", "r", "--yes"],
    ["replay", "--from", SINCE, "--yes"],
    ["positions", "list"],
    ["positions", "rewind", "--yes"],
    ["reconcile", "--from", SINCE],
]


def leaves(group: click.Group, *path: str) -> Iterator[tuple[str, ...]]:
    """Yield the words of every command that does something."""
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from leaves(command, *path, name)
        else:
            yield (*path, name)


# A replica is no job; its help is short.
COMMANDS = [path for path in leaves(commands) if path != ("consume",)]


def test_every_job_is_asked() -> None:
    """What is said below of all commands is said of these."""
    for path in COMMANDS:
        is_asked = any(words[: len(path)] == list(path) for words in LEDGER_ONLY + BOTH)
        assert is_asked or path in {("migrate",), ("preview",)}, path


@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
def test_an_example_can_be_typed(
    path: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each is a use of just this command, with arguments that it takes."""
    monkeypatch.chdir(tmp_path)
    Path("event.json").touch()
    told = CliRunner().invoke(commands, [*path, "--help"]).output
    lines = [
        line.strip() for line in told.partition("Examples:\n")[2].partition("\n\n")[0].splitlines()
    ]
    assert lines
    for line in lines:
        words = shlex.split(line)
        end = words.index("<") if "<" in words else len(words)
        assert words[: len(path) + 1] == ["mail-service", *path]
        command: click.Command = commands
        for name in path:
            assert isinstance(command, click.Group)
            command = command.commands[name]
        command.make_context("mail-service", words[len(path) + 1 : end])


def test_help_needs_no_settings() -> None:
    """The real command, in an empty environment."""
    for path in (["mails"], ["positions", "accept-gap"]):
        ended = run({}, *path, "--help")
        assert (ended.returncode, ended.stderr) == (0, "")


@pytest.mark.parametrize("arguments", LEDGER_ONLY + BOTH, ids=" ".join)
def test_without_settings_a_command_ends_with_2(operator: Operator, arguments: list[str]) -> None:
    """And says which are missing."""
    ended = operator.run(*arguments, DATABASE_URL="", MAIL_FROM="")
    assert (ended.returncode, ended.stdout) == (2, "")
    assert {line.partition(":")[0] for line in ended.stderr.splitlines()} >= {"MAIL_FROM"}


def check_failed(arguments: list[str], code: int, out: str, error: str, what: str) -> None:
    """Fail unless a command ended with 3, one line, and nothing for scripts to misread."""
    assert (code, out) == (3, ""), (arguments, out, error)
    # What an erasure is about to do is known, and told, before anything is asked for.
    (line,) = (line for line in error.splitlines() if "would be erased" not in line)
    assert line.startswith(what), (arguments, error)


def test_without_the_ledger_a_command_ends_with_3(
    ledger_rows: Ledger, topic: Topic, operator: Operator
) -> None:
    """One line that says so, no traceback."""
    topic.send([order(1)])
    for arguments in LEDGER_ONLY + BOTH:
        ended = operator.run(*arguments, **AWAY_DATABASE)
        check_failed(arguments, ended.returncode, ended.stdout, ended.stderr, "database: ")


def test_without_kafka_a_command_ends_with_3(
    environment: Environment, ledger_rows: Ledger, operator: Operator
) -> None:
    """One line that says so, no traceback; what needs the ledger alone does not notice."""
    away = Operator({**environment, **AWAY_KAFKA}, operator.forked)
    for arguments, ended in zip(BOTH, away.at_once(*BOTH), strict=True):
        check_failed(arguments, ended.returncode, ended.stdout, ended.stderr, "Kafka: ")
    for arguments in LEDGER_ONLY:
        assert away.run(*arguments).returncode in (0, 1)


def test_a_ledger_without_tables_is_told_of(operator: Operator, ledger_rows: Ledger) -> None:
    """With the command that makes them."""
    ledger_rows.change("ALTER TABLE deliveries RENAME TO elsewhere")
    try:
        ended = operator.run("mails", "list")
    finally:
        ledger_rows.change("ALTER TABLE elsewhere RENAME TO deliveries")
    assert (ended.returncode, "mail-service migrate" in ended.stderr) == (3, True)


def test_no_command_and_no_log_names_anybody_unless_asked(
    replicas: Replicas, topic: Topic, sink: Sink, ledger_rows: Ledger, operator: Operator
) -> None:
    """With all kinds of mails and dead letters there, and a relay that repeats addresses."""
    at = datetime.now(UTC) - timedelta(minutes=10)
    echo = f"<{CANARY}>: rejected"
    sink.script(
        Rule("rcpt", f"550 5.1.1 {echo}", times=1), Rule("rcpt", f"450 4.2.1 {echo}", times=2)
    )
    bad: Row = {"value": event_of("order-9", email=CANARY, amount="none"), "key": "order-9"}
    topic.send([order(number, email=CANARY) for number in range(4)] + [bad])
    replica = replicas.start(LOG_LEVEL="DEBUG")
    wait_for(ledger_rows.states, lambda states: states == {"SENT": 3, "DEAD": 1})
    wait_for(ledger_rows.dead_letters, bool)
    ledger_rows.put("order-held", "HELD", event=event_of("order-held", email=CANARY))
    ledger_rows.put("order-waits", "UNKNOWN", event=event_of("order-waits", email=CANARY))
    ledger_rows.put("order-due", "RETRY", event=event_of("order-due", email=CANARY))
    seen = replica.output()
    said = [
        ["mails", "list", "--json"],
        ["mails", "show", "order-held"],
        ["mails", "retry", "--all", "--dry-run"],
        ["mails", "settle", "--all", "--sent", "--why", "w", "--dry-run"],
        ["mails", "resend", "order-1", "--campaign", "c", "--reason", "r", "--dry-run"],
        ["mails", "resend", "order-held", "--campaign", "c", "--reason", "r", "--yes"],
        ["replay", "--from", at.isoformat(), "--dry-run"],
        ["reconcile", "--from", at.isoformat(), "--ids", "--json"],
        ["dead-letters", "list", "--json"],
        ["dead-letters", "show", "1"],
        ["dead-letters", "retry", "--all", "--yes", "--json"],
        ["dead-letters", "export"],
        ["positions", "list"],
        ["erase", "--email", CANARY, "--yes"],
    ]
    for arguments in said:
        ended = operator.run(*arguments)
        assert "Traceback" not in ended.stderr
        seen += ended.stdout + ended.stderr
    assert CANARY.partition("@")[0] not in seen
