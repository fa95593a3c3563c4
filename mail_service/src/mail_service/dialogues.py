"""Many dialogues in one thread: a thread for each would spend half its time handing over.

A dialogue is a generator. It yields what it waits for, and goes on when that has come.
"""

import queue
import selectors
import socket
import threading
import time
from collections.abc import Callable, Generator, Iterable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeVar

READ, WRITE = selectors.EVENT_READ, selectors.EVENT_WRITE
# A deadline is kept to within twice this.
TICK_SECONDS = 0.25
WAKING_BYTES = 4_096
LATE = "it took too long"


@dataclass(frozen=True, slots=True)
class Wait:
    """Until the socket can be read or written; after the deadline TimeoutError is thrown in.

    `deadline` is of the monotonic clock.
    """

    on: socket.socket
    events: int
    deadline: float


@dataclass(frozen=True, slots=True)
class Aside:
    """Until a call that blocks has returned or raised, in a thread of its own."""

    call: Callable[[], Any]


T = TypeVar("T")
Steps = Generator[Wait | Aside, Any, T]


def finish(steps: Steps[T]) -> T:
    """Take all steps of one dialogue in the calling thread, and return its end."""
    value, error = None, None
    try:
        while True:
            wanted = steps.send(value) if error is None else steps.throw(error)
            value, error = _come(wanted)
    except StopIteration as end:
        returned: T = end.value
        return returned


def _come(wanted: Wait | Aside) -> tuple[Any, Exception | None]:
    """Return what a call returned or raised, or nothing or TimeoutError after a wait."""
    if isinstance(wanted, Wait):
        with selectors.DefaultSelector() as selector:
            selector.register(wanted.on, wanted.events)
            is_ready = selector.select(max(0.0, wanted.deadline - time.monotonic()))
        return None, None if is_ready else TimeoutError(LATE)
    try:
        return wanted.call(), None
    except Exception as error:  # noqa: BLE001 - it is the dialogue's to handle
        return None, error


class Dialogues:
    """The thread that takes the steps of all dialogues."""

    def __init__(self) -> None:
        self._selector = selectors.DefaultSelector()
        self._woken, self._waker = socket.socketpair()
        self._woken.setblocking(False)
        self._waker.setblocking(False)
        self._selector.register(self._woken, READ)
        self._ready: queue.SimpleQueue[tuple[Steps[None], Any, Exception | None]] = (
            queue.SimpleQueue()
        )
        self._waiting: dict[Any, tuple[Steps[None], float]] = {}
        self._under_way: set[Steps[None]] = set()
        self._end_at: float | None = None
        self._is_asleep = True
        self._timed_out_at = float("-inf")
        self.turned_at = float("inf")
        self._thread = threading.Thread(target=self._run, name="dialogues", daemon=True)

    def start(self) -> None:
        """Begin to take steps."""
        self._thread.start()

    def begin(self, dialogues: Iterable[Steps[None]]) -> None:
        """Have these held, from any thread; what one of them raises ends the thread."""
        for steps in dialogues:
            self._ready.put((steps, None, None))
        self._wake()

    def stop(self, *, patience_seconds: float) -> None:
        """End the thread once all dialogues have ended, or after a while."""
        self._end_at = time.monotonic() + patience_seconds
        self._wake()
        self._thread.join(patience_seconds + TICK_SECONDS)

    def _wake(self) -> None:
        # Asked after what is new was put there: who is awake looks once more before it sleeps.
        if self._is_asleep:
            # Full, it will wake; closed, it has ended.
            with suppress(OSError):
                self._waker.send(b"\0")

    def _run(self) -> None:
        with self._selector, self._woken, self._waker:
            while not self._has_ended():
                self._take_turns()

    def _has_ended(self) -> bool:
        if self._end_at is None:
            return False
        return time.monotonic() > self._end_at or (not self._under_way and self._ready.empty())

    def _take_turns(self) -> None:
        ready = self._selector.select(TICK_SECONDS if self._ready.empty() else 0)
        self._is_asleep = False
        # Before any step: what comes while others take theirs is not late.
        self.turned_at = now = time.monotonic()
        for key, _ in ready:
            if key.fileobj is self._woken:
                self._woken.recv(WAKING_BYTES)
            elif waiting := self._waiting.pop(key.fileobj, None):
                self._step(waiting[0])
            else:
                # Closed by the other side while nobody spoke: whoever speaks next will hear of it.
                self._selector.unregister(key.fileobj)
        if now - self._timed_out_at > TICK_SECONDS:
            self._time_out(now)
            self._timed_out_at = now
        # One, then whoever waits for an answer again: what is new may take long to begin.
        if not self._ready.empty():
            self._step(*self._ready.get_nowait())
        # From here on whoever has something new wakes this thread: it sleeps with what it sees now.
        self._is_asleep = True

    def _step(self, steps: Steps[None], value: Any = None, error: Exception | None = None) -> None:
        self._under_way.add(steps)
        try:
            wanted = steps.send(value) if error is None else steps.throw(error)
        except StopIteration:
            self._under_way.discard(steps)
            return
        if isinstance(wanted, Wait):
            self._waiting[wanted.on] = steps, wanted.deadline
            self._watch(wanted.on, wanted.events)
        else:
            threading.Thread(target=self._call, args=(steps, wanted), daemon=True).start()

    def _call(self, steps: Steps[None], wanted: Aside) -> None:
        self._ready.put((steps, *_come(wanted)))
        self._wake()

    def _watch(self, on: socket.socket, events: int) -> None:
        """Have the selector look at a socket; it goes on doing so, which saves two calls a wait."""
        key = self._selector.get_map().get(on)
        if key is not None and key.fileobj is not on:
            # That of a socket which was closed: the number was given out again.
            self._selector.unregister(on)
            key = None
        if key is None:
            self._selector.register(on, events)
        elif key.events != events:
            self._selector.modify(on, events)

    def _time_out(self, now: float) -> None:
        late = [on for on, (_, deadline) in self._waiting.items() if deadline <= now]
        for on in late:
            steps, _ = self._waiting.pop(on)
            self._step(steps, error=TimeoutError(LATE))
