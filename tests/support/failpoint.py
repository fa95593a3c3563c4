"""The test's side of failpoints: what a service's environment needs, and what was hit.

    environment = armed(pair.relay_environment, "relay.after_ack=kill@3", journal=journal)

`failpoints/sitecustomize.py` says what there is and what can be done there.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tests.support.failpoints.sitecustomize import DISARMED

FOLDER = Path(__file__).parent / "failpoints"


@dataclass(frozen=True, slots=True)
class Hit:
    """A failpoint that acted: in which process, and at which of that process's hits.

    `at` is Unix time and `monotonic` the system's clock, both in seconds and before the action.
    """

    name: str
    action: str
    pid: int
    hit: int
    at: float
    monotonic: float


def armed(environment: Mapping[str, str], *failpoints: str, journal: Path) -> dict[str, str]:
    """Return an environment in which a Python process has these failpoints, and so its children.

    Each process counts its hits itself, from 1; so does one that is started in another's place.
    """
    path = environment.get("PYTHONPATH")
    return {
        **environment,
        "FAILPOINTS": ";".join(failpoints),
        "FAILPOINT_LOG": str(journal.absolute()),
        "PYTHONPATH": f"{FOLDER}:{path}" if path else str(FOLDER),
    }


def disarm(journal: Path) -> None:
    """Let nothing act any more in the processes that write this journal, nor in later ones."""
    Path(f"{journal}{DISARMED}").touch()


def hits(journal: Path) -> list[Hit]:
    """Return what acted so far, in the order in which it did."""
    if not journal.exists():
        return []
    whole = journal.read_bytes().rpartition(b"\n")[0]
    return [Hit(**json.loads(line)) for line in whole.splitlines()]
