"""`mail-service preview`: what a customer would get, without sending it."""

import webbrowser
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from tempfile import NamedTemporaryFile

import click

from mail_service import events
from mail_service.confirmation import (
    LANGUAGES,
    SAMPLE,
    SAMPLE_AT,
    CannotRender,
    Confirmation,
    Shop,
    message_id,
)
from mail_service.events import UnreadableRecord
from mail_service.operate.output import EXIT_FAILED, examples
from mail_service.settings import Settings


@click.command(
    epilog=examples(
        "mail-service preview --locale ko --open",
        "mail-service preview --event event.json --out mail.eml",
    )
)
@click.option("--locale", type=click.Choice(LANGUAGES), help="The language; else the event's.")
@click.option(
    "--event",
    "event_path",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="A record's value as JSON; else a sample order.",
)
@click.option(
    "--out",
    type=click.Path(dir_okay=False, writable=True, path_type=Path),
    help="Write it there: .html, .txt, or .eml for the whole mail.",
)
@click.option("--open", "is_opened", is_flag=True, help="Show the HTML in a browser.")
def preview(
    locale: str | None, event_path: Path | None, out: Path | None, *, is_opened: bool
) -> None:
    """Show the confirmation of an order; without --out or --open, its text."""
    settings = Settings.from_environment()
    confirmation = Confirmation(Shop.of(settings))
    try:
        event = events.parse(event_path.read_bytes()) if event_path else SAMPLE
        event = replace(event, locale=locale or event.locale)
        at = datetime.now(UTC) if event_path else SAMPLE_AT
        wording = confirmation.word(event, event_at=at)
        mail = confirmation.compose(
            event,
            event_at=at,
            message_id=message_id(event.order_id, mail_from=settings.mail_from),
        )
    except (UnreadableRecord, CannotRender) as error:
        click.echo(str(error), err=True)
        raise SystemExit(EXIT_FAILED) from error
    forms = {".html": wording.html.encode(), ".txt": wording.text.encode(), ".eml": mail.content}
    if out is not None:
        if out.suffix not in forms:
            raise click.UsageError(f"--out: a file that ends in {', '.join(forms)}")
        out.write_bytes(forms[out.suffix])
    if is_opened:
        with NamedTemporaryFile(suffix=".html", delete=False) as file:
            file.write(forms[".html"])
        webbrowser.open(Path(file.name).as_uri())
    if out is None and not is_opened:
        click.echo(f"{wording.subject}\n\n{wording.text}", nl=False)
