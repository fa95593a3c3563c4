"""The pair from outside, by both services' commands and HTTP: an order's way, orders, reconcile.

python -m deploy.pair order ID | orders N | reconcile
"""

import argparse
import csv
import json
import shlex
import sys
import time
import uuid
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx

from deploy.commands import ServiceCommand
from deploy.embedded.errors import StackError
from deploy.embedded.remote import ask
from deploy.embedded.state import KEPT
from deploy.hops import hops

PRODUCTS = Path(__file__).parent / "products.csv"
USER = "customer"
LOCALES = ("ko", "en")
AT_ONCE = 8
HTTP_SECONDS = 10.0
# How long an order waits in all for being let through.
PATIENCE_SECONDS = 120.0
RECONCILE_SECONDS = 1800.0
DEFAULT_RANGE = timedelta(hours=24)
SHOWN_IDS = 20
EXIT_FOUND = 1
EXIT_FAILED = 3
EXIT_INTERRUPTED = 130


@dataclass(frozen=True, kw_only=True)
class Reconciled:
    """The orders of a range against their mails; the last four should be empty.

    `unread` are partition and offset of records that left neither a mail nor a dead letter.
    """

    since: str
    until: str
    orders: int
    with_event: int
    on_their_way: int
    outside_retention: int
    waiting: int
    mails: dict[str, int]
    dead_letters: int
    missing: list[str]
    ghosts: list[str]
    doubles: list[str]
    unread: list[str]

    def findings(self) -> dict[str, list[str]]:
        """Return what should not be, under the word for one of each."""
        return {
            "missing": self.missing,
            "ghost": self.ghosts,
            "double": self.doubles,
            "unread": self.unread,
        }


def main(arguments: Sequence[str]) -> int:
    """Do what the command line says and return the exit code."""
    options = _parse(arguments)
    try:
        order_service = _command(options.state, "order-service", options.order_service)
        if options.verb == "orders":
            api = options.api or ask(options.state, "addresses")["addresses"]["API"]
            return orders(order_service, api, options.count, as_json=options.as_json)
        mail_service = _command(options.state, "mail-service", options.mail_service)
        if options.verb == "order":
            return order(order_service, mail_service, options.order_id)
        since, until = options.since, options.until
        return reconcile(order_service, mail_service, since, until, as_json=options.as_json)
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except StackError as error:
        sys.stderr.write(f"{error}\n")
        return EXIT_FAILED


def order(order_service: ServiceCommand, mail_service: ServiceCommand, order_id: str) -> int:
    """Print an order's hops from its acceptance to its mails; 1 when neither side knows it."""
    events = order_service.ask("outbox", "show", "--json", "--", order_id)
    mails = mail_service.ask("mails", "show", "--json", "--", order_id)
    if not events and not mails:
        sys.stderr.write(f"neither the outbox nor the ledger knows {order_id}\n")
        return EXIT_FOUND
    found = hops(events, mails)
    since = found[0].at or datetime.now(UTC)
    for hop in found:
        at = hop.at.astimezone(UTC).isoformat(timespec="milliseconds") if hop.at else ""
        _print(f"{hop.after(since)}  {at:<29}  {_printable(hop.what)}")
    if not events:
        _print("No outbox row: COMPLETED over 14 days ago and purged, or not an order of ours.")
    if not mails:
        _print("No mail: the ledger does not know it.")
    return 0


def orders(order_service: ServiceCommand, api: str, count: int, *, as_json: bool) -> int:
    """Place so many orders and print their ids; 3 when one could not be placed."""
    token = order_service.print_out("token", "--user", USER).strip()
    bearer = {"Authorization": f"Bearer {token}"}
    order_ids, failures = [], []
    with (
        httpx.Client(base_url=api, headers=bearer, timeout=HTTP_SECONDS) as client,
        ThreadPoolExecutor(AT_ONCE) as pool,
    ):
        for placed in [pool.submit(_place, client, body) for body in _bodies(count)]:
            try:
                order_ids.append(placed.result())
                if not as_json:
                    _print(order_ids[-1])
            except (httpx.HTTPError, StackError) as error:
                failures.append(str(error) or type(error).__name__)
    if as_json:
        _print(json.dumps(order_ids))
    for failure in failures:
        sys.stderr.write(f"not placed: {failure}\n")
    return EXIT_FAILED if failures else 0


def _bodies(count: int) -> Iterator[dict[str, Any]]:
    """Make orders that differ in recipient, language and items."""
    with PRODUCTS.open(encoding="utf-8", newline="") as file:
        skus = [row["sku"] for row in csv.DictReader(file)]
    for number in range(count):
        lines = 1 + number % len(skus)
        items = [skus[(number + line) % len(skus)] for line in range(lines)]
        yield {
            "email": f"customer-{number + 1}@example.com",
            "locale": LOCALES[number % len(LOCALES)],
            "items": [
                {"sku": sku, "quantity": 1 + (number + line) % 3} for line, sku in enumerate(items)
            ],
        }


def _place(client: httpx.Client, body: dict[str, Any]) -> str:
    """Place one order and return its id, waiting when the API says when to come again."""
    key = {"Idempotency-Key": str(uuid.uuid4())}
    deadline = time.monotonic() + PATIENCE_SECONDS
    while True:
        answer = client.post("/v1/orders", json=body, headers=key)
        if answer.status_code == httpx.codes.CREATED:
            return str(answer.json()["id"])
        pause = answer.headers.get("Retry-After", "")
        if not pause.isdecimal() or time.monotonic() + int(pause) > deadline:
            raise StackError(f"answered {answer.status_code}: {answer.text.strip()}")
        time.sleep(int(pause))


