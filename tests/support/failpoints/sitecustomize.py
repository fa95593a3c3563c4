"""Failpoints: what FAILPOINTS names is done where the services reach it, and no hook is in them.

    FAILPOINTS="relay.after_ack=kill@3;http.before_commit=sleep:2000" FAILPOINT_LOG=hits.jsonl

Python imports this file at its start when its folder is on PYTHONPATH; `support/failpoint.py` sees
to that. An action is `kill` or `stop` (SIGKILL, SIGSTOP to itself), `exit:CODE` (nothing is
flushed), `raise:module.Exception` or `sleep:MILLISECONDS`; `@3` is the third hit of a process only.
Whatever would make a failpoint one that never fires ends the process with 2.
"""

import functools
import importlib
import inspect
import itertools
import json
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, NoReturn

EXIT_USAGE = 2
STDERR = 2
MILLISECONDS = 1000
DISARMED = ".disarmed"
ENTRY = re.compile(r"([^=]+)=([^@]+)(?:@([1-9]\d*))?")


@dataclass(frozen=True, slots=True)
class Seam:
    """A function, and whether a failpoint is before its call or after its return.

    A call counts as a hit when `counts` says so: of the arguments before, of the result after.
    """

    module: str
    function: str
    when: Literal["before", "after"]
    counts: Callable[..., bool] = lambda *_, **__: True


def _is_sent(verdict: object) -> bool:
    return type(verdict).__name__ == "Sent"


CATALOGUE = {
    "http.before_tx": Seam("order_service.orders", "_place", "before"),
    "http.before_commit": Seam("order_service.transaction", "Transaction.commit", "before"),
    "http.after_commit": Seam("order_service.transaction", "Transaction.commit", "after"),
    "relay.after_claim": Seam("order_service.outbox", "select_init", "after", bool),
    "relay.before_produce": Seam(
        "order_service.kafka", "Publisher.publish", "before", lambda _, records: bool(records)
    ),
    "relay.after_produce": Seam("order_service.kafka", "Publisher._produce", "after"),
    "relay.on_report": Seam("order_service.kafka", "Publisher._note_report", "before"),
    "relay.after_ack": Seam("order_service.outbox", "mark_published", "before"),
    "relay.after_mark": Seam("order_service.outbox", "mark_published", "after"),
    "rb.after_poll": Seam(
        "order_service.kafka", "Reader.read", "after", lambda seen: bool(seen.next_offsets)
    ),
    "rb.after_complete": Seam("order_service.outbox", "complete", "after"),
    "rb.after_commit": Seam("order_service.readback", "ReadBack._complete", "after"),
    "sweep.before_reset": Seam("order_service.outbox", "republish_lost", "before"),
    "m.after_poll": Seam("mail_service.kafka", "Member.read", "after", bool),
    "m.after_claim": Seam(
        "mail_service.ledger", "take_in", "after", lambda taken_in: bool(taken_in.claimed)
    ),
    "m.after_intent": Seam(
        "mail_service.senders", "Senders.hand_out", "before", lambda _, mails, **__: bool(mails)
    ),
    "m.before_offset_commit": Seam("mail_service.kafka", "Member.commit", "before"),
    "m.before_dialogue": Seam("mail_service.smtp", "_Session.envelope", "before"),
    "m.after_rcpt": Seam("mail_service.smtp", "_dot_stuffed", "before"),
    "m.before_dot": Seam("mail_service.lease", "Lease.is_held", "before"),
    "m.after_lease_check": Seam("mail_service.lease", "Lease.is_held", "after", bool),
    "m.after_250": Seam("mail_service.judge", "Judge.judge", "after", _is_sent),
    "m.after_sent": Seam(
        "mail_service.senders",
        "Senders._release",
        "before",
        lambda _, outcomes: any(_is_sent(outcome.verdict) for outcome in outcomes),
    ),
    "m.after_retry_row": Seam("mail_service.ledger", "record_open", "after"),
    "m.drain": Seam("mail_service.senders", "Senders.drain", "before"),
}


