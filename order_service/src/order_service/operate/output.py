"""How a command prints what it found: for people, or with --json for scripts."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import click
from rich.console import Console
from rich.progress import Progress

# Each ends the command with what a script can tell apart; README.md says which is which.
EXIT_FOUND = 1
EXIT_USAGE = 2
EXIT_FAILED = 3
EXIT_INTERRUPTED = 130

as_json_option = click.option("--json", "as_json", is_flag=True, help="For scripts.")


class CannotBeDone(click.ClickException):
    """What was asked cannot be done here; the message says why."""

    exit_code = EXIT_FAILED


def examples(*lines: str) -> str:
    """Return what a command's help ends with, in just these lines."""
    return "\n  ".join(("\b\nExamples:", *lines))


@contextmanager
def progress(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """Show how far a long work is, on a terminal only; call what is yielded with each step."""
    console = Console(stderr=True)
    with Progress(console=console, disable=not console.is_terminal, transient=True) as shown:
        task = shown.add_task(what, total=total)
        yield lambda steps: shown.advance(task, steps)


def print_rows(rows: Sequence[Mapping[str, Any]], *, as_json: bool) -> None:
    """Print one row after the other, a line for each column; as JSON, one array."""
    if as_json:
        click.echo(json.dumps(rows, default=str, ensure_ascii=False))
        return
    for number, row in enumerate(rows):
        if number:
            click.echo()
        for name, value in row.items():
            click.echo(f"{name:>18}  {'' if value is None else value}")


def print_table(rows: Sequence[Mapping[str, Any]], *, as_json: bool) -> None:
    """Print a line for each row under the columns' names; as JSON, one array."""
    if as_json or not rows:
        click.echo(json.dumps(rows, default=str, ensure_ascii=False) if as_json else "none")
        return
    table = [[str(name) for name in rows[0]]]
    table += [["" if value is None else str(value) for value in row.values()] for row in rows]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for line in table:
        cells = (cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        click.echo("  ".join(cells).rstrip())