def reconcile(
    order_service: ServiceCommand,
    mail_service: ServiceCommand,
    since: datetime,
    until: datetime,
    *,
    as_json: bool,
) -> int:
    """Compare orders and mails of a range; 1 when there is anything that should not be."""
    # Both sides cut their times to milliseconds in places; a whole one is the same to both.
    texts = [moment.isoformat(timespec="milliseconds") for moment in (since, until)]
    asked = ("reconcile", "--from", texts[0], "--to", texts[1], "--json", "--ids")
    # First the orders: what is in the topic by then the mail side, asked later, must know.
    order_side = order_service.ask(*asked, seconds=RECONCILE_SECONDS)
    mail_side = mail_service.ask(*asked, seconds=RECONCILE_SECONDS)
    found = join(order_side, mail_side, since=texts[0], until=texts[1])
    if as_json:
        _print(json.dumps(asdict(found)))
    else:
        _print_table(found)
    return EXIT_FOUND if any(found.findings().values()) else 0


def join(
    order_side: dict[str, Any], mail_side: dict[str, Any], *, since: str, until: str
) -> Reconciled:
    """Join what both sides say of a range of time."""
    orders_in = {name: set(ids) for name, ids in order_side["order_ids"].items()}
    ours = set().union(*orders_in.values())
    mailed = set().union(*mail_side["order_ids"].values())
    due = ours - orders_in["on_their_way"]
    return Reconciled(
        since=since,
        until=until,
        orders=order_side["orders"],
        with_event=order_side["with_event"],
        on_their_way=order_side["on_their_way"],
        outside_retention=order_side["outside_retention"],
        waiting=len(mail_side["waiting"]),
        mails=mail_side["states"],
        dead_letters=mail_side["dead_letters"],
        missing=sorted((due - mailed).difference(mail_side["waiting"]).union(mail_side["missing"])),
        ghosts=sorted((mailed - ours).union(order_side["ghosts"])),
        doubles=sorted(mail_side["doubles"]),
        unread=sorted(mail_side["unread"]),
    )


def _print_table(found: Reconciled) -> None:
    _print(f"orders placed from {found.since} to {found.until}\n")
    counts = {
        "orders": found.orders,
        "event in topic": found.with_event,
        "on their way": found.on_their_way,
        "outside retention": found.outside_retention,
        "waiting in topic": found.waiting,
        **{f"mails {state}": count for state, count in found.mails.items()},
        "dead letters": found.dead_letters,
    }
    counts |= {name: len(ids) for name, ids in found.findings().items()}
    for name, count in counts.items():
        _print(f"{name:>18}  {count:>8}")
    for name, ids in found.findings().items():
        for order_id in ids[:SHOWN_IDS]:
            _print(f"{name}  {_printable(order_id)}")
        if len(ids) > SHOWN_IDS:
            _print(f"{name}  and {len(ids) - SHOWN_IDS} more, see --json")


def _printable(text: str) -> str:
    # Whoever may write to the topic must not write to the terminal.
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def _print(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def _command(state: Path, name: str, named: str | None) -> ServiceCommand:
    """Return a service's command as it was named, else that of the pair that runs."""
    if named:
        return ServiceCommand(shlex.split(named))
    ask(state, "ps")
    return ServiceCommand([str(state.resolve() / "bin" / name)])


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    places = argparse.ArgumentParser(add_help=False)
    places.add_argument("--state", type=Path, default=KEPT, help="of the pair that runs")
    places.add_argument("--order-service", metavar="COMMAND", help="else that of --state")
    both = argparse.ArgumentParser(add_help=False, parents=[places])
    both.add_argument("--mail-service", metavar="COMMAND", help="else that of --state")
    scripts = argparse.ArgumentParser(add_help=False)
    scripts.add_argument("--json", action="store_true", dest="as_json", help="for scripts")

    parser = argparse.ArgumentParser(prog="python -m deploy.pair")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    order = verbs.add_parser("order", parents=[both], help="an order's way to its mail")
    order.add_argument("order_id", metavar="ID")
    orders = verbs.add_parser("orders", parents=[places, scripts], help="place N orders")
    orders.add_argument("--api", metavar="URL", help="else that of the pair that runs")
    orders.add_argument("count", type=_count, metavar="N")
    help_ = "name orders without mail, mails without order, and doubles"
    reconcile = verbs.add_parser("reconcile", parents=[both, scripts], help=help_)
    reconcile.add_argument("--from", type=_moment, dest="since", metavar="TIME")
    reconcile.add_argument("--to", type=_moment, dest="until", metavar="TIME", help="else now")

    options = parser.parse_args(arguments)
    if options.verb == "reconcile":
        options.until = options.until or datetime.now(UTC)
        options.since = options.since or options.until - DEFAULT_RANGE
        if not options.since < options.until:
            reconcile.error("--from must be before --to")
    return options


def _count(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text}: write how many, such as 20")
    return int(text)


def _moment(text: str) -> datetime:
    try:
        moment = datetime.fromisoformat(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    if moment.tzinfo is None:
        raise argparse.ArgumentTypeError(f"{text} names no offset from UTC, such as Z or +09:00")
    return moment


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
