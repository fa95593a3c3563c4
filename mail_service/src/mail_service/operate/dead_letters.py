"""`dead-letters list|show|retry|export`: records that could not be read."""

import base64
import hashlib
import json
import os
import re
import sys
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, TextIO

import click
from sqlalchemy import Engine

from mail_service import dead_letters as letters
from mail_service import decisions, events
from mail_service.dead_letters import DeadLetter
from mail_service.events import UnreadableRecord
from mail_service.ledger import NewMail
from mail_service.models import make_engine
from mail_service.operate.again import new_mail
from mail_service.operate.output import (
    EXIT_FAILED,
    EXIT_FOUND,
    Consent,
    addresses_option,
    as_json_option,
    consent_options,
    examples,
    masked,
    print_rows,
    print_table,
    progress,
)
from mail_service.settings import Settings

LIST_COLUMNS = ("id", "partition", "offset", "key", "taken_in_at", "reason")
DEFAULT_LIMIT = 100
MOST_LISTED = 10_000
AT = r"(?:@|\\u0040)"
# A JSON string with an address somewhere, else what looks like one.
ADDRESS = re.compile(
    rf"(?<=\")(?:[^\"\\]|\\.)*?{AT}(?:[^\"\\]|\\.)*(?=\")|[^\s\"'<>,;:@]*{AT}[^\s\"'<>,;:@]*",
    re.IGNORECASE,
)


@click.group("dead-letters")
def dead_letters() -> None:
    """See records that could not be read, and try them again."""


@dead_letters.command("list", epilog=examples('mail-service dead-letters list --reason "not JSON"'))
@click.option("--reason", help="Only those whose reason holds this text.")
@click.option("--limit", default=DEFAULT_LIMIT, type=click.IntRange(1, MOST_LISTED))
@as_json_option
def list_letters(reason: str | None, limit: int, *, as_json: bool) -> None:
    """List dead letters, the oldest first."""
    with make_engine(Settings.from_environment().database_url).connect() as connection:
        found = letters.choose(connection, reason=reason, limit=limit)
    rows = [_shown(letter, show_addresses=False) for letter in found]
    if not as_json:
        rows = [{name: row[name] for name in LIST_COLUMNS} for row in rows]
    print_table(rows, as_json=as_json)


@dead_letters.command(epilog=examples("mail-service dead-letters show 17 --show-addresses"))
@click.argument("letter_id", type=int)
@addresses_option
@as_json_option
def show(letter_id: int, *, show_addresses: bool, as_json: bool) -> None:
    """Show one with its value; exit 1 when there is none."""
    with make_engine(Settings.from_environment().database_url).connect() as connection:
        found = letters.choose(connection, ids=[letter_id])
    print_rows([_shown(letter, show_addresses=show_addresses) for letter in found], as_json=as_json)
    if not found:
        raise SystemExit(EXIT_FOUND)


@dead_letters.command(
    epilog=examples('mail-service dead-letters retry --all --reason "major version"')
)
@click.argument("letter_ids", nargs=-1, type=int)
@click.option("--all", "is_all", is_flag=True, help="Every one that the options leave.")
@click.option("--reason", help="Only those whose reason holds this text.")
@consent_options
@as_json_option
def retry(
    letter_ids: Sequence[int],
    reason: str | None,
    *,
    is_all: bool,
    consent: Consent,
    as_json: bool,
) -> None:
    """Read dead letters again, as after an upgrade; what can be read now becomes a mail.

    One whose order the ledger knows is a duplicate and sends nothing. What still cannot be read
    stays. Exit 1 when one does, or is not there.
    """
    if is_all == bool(letter_ids):
        raise click.UsageError("name dead letters, or --all")
    settings = Settings.from_environment()
    engine = make_engine(settings.database_url)
    with engine.connect() as connection:
        found = letters.choose(connection, ids=letter_ids or None, reason=reason)
    readings = {letter.id: _read(letter, settings) for letter in found}
    readable = sum(isinstance(reading, NewMail) for reading in readings.values())
    plan = f"{readable} of {len(found)} dead letters can be read now and would become mails"
    outcomes: list[dict[str, Any]] = [
        {"id": letter_id, "outcome": "there is none"}
        for letter_id in sorted(set(letter_ids) - readings.keys())
    ]
    if consent.to(plan):
        with progress("reading again", len(found)) as advance:
            for letter_id, reading in readings.items():
                outcome = reading
                if isinstance(reading, NewMail):
                    outcome = _become_mail(engine, letter_id, reading, settings)
                outcomes.append({"id": letter_id, "outcome": outcome})
                advance(1)
    else:
        outcomes += [
            {
                "id": letter_id,
                "outcome": "would become a mail" if isinstance(reading, NewMail) else reading,
            }
            for letter_id, reading in readings.items()
        ]
    print_table(outcomes, as_json=as_json)
    if readable < len(found) or len(found) < len(set(letter_ids)):
        raise SystemExit(EXIT_FOUND)


