"""A service's command, run to its end from outside."""

import json
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from deploy.embedded.errors import StackError

COMMAND_SECONDS = 30.0
# It did what it was asked, and found something to look at, or nothing at all.
FOUND = 1


@dataclass(frozen=True)
class ServiceCommand:
    """How a service's command is called, with its environment unless ours will do."""

    argv: Sequence[str]
    environment: Mapping[str, str] | None = None

    def print_out(self, *arguments: str) -> str:
        """Return what it prints; raise StackError when it fails."""
        return self._run(arguments, [0], COMMAND_SECONDS)

    def ask(self, *arguments: str, seconds: float = COMMAND_SECONDS) -> Any:
        """Return the JSON it prints; raise StackError when it fails or prints something else."""
        printed = self._run(arguments, [0, FOUND], seconds)
        try:
            return json.loads(printed)
        except ValueError as error:
            raise StackError(f"{self._line(arguments)}: no JSON, but {printed[:100]!r}") from error

    def _run(self, arguments: Sequence[str], good: Sequence[int], seconds: float) -> str:
        try:
            done = subprocess.run(
                [*self.argv, *arguments],
                env=self.environment,
                capture_output=True,
                encoding="utf-8",
                timeout=seconds,
                check=False,
            )
        except OSError as error:
            raise StackError(f"cannot execute {self.argv[0]}: {error}") from error
        except subprocess.TimeoutExpired as error:
            raise StackError(f"{self._line(arguments)}: no end within {seconds:g} s") from error
        # Whoever fails with 1 has said why, and printed nothing.
        if done.returncode not in good or (done.returncode == FOUND and not done.stdout):
            raise StackError(f"{self._line(arguments)}: {done.stderr.strip()}")
        return done.stdout

    def _line(self, arguments: Sequence[str]) -> str:
        return " ".join([*self.argv, *arguments])
