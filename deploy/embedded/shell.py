"""What a second terminal finds of the running pair: commands, addresses, a token."""

import os
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import NoReturn

from deploy.embedded.console import TOOLS
from deploy.embedded.infrastructure import Addresses
from deploy.embedded.jars import REPOSITORY
from deploy.embedded.remote import ask
from deploy.embedded.services import MAIL_SERVICE, ORDER_SERVICE, Pair

USER = "me"
# How the last command of a person's terminal ended is no failure of the terminal.
ENTER = '. "$0" && if [ -t 0 ]; then "$SHELL"; exit 0; else exec "$SHELL"; fi'

GREETING = """\
Commands: order-service, mail-service, stack, kafka-topics, kafka-console-producer,
kafka-console-consumer, kafka-consumer-groups. Environment: API, INBOX,
KAFKA_BOOTSTRAP_SERVERS, TOKEN. `exit` leaves, and the pair stays up.
"""


def addresses_of(pair: Pair, addresses: Addresses) -> dict[str, str]:
    """Return where the pair answers, as a second terminal has it in its environment."""
    return {
        "API": pair.api_url,
        "INBOX": addresses.inbox_url,
        "KAFKA_BOOTSTRAP_SERVERS": addresses.kafka_bootstrap_servers,
    }


def write_shell(root: Path, pair: Pair, addresses: Addresses) -> Path:
    """Write the file to source, and each command with its environment filled in."""
    directory = root.resolve() / "bin"
    directory.mkdir(mode=0o700, exist_ok=True)
    _write_service(directory, ORDER_SERVICE, pair.order_environment)
    _write_service(directory, MAIL_SERVICE, pair.mail_environment)
    _write_module(directory, "stack", "remote", "--state", str(root.resolve()))
    for name in TOOLS:
        servers = addresses.kafka_bootstrap_servers
        _write_module(directory, name, "console", str(root.resolve()), servers, name)
    lines = [f"export PATH={shlex.quote(str(directory))}:$PATH"]
    lines += [
        f"export {name}={shlex.quote(value)}"
        for name, value in addresses_of(pair, addresses).items()
    ]
    lines += [f"TOKEN=$(order-service token --user {USER}) && export TOKEN"]
    path = root / "shell"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def open_shell(root: Path) -> NoReturn:
    """Become a shell on the running pair; raise NotRunningError when there is none."""
    ask(root, "ps")
    sys.stderr.write(GREETING)
    sys.stderr.flush()
    environment = {**os.environ, "SHELL": os.environ.get("SHELL") or "sh"}
    path = str(root.resolve() / "shell")
    os.execvpe("sh", ["sh", "-c", ENTER, path], environment)  # noqa: S606 - it takes our place


def _write_service(directory: Path, program: Path, environment: Mapping[str, str]) -> None:
    variables = [f"{name}={value}" for name, value in environment.items()]
    _write_command(directory / program.name, "env", "-i", *variables, str(program))


def _write_module(directory: Path, name: str, module: str, *arguments: str) -> None:
    # Wherever the terminal is, its directory is none of our modules'.
    python = ("env", f"PYTHONPATH={REPOSITORY}", sys.executable, "-P")
    _write_command(directory / name, *python, "-m", f"deploy.embedded.{module}", *arguments)


def _write_command(path: Path, *argv: str) -> None:
    path.touch(mode=0o700)
    path.write_text(f'#!/bin/sh\nexec {shlex.join(argv)} "$@"\n', encoding="utf-8")