@dead_letters.command(
    epilog=examples("mail-service dead-letters export --show-addresses --out dead-letters.jsonl")
)
@click.option("--reason", help="Only those whose reason holds this text.")
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), help="Else on the screen.")
@addresses_option
def export(reason: str | None, out: Path | None, *, show_addresses: bool) -> None:
    """Write dead letters as JSON, one a line, with all that is kept of them.

    With --show-addresses key and value are base64, byte for byte, for whoever mends and publishes
    them again.
    """
    with make_engine(Settings.from_environment().database_url).connect() as connection:
        found = letters.choose(connection, reason=reason)
    if out is None:
        _export(found, sys.stdout, show_addresses=show_addresses)
        return
    # Whatever happens, there is the whole file or none.
    draft = out.with_name(f".{out.name}.part")
    try:
        with open(draft, "w", encoding="utf-8", opener=_private) as file:
            _export(found, file, show_addresses=show_addresses)
        draft.replace(out)
    except OSError as error:
        click.echo(f"{out}: {error.strerror}", err=True)
        raise SystemExit(EXIT_FAILED) from error
    click.echo(f"{len(found)} dead letters in {out}", err=True)


def _export(found: Sequence[DeadLetter], file: TextIO, *, show_addresses: bool) -> None:
    for letter in found:
        row = _shown(letter, show_addresses=show_addresses)
        if show_addresses:
            row["key"], row["value"] = _base64(letter.key), _base64(letter.value)
        file.write(json.dumps(row, default=str, ensure_ascii=False) + "\n")


def _read(letter: DeadLetter, settings: Settings) -> NewMail | str:
    """Return the mail it becomes, or why it becomes none."""
    record = letter.record()
    if letter.reason == letters.ERASED:
        return letters.ERASED
    if hashlib.sha256(record.value or b"").hexdigest() != letter.value_sha256:
        return "only its beginning was kept: the topic may have the whole"
    try:
        event = events.read(record)
    except UnreadableRecord as error:
        return str(error)
    if event is None:
        return "not for this service"
    return new_mail(record, event.order_id, settings)


def _become_mail(engine: Engine, letter_id: int, mail: NewMail, settings: Settings) -> str:
    """Put a mail in a dead letter's place, in one transaction."""
    with decisions.deciding(engine) as connection:
        if not letters.claim(connection, letter_id):
            return "there is none"
        made = decisions.make_due(
            connection,
            [mail],
            patience=timedelta(hours=settings.mail_give_up_hours),
            reason="was a dead letter",
        )
        letters.forget(connection, letter_id)
    return "RETRY" if made else "duplicate"


def _shown(letter: DeadLetter, *, show_addresses: bool) -> dict[str, Any]:
    def legible(content: bytes | str | None) -> str | None:
        if content is None:
            return None
        if isinstance(content, bytes):
            content = content.decode("utf-8", errors="backslashreplace")
        text = "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in content)
        return text if show_addresses else ADDRESS.sub(lambda found: masked(found[0]), text)

    return {
        "id": letter.id,
        "topic_id": letter.topic_id,
        "partition": letter.partition,
        "offset": letter.offset,
        "taken_in_at": letter.taken_in_at,
        "reason": letter.reason,
        "key": legible(letter.key),
        "value": legible(letter.value),
        "value_sha256": letter.value_sha256,
        "headers": [[legible(name), legible(content)] for name, content in letter.headers],
    }


def _base64(content: bytes | None) -> str | None:
    return None if content is None else base64.b64encode(content).decode()


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)
