"""`run` and `demo`: the stack, both services, one sample order shown on its way to its mail."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from deploy.embedded import signals
from deploy.embedded.control import Control
from deploy.embedded.infrastructure import Addresses, add_infrastructure
from deploy.embedded.journey import Journey, travel
from deploy.embedded.mailbox import Mailbox
from deploy.embedded.ports import Ports
from deploy.embedded.screen import Screen
from deploy.embedded.services import Pair, add_pair, replica
from deploy.embedded.shell import addresses_of, write_shell
from deploy.embedded.stack import Stack

MAIL_REPLICAS = 2


@dataclass(frozen=True)
class Up:
    """The pair while it is up, and the sample order it began with."""

    stack: Stack
    pair: Pair
    addresses: Addresses
    journey: Journey


def run(root: Path, ports: Ports) -> int:
    """Keep the pair up until a signal ends it; its state is there again at the next run."""
    console = Console(highlight=False, soft_wrap=True)
    with suppress(signals.InterruptedBySignal), _up(root, ports, console) as up:
        shell = write_shell(root, up.pair, up.addresses)
        _show(console, up.journey)
        console.print(f"\n  API     {up.pair.api_url}")
        console.print(f"  inbox   {up.addresses.inbox_url}")
        console.print(f"  Kafka   {up.addresses.kafka_bootstrap_servers}, topic order-created")
        console.print(f"  state   {root}, logs in {root / 'logs'}")
        console.print(f"  shell   make shell, or . {shell}, in a second terminal")
        control = Control(up.stack, ports, up.pair, addresses_of(up.pair, up.addresses))
        with control.listening():
            console.print("\nUp until Ctrl-C.")
            signal.pause()
    return 0


def demo(root: Path) -> int:
    """Bring the pair up, show one order's way, and stop."""
    console = Console(highlight=False, soft_wrap=True)
    # Other ports than the defaults, so that it can be shown beside a pair that runs.
    with _up(root, Ports(use_defaults=False), console) as up:
        _show(console, up.journey)
    return 0


@contextmanager
def _up(root: Path, ports: Ports, console: Console) -> Iterator[Up]:
    screen = Screen(console)
    with Stack(root, screen) as stack, signals.raised():
        addresses = add_infrastructure(stack, ports)
        pair = add_pair(stack, ports, addresses, mail_replicas=MAIL_REPLICAS)
        with screen:
            stack.start()
        replicas = [replica(number) for number in range(1, MAIL_REPLICAS + 1)]
        pids = {str(stack.part(name).pid): name for name in replicas}
        yield Up(stack, pair, addresses, travel(pair, Mailbox(addresses.inbox_url), pids))


def _show(console: Console, journey: Journey) -> None:
    console.print("\nA sample order, in milliseconds after its request:\n")
    for hop in journey.hops:
        console.print(f"  {hop.after(journey.requested_at)}  {escape(hop.what)}")
    console.print("\nIts mail:\n")
    for line in journey.mail_text.splitlines():
        console.print(f"  │ {escape(line)}")
