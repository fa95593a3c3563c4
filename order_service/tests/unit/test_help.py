"""What `--help` says, and that it is true."""

import shlex
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from order_service.cli import commands


def leaves(group: click.Group, *path: str) -> Iterator[tuple[str, ...]]:
    """Yield the words of every command that does something."""
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from leaves(command, *path, name)
        else:
            yield (*path, name)


def examples_of(path: tuple[str, ...]) -> list[str]:
    """Return the lines of a command's help under "Examples:"."""
    told = CliRunner().invoke(commands, [*path, "--help"]).output
    return [line.strip() for line in told.partition("Examples:\n")[2].splitlines() if line.strip()]


COMMANDS = list(leaves(commands))


def test_there_are_commands_to_ask() -> None:
    """The checks below are made on each command, groups included."""
    assert {("relay",), ("erase",), ("outbox", "republish")} <= set(COMMANDS)


@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
def test_an_example_can_be_typed(
    path: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each is a use of just this command, with arguments that it takes."""
    monkeypatch.chdir(tmp_path)
    Path("products.csv").touch()
    lines = examples_of(path)
    assert lines
    for line in lines:
        words = shlex.split(line)
        start = words.index("order-service") + 1
        end = next((words.index(sign) for sign in ("|", ">") if sign in words), len(words))
        typed = words[start:end]
        if typed[: len(path)] != list(path):
            # What is piped into this command is told with it.
            typed = words[words.index("order-service", end) + 1 :]
        assert typed[: len(path)] == list(path)
        command: click.Command = commands
        for name in path:
            assert isinstance(command, click.Group)
            command = command.commands[name]
        rest = typed[len(path) :] or ["01936f6e-7c1a-7000-8000-000000000001"] * ("|" in words)
        command.make_context("order-service", rest)
