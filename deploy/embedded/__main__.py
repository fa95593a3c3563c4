"""The command line of the embedded stack: python -m deploy.embedded."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from deploy.embedded import pair
from deploy.embedded.command import with_parts
from deploy.embedded.errors import NotRunningError, StackError
from deploy.embedded.infrastructure import PARTS
from deploy.embedded.ports import Ports
from deploy.embedded.shell import open_shell
from deploy.embedded.state import KEPT, RUN_DIRECTORY, fresh_root

EXIT_FAILED = 1
EXIT_USAGE = 2


def main(arguments: Sequence[str]) -> int:
    """Do what the command line says and return the exit code."""
    options = _parse(arguments)
    try:
        match options.command_name:
            case "run":
                return pair.run(options.state, Ports(use_defaults=not options.free_ports))
            case "shell":
                return open_shell(options.state)
            case "demo":
                with fresh_root(RUN_DIRECTORY) as root:
                    return pair.demo(root)
            case _:
                return _with(options)
    except (StackError, OSError) as error:
        Console(stderr=True, soft_wrap=True).print(str(error), style="red", markup=False)
        return EXIT_USAGE if isinstance(error, NotRunningError) else EXIT_FAILED


def _with(options: argparse.Namespace) -> int:
    if not options.fresh:
        return with_parts(options.state, options.parts, options.command, ports=Ports())
    # Fresh stacks may run side by side, so none of them takes the default ports.
    ports = Ports(use_defaults=False)
    with fresh_root(RUN_DIRECTORY) as root:
        return with_parts(root, options.parts, options.command, ports=ports)


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    # The command's own arguments are none of argparse's business.
    split = list(arguments).index("--") if "--" in arguments else len(arguments)
    ours, command = arguments[:split], arguments[split + 1 :]
    parser = argparse.ArgumentParser(prog="python -m deploy.embedded")
    commands = parser.add_subparsers(dest="command_name", required=True)
    run = commands.add_parser("run", help="the pair, a sample order, and up until Ctrl-C")
    run.add_argument("--state", type=Path, default=KEPT, metavar="DIR")
    run.add_argument("--free-ports", action="store_true", help="take none of the default ports")
    shell = commands.add_parser("shell", help="a second terminal on the pair that runs")
    shell.add_argument("--state", type=Path, default=KEPT, metavar="DIR")
    commands.add_parser("demo", help="the pair on an empty state, a sample order, and the end")
    with_ = commands.add_parser(
        "with",
        help="run a command while some parts are up",
        usage="%(prog)s [--state DIR | --fresh] PART[,PART…] -- COMMAND…",
    )
    state = with_.add_mutually_exclusive_group()
    state.add_argument("--state", type=Path, default=KEPT, metavar="DIR")
    state.add_argument("--fresh", action="store_true", help="empty parts, removed afterwards")
    with_.add_argument("parts", type=_parts, metavar="PART[,PART…]", help=", ".join(PARTS))
    options = parser.parse_args(ours)
    if options.command_name == "with" and not command:
        with_.error("name the command to run after --")
    options.command = command
    return options


def _parts(text: str) -> list[str]:
    names = text.split(",")
    if unknown := set(names) - set(PARTS):
        message = f"{', '.join(sorted(unknown))}: choose from {', '.join(PARTS)}"
        raise argparse.ArgumentTypeError(message)
    return names


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