class Failpoint:
    """A seam, and what is done there."""

    def __init__(self, name: str, action: str, hit: int | None, journal: Path) -> None:
        self.seam = CATALOGUE[name]
        self._name = name
        self._action = action
        self._act = _act(name, action)
        self._hit = hit
        self._journal = journal
        self._hits = itertools.count(1)

    def wrap(self, module: ModuleType) -> None:
        """Put itself around the function; a module without it ends the process."""
        *classes, name = self.seam.function.split(".")
        try:
            owner = functools.reduce(getattr, classes, module)
            function = vars(owner)[name]
        except (AttributeError, KeyError):
            _end(f"{self._name}: {self.seam.module} has no {self.seam.function}")
        if not inspect.isfunction(function) or _is_lazy(inspect.unwrap(function)):
            _end(f"{self._name}: {self.seam.function} is not a plain function")

        @functools.wraps(function)
        def wrapped(*arguments: Any, **named: Any) -> Any:
            if self.seam.when == "before":
                self._reach(*arguments, **named)
            result = function(*arguments, **named)
            if self.seam.when == "after":
                self._reach(result)
            return result

        setattr(owner, name, wrapped)

    def _reach(self, *arguments: Any, **named: Any) -> None:
        try:
            if not self.seam.counts(*arguments, **named):
                return
            hit = next(self._hits)
            if self._hit not in (None, hit) or Path(f"{self._journal}{DISARMED}").exists():
                return
            self._note(hit)
        except Exception as error:  # noqa: BLE001 - it must not look like an error of the service
            _end(f"{self._name}: {error!r}")
        self._act()

    def _note(self, hit: int) -> None:
        line = {
            "name": self._name,
            "action": self._action,
            "pid": os.getpid(),
            "hit": hit,
            "at": time.time(),
            "monotonic": time.monotonic(),
        }
        with self._journal.open("ab", buffering=0) as journal:
            journal.write(json.dumps(line).encode() + b"\n")
            os.fsync(journal)


class Finder:
    """Finds the modules that have seams, and wraps these before any importer sees the module."""

    def __init__(self, failpoints: Sequence[Failpoint]) -> None:
        self._failpoints = failpoints

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, _target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Leave all other modules to the other finders."""
        failpoints = [each for each in self._failpoints if each.seam.module == name]
        if not failpoints:
            return None
        spec = PathFinder.find_spec(name, path)
        if spec is None or spec.loader is None:
            _end(f"no module {name} on the path")
        execute = spec.loader.exec_module

        def execute_and_wrap(module: ModuleType) -> None:
            execute(module)
            for failpoint in failpoints:
                failpoint.wrap(module)

        spec.loader.exec_module = execute_and_wrap  # type: ignore[method-assign]
        return spec


def install(environment: Mapping[str, str]) -> None:
    """Arm what the environment names."""
    if not environment.get("FAILPOINTS"):
        return
    if environment.get("APP_ENV") == "production":
        _end("never in production")
    if not environment.get("FAILPOINT_LOG"):
        _end("FAILPOINT_LOG names no file")
    journal = Path(environment["FAILPOINT_LOG"])
    journal.touch()
    failpoints = []
    for entry in environment["FAILPOINTS"].split(";"):
        parts = ENTRY.fullmatch(entry)
        if parts is None:
            _end(f"{entry!r} is not NAME=ACTION[@HIT]")
        name, action, hit = parts.groups()
        if name not in CATALOGUE:
            _end(f"{name} is none of {', '.join(CATALOGUE)}")
        failpoints.append(Failpoint(name, action, int(hit) if hit else None, journal))
    sys.meta_path.insert(0, Finder(failpoints))


def _end(message: str) -> NoReturn:
    os.write(STDERR, f"failpoints: {message}\n".encode())
    os._exit(EXIT_USAGE)


def _act(name: str, action: str) -> Callable[[], object]:
    kind, _, value = action.partition(":")
    match kind:
        case "kill" | "stop" if not value:
            number = signal.SIGKILL if kind == "kill" else signal.SIGSTOP
            # To this very thread: another one would let it run on for a moment.
            return lambda: signal.pthread_kill(threading.get_ident(), number)
        case "exit" if value.isdecimal():
            return lambda: os._exit(int(value))
        case "sleep" if value.isdecimal():
            return lambda: time.sleep(int(value) / MILLISECONDS)
        case "raise" if "." in value:
            return lambda: _raise(name, value)
    _end(f"{name}: {action} is none of kill, stop, exit:N, sleep:MS, raise:MODULE.EXCEPTION")


def _raise(name: str, dotted: str) -> NoReturn:
    module, _, exception = dotted.rpartition(".")
    try:
        error = getattr(importlib.import_module(module), exception)(f"failpoint {name}")
        is_error = isinstance(error, BaseException)
    except Exception as problem:  # noqa: BLE001 - see _reach
        _end(f"{name}: {dotted}: {problem!r}")
    if not is_error:
        _end(f"{name}: {dotted} is no exception")
    raise error


def _is_lazy(function: object) -> bool:
    """Whether the body runs only after the call has returned."""
    return inspect.isgeneratorfunction(function) or inspect.iscoroutinefunction(function)


try:
    install(os.environ)
except Exception as error:  # noqa: BLE001 - `site` would go on without us
    _end(repr(error))
