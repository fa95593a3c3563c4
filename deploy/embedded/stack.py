"""Parts and jobs in their order: started together, kept running, stopped."""

import contextlib
import enum
import threading
import time
from collections.abc import Collection
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

from deploy.embedded.errors import StackError, StoppingError, WrongUsageError
from deploy.embedded.part import Attempt, Job, Part
from deploy.embedded.state import State

WATCH_SECONDS = 0.2
FIRST_BACKOFF_SECONDS = 0.5
LONGEST_BACKOFF_SECONDS = 10.0
# A part that lived this long had recovered: its next death is a new one.
RECOVERED_SECONDS = 30.0
KEEPER_END_SECONDS = 10.0


class Phase(enum.Enum):
    """Where a part or job is on its way."""

    WAITING = "waiting"
    STARTING = "starting"
    READY = "ready"
    DONE = "done"
    FAILED = "failed"
    DIED = "died"
    STOPPED = "stopped"


class Watcher(Protocol):
    """Whoever shows what becomes of parts and jobs; called from several threads."""

    def changed(self, name: str, phase: Phase, detail: str) -> None:
        """Take note that this one is in this phase now."""


@dataclass
class Entry:
    """A part or job as the stack keeps it."""

    item: Part | Job
    after: Collection[str]
    phase: Phase = Phase.STOPPED
    unwanted: threading.Event = field(default_factory=threading.Event)
    keeper: threading.Thread | None = None

    @property
    def is_up(self) -> bool:
        """Whether there is nothing to start: it is done, or somebody keeps it running."""
        return self.phase is Phase.DONE or self.keeper is not None


class Stack:
    """All parts and jobs of one state directory, which is locked inside the `with` block."""

    def __init__(self, root: Path, watcher: Watcher | None = None) -> None:
        """Describe an empty stack; nothing is touched before the `with` block."""
        self.state = State(root.resolve())
        self._watcher = watcher
        self._entries: dict[str, Entry] = {}
        self._cleanup = contextlib.ExitStack()

    def __enter__(self) -> Self:
        """Lock the state directory and end what a killed run left in it."""
        self._cleanup.enter_context(self.state.hold())
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Stop everything in reverse order, whatever fails meanwhile."""
        for name in self._entries:
            self._cleanup.callback(self.stop, name)
        self._cleanup.close()

    @property
    def phases(self) -> dict[str, Phase]:
        """Where everything is, in the order in which it was added."""
        # A list at once: another thread may be adding.
        return {name: entry.phase for name, entry in list(self._entries.items())}

    @property
    def parts(self) -> list[Part]:
        """All parts, in the order in which they were added."""
        items = [entry.item for entry in list(self._entries.values())]
        return [item for item in items if isinstance(item, Part)]

    def part(self, name: str) -> Part:
        """Return the part of this name."""
        item = self._entries[name].item if name in self._entries else None
        if not isinstance(item, Part):
            there_are = ", ".join(part.name for part in self.parts)
            message = f"there is no part {name}; there are {there_are}"
            raise WrongUsageError(message)
        return item

    def add(self, item: Part | Job, after: Collection[str] = ()) -> None:
        """Add a part or job that needs those named before it; `start` starts it."""
        if unknown := set(after) - set(self._entries):
            message = f"{item.name} needs {', '.join(sorted(unknown))}, which are not there"
            raise StackError(message)
        self._entries[item.name] = Entry(item, after)

    def start(self, *names: str) -> None:
        """Bring up those named, or all, side by side where they are independent; all or none."""
        entries = [self._entries[name] for name in names or self._entries]
        entries = [entry for entry in entries if not entry.is_up]
        for entry in entries:
            entry.unwanted.clear()
            self._change(entry, Phase.WAITING)
        try:
            self._start_together(entries)
        except BaseException:
            for entry in reversed(entries):
                self.stop(entry.item.name)
            raise

    def stop(self, name: str) -> None:
        """Stop this one, and leave it stopped."""
        entry = self._entries[name]
        entry.unwanted.set()
        if entry.keeper:
            entry.keeper.join(KEEPER_END_SECONDS)
            entry.keeper = None
        if isinstance(entry.item, Part):
            entry.item.stop()
        if entry.phase not in {Phase.STOPPED, Phase.FAILED}:
            self._change(entry, Phase.STOPPED)

    def kill(self, name: str, *, restart: bool = True) -> None:
        """Kill a part like a crash would; it comes back unless `restart` is off."""
        entry, part = self._entries[name], self.part(name)
        if not restart:
            entry.unwanted.set()
        self._change(entry, Phase.DIED, "killed")
        part.kill()
        if not restart:
            self.stop(name)

    def give_up(self) -> None:
        """Let starts under way fail and parts that die stay dead, because the end has come."""
        for entry in list(self._entries.values()):
            entry.unwanted.set()

    def wait_ready(self, name: str, seconds: float) -> None:
        """Wait until a part that died is back."""
        deadline = time.monotonic() + seconds
        while self._entries[name].phase is not Phase.READY:
            if time.monotonic() > deadline:
                raise self.part(name).command.failure(f"{name} is not back after {seconds:g} s")
            time.sleep(WATCH_SECONDS)

    def _start_together(self, entries: list[Entry]) -> None:
        futures: dict[str, Future[None]] = {}
        with ThreadPoolExecutor(max_workers=len(entries) or 1) as pool:
            try:
                for entry in entries:
                    needed = [futures[name] for name in entry.after if name in futures]
                    futures[entry.item.name] = pool.submit(self._bring_up_after, needed, entry)
                for future in wait(futures.values(), return_when=FIRST_EXCEPTION).done:
                    future.result()
            except BaseException:
                for entry in entries:
                    entry.unwanted.set()
                raise

    def _bring_up_after(self, needed: list[Future[None]], entry: Entry) -> None:
        for future in needed:
            future.result()
        self._bring_up(entry)
        if isinstance(entry.item, Part):
            keep = partial(self._keep, entry, entry.item)
            entry.keeper = threading.Thread(target=keep, name=entry.item.name, daemon=True)
            entry.keeper.start()

    def _bring_up(self, entry: Entry) -> None:
        say = partial(self._change, entry, Phase.STARTING)
        try:
            entry.item.bring_up(Attempt(entry.unwanted, say))
        except StoppingError:
            raise
        except (StackError, OSError) as error:
            if isinstance(entry.item, Part):
                entry.item.kill()
            self._change(entry, Phase.FAILED, str(error))
            raise
        self._change(entry, Phase.READY if isinstance(entry.item, Part) else Phase.DONE)

    def _keep(self, entry: Entry, part: Part) -> None:
        """Restart the part whenever it dies, at growing intervals, until it is unwanted."""
        backoff_seconds = FIRST_BACKOFF_SECONDS
        up_since = time.monotonic()
        while not entry.unwanted.wait(WATCH_SECONDS):
            if part.is_running:
                continue
            if time.monotonic() - up_since > RECOVERED_SECONDS:
                backoff_seconds = FIRST_BACKOFF_SECONDS
            if entry.phase is Phase.READY:
                self._change(entry, Phase.DIED, f"exit code {part.exit_code}")
            if entry.unwanted.wait(backoff_seconds):
                return
            backoff_seconds = min(2 * backoff_seconds, LONGEST_BACKOFF_SECONDS)
            with contextlib.suppress(StackError, OSError):
                self._bring_up(entry)
            up_since = time.monotonic()

    def _change(self, entry: Entry, phase: Phase, detail: str = "") -> None:
        entry.phase = phase
        if self._watcher:
            self._watcher.changed(entry.item.name, phase, detail)
