"""What a second terminal sources to work on the running pair."""

import shlex
from collections.abc import Mapping
from pathlib import Path

from deploy.embedded.infrastructure import Addresses
from deploy.embedded.services import MAIL_SERVICE, ORDER_SERVICE, Pair


def write_shell(root: Path, pair: Pair, addresses: Addresses) -> Path:
    """Write the file, and both services' commands with their environment filled in."""
    directory = root / "bin"
    directory.mkdir(mode=0o700, exist_ok=True)
    _write_command(directory, ORDER_SERVICE, pair.order_environment)
    _write_command(directory, MAIL_SERVICE, pair.mail_environment)
    variables = {
        "API": pair.api_url,
        "INBOX": addresses.inbox_url,
        "KAFKA_BOOTSTRAP_SERVERS": addresses.kafka_bootstrap_servers,
    }
    lines = [f"export PATH={shlex.quote(str(directory))}:$PATH"]
    lines += [f"export {name}={shlex.quote(value)}" for name, value in variables.items()]
    path = root / "shell"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def _write_command(directory: Path, program: Path, environment: Mapping[str, str]) -> None:
    variables = shlex.join(f"{name}={value}" for name, value in environment.items())
    command = directory / program.name
    command.touch(mode=0o700)
    command.write_text(
        f'#!/bin/sh\nexec env -i {variables} {shlex.quote(str(program))} "$@"\n', encoding="utf-8"
    )
