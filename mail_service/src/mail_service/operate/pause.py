"""`pause`, `resume`: stop sending now, and go on."""

import click

from mail_service import control
from mail_service.models import make_engine
from mail_service.operate.output import Words, as_json_option, examples, print_json
from mail_service.settings import Settings


@click.command(epilog=examples('mail-service pause --reason "wrong price in the template"'))
@click.option("--reason", type=Words(), required=True, help="Why; the next one will want to know.")
@as_json_option
def pause(reason: str, *, as_json: bool) -> None:
    """Stop all claims of the group, within a second; what is in a slot is finished.

    Nothing is lost: the topic and the ledger keep what comes. Paused already, it stays so for the
    reason it has.
    """
    with make_engine(Settings.from_environment().database_url).begin() as connection:
        before = control.pause_reason(connection)
        if before is None:
            control.pause(connection, reason)
    _tell(before or reason, "paused already" if before else "paused", as_json=as_json)


@click.command(epilog=examples("mail-service resume"))
@as_json_option
def resume(*, as_json: bool) -> None:
    """Let the group claim again."""
    with make_engine(Settings.from_environment().database_url).begin() as connection:
        before = control.pause_reason(connection)
        control.resume(connection)
    _tell(before, "resumed" if before else "was not paused", as_json=as_json)


def _tell(reason: str | None, outcome: str, *, as_json: bool) -> None:
    if as_json:
        print_json({"outcome": outcome, "reason": reason})
    else:
        click.echo(f"{outcome}: {reason}" if reason else outcome)
