"""How a command asks, and prints what it found: for people, or with --json for scripts."""

import functools
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import click
from rich.console import Console
from rich.progress import Progress

Command = Callable[..., None]

# Each ends the command with what a script can tell apart.
EXIT_FOUND = 1
EXIT_USAGE = 2
EXIT_FAILED = 3
EXIT_INTERRUPTED = 130

as_json_option = click.option("--json", "as_json", is_flag=True, help="For scripts.")
addresses_option = click.option(
    "--show-addresses", is_flag=True, help="Whole, not masked as otherwise."
)


@dataclass(frozen=True, slots=True)
class Consent:
    """Whether what a command is about to do is to happen."""

    dry_run: bool
    is_given: bool

    def to(self, plan: str) -> bool:
        """Say what would happen, and whether it is to; without a terminal nobody can be asked."""
        click.echo(plan, err=True)
        if self.dry_run or self.is_given:
            return not self.dry_run
        if not sys.stdin.isatty():
            raise click.UsageError("nobody to ask: say --yes, or --dry-run")
        return click.confirm("Go on?", err=True)


def consent_options(command: Command) -> Command:
    """Give a command --dry-run and --yes, which reach it as `consent`."""

    @click.option("--dry-run", is_flag=True, help="Only say what would happen.")
    @click.option("--yes", "is_given", is_flag=True, help="Do it without asking.")
    @functools.wraps(command)
    def with_consent(*, dry_run: bool, is_given: bool, **others: Any) -> None:
        command(consent=Consent(dry_run, is_given), **others)

    return with_consent


class CannotBeDone(click.ClickException):
    """What was asked cannot be done here; the message says why."""

    exit_code = EXIT_FAILED


class Instant(click.ParamType[datetime]):
    """A moment with its offset from UTC; without one it would mean another here and there."""

    name = "instant"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> datetime:
        """Parse ISO 8601."""
        try:
            moment = value if isinstance(value, datetime) else datetime.fromisoformat(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)
        if moment.tzinfo is None:
            self.fail(f"{value} names no offset from UTC, such as Z or +09:00", param, ctx)
        return moment


def examples(*lines: str) -> str:
    """Return the end of a command's help."""
    return "\n".join(("\b", "Examples:", *(f"  {line}" for line in lines)))


class Words(click.ParamType[str]):
    """What a person says; an empty reason is none."""

    name = "text"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Refuse what says nothing."""
        if not str(value).strip():
            self.fail("says nothing", param, ctx)
        return str(value)


since_option = click.option("--from", "since", type=Instant(), help="Such as 2026-11-01T00:00Z.")
until_option = click.option("--to", "until", type=Instant(), help="Up to, not including.")


def require_range(since: datetime, until: datetime) -> None:
    """Raise UsageError for a range in which nothing can have happened."""
    if since > datetime.now(UTC):
        raise click.UsageError("--from lies in the future")
    if not since < until:
        raise click.UsageError("--from must be before --to")


@contextmanager
def progress(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """Show how far a long work is, on a terminal only; call what is yielded with each step."""
    console = Console(stderr=True)
    with Progress(console=console, disable=not console.is_terminal, transient=True) as shown:
        task = shown.add_task(what, total=total)
        yield lambda steps: shown.advance(task, steps)


def masked(address: str) -> str:
    """Return an address so that nobody is known by it."""
    local, _, domain = address.partition("@")
    return f"{local[:1]}***@{domain[:1]}***"


def counted(counts: Mapping[str, int]) -> str:
    """Write counts as `2 SENT, 1 DEAD`."""
    return ", ".join(f"{count} {name}" for name, count in sorted(counts.items())) or "none"


def print_rows(rows: Sequence[Mapping[str, Any]], *, as_json: bool) -> None:
    """Print one row after the other, a line for each column; as JSON, one array."""
    if as_json:
        print_json(rows)
        return
    for number, row in enumerate(rows):
        if number:
            click.echo()
        for name, value in row.items():
            click.echo(f"{name:>18}  {'' if value is None else value}")


def print_table(rows: Sequence[Mapping[str, Any]], *, as_json: bool) -> None:
    """Print a line for each row under the columns' names; as JSON, one array."""
    if as_json:
        print_json(rows)
        return
    if not rows:
        click.echo("none")
        return
    table = [[str(name) for name in rows[0]]]
    table += [["" if value is None else str(value) for value in row.values()] for row in rows]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for line in table:
        cells = (cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        click.echo("  ".join(cells).rstrip())


def print_json(value: object) -> None:
    """Print one JSON document on a line."""
    click.echo(json.dumps(value, default=str, ensure_ascii=False))
