"""A TCP proxy that breaks what it carries: between a client and a broker, database or SMTP relay.

    with Proxy(broker_port) as proxy:
        proxy.set(Blackhole())

It runs in a thread of the test process, on 127.0.0.1. Its counts tell whether a fault fired.
"""

import asyncio
import random
import socket
import struct
import threading
from collections.abc import Coroutine, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal, Self

from tests.support.sink import HOST, PORTS

Direction = Literal["up", "down"]

CHUNK_BYTES = 64 * 1024
MAX_PATTERN_BYTES = 1024
SWITCH_SECONDS = 10.0
THROTTLED_SLICES_PER_SECOND = 20
NO_LINGERING = struct.pack("ii", 1, 0)
OPPOSITE: dict[Direction, Direction] = {"up": "down", "down": "up"}


@dataclass(frozen=True, slots=True)
class Pass:
    """Forward everything."""


@dataclass(frozen=True, slots=True)
class Refuse:
    """Do not listen; what is connected is reset."""


@dataclass(frozen=True, slots=True)
class Reset:
    """Reset what is connected now; later connections pass."""


@dataclass(frozen=True, slots=True)
class ResetAfter:
    """Reset each connection when it has carried so many more bytes in one direction."""

    direction: Direction
    size: int


@dataclass(frozen=True, slots=True)
class Blackhole:
    """Accept, swallow what either side sends, its FIN too, and answer nothing."""


@dataclass(frozen=True, slots=True)
class SwallowReplies:
    """Forward up and swallow down; reset after so many bytes swallowed, or so many seconds."""

    reset_after_bytes: int | None = None
    reset_after_seconds: float | None = None


@dataclass(frozen=True, slots=True)
class HalfClose:
    """End one direction by a FIN and swallow what still comes; the other passes."""

    direction: Direction


@dataclass(frozen=True, slots=True)
class Slow:
    """Hold back each chunk, forward it in slices, pause after each; in both directions."""

    delay_seconds: float = 0.0
    slice_bytes: int = CHUNK_BYTES
    pause_seconds: float = 0.0


Mode = Pass | Refuse | Reset | ResetAfter | Blackhole | SwallowReplies | HalfClose | Slow


def throttled(bytes_per_second: int) -> Slow:
    """Return the mode that forwards at most so many bytes a second each way, by connection."""
    size = max(1, bytes_per_second // THROTTLED_SLICES_PER_SECOND)
    return Slow(slice_bytes=size, pause_seconds=size / bytes_per_second)


@dataclass(slots=True)
class Trigger:
    """What `when_sent` waits for, and how often it came."""

    pattern: bytes
    mode: Mode
    times: int
    is_forwarded: bool
    fired: int = 0


class Proxy:
    """Carries connections to a port of 127.0.0.1; `target` may be set later, for new ones.

    Unless told its own port it takes one that no outgoing connection gets while it refuses.
    `carried` and `swallowed` are bytes, `resets` are those of a mode and not those passed on.
    """

    def __init__(self, target: int | None = None, *, port: int | None = None) -> None:
        self.target = target
        self.port = port or 0
        self.mode: Mode = Pass()
        self.triggers: list[Trigger] = []
        self.accepted = self.resets = 0
        self.carried: dict[Direction, int] = {"up": 0, "down": 0}
        self.swallowed: dict[Direction, int] = {"up": 0, "down": 0}
        self._connections: list[_Connection] = []

    def __enter__(self) -> Self:
        """Listen; raise OSError when the port is taken."""
        self._listener = _bind([self.port] if self.port else random.sample(PORTS, len(PORTS)))
        self.port = self._listener.getsockname()[1]
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="proxy", daemon=True)
        self._thread.start()
        self.set(self.mode)
        return self

    def __exit__(self, *_: object) -> None:
        """Close everything; raise what went wrong in the proxy itself."""
        try:
            self._do(self._end())
        finally:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(SWITCH_SECONDS)
            self._listener.close()
            self._loop.close()

    def set(self, mode: Mode) -> None:
        """Change the mode of every connection, and of those to come; on return it is so.

        A connection that has lost bytes is reset then: no TCP stream goes on behind a gap.
        """
        self._do(self._set(mode))

    def when_sent(
        self, pattern: bytes, mode: Mode, *, times: int = 1, is_forwarded: bool = True
    ) -> Trigger:
        """Change the mode of a connection as soon as its client's `pattern` is forwarded, or comes.

        No reply passes in between. The pattern may come in pieces; it has 1024 bytes at most. Where
        it is not forwarded, what came with its end is not either.
        """
        if not 0 < len(pattern) <= MAX_PATTERN_BYTES:
            raise ValueError(f"a pattern has 1 to {MAX_PATTERN_BYTES} bytes")
        trigger = Trigger(pattern, mode, times, is_forwarded)
        self.triggers = [*self.triggers, trigger]
        return trigger

    def _do(self, coroutine: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(SWITCH_SECONDS)

    async def _set(self, mode: Mode) -> None:
        self._accept()
        self.mode = Pass() if isinstance(mode, Reset) else mode
        self._loop.remove_reader(self._listener)
        if isinstance(mode, Refuse):
            self._listener.close()
            # Bound but not listening, it is refused by the kernel and taken by nobody else.
            self._listener = _bind([self.port])
        else:
            self._listener.listen(1024)
            self._loop.add_reader(self._listener, self._accept)
        for connection in self._connections:
            connection.change(mode)
        cut = [each.task for each in self._connections if isinstance(each.mode, Reset)]
        await asyncio.gather(*cut, return_exceptions=True)

    def _accept(self) -> None:
        # The error says that nobody waits, or that we do not listen.
        with suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                self.accepted += 1
                self._connections.append(_Connection(self, client))

    async def _end(self) -> None:
        self._loop.remove_reader(self._listener)
        tasks = [connection.task for connection in self._connections]
        for task in tasks:
            task.cancel()
        for result in await asyncio.gather(*tasks, return_exceptions=True):
            if isinstance(result, Exception):
                raise result


class _Connection:
    """A client and its server; a client that came into a black hole has none."""

    def __init__(self, proxy: Proxy, client: socket.socket) -> None:
        self._proxy = proxy
        self._loop = asyncio.get_running_loop()
        self._senders: dict[Direction, socket.socket] = {"up": _prepared(client)}
        self._has_lost = isinstance(proxy.mode, Blackhole)
        self._is_broken = False
        self._sent = b""
        self._changed = asyncio.Event()
        self._begin(proxy.mode)
        self.task = self._loop.create_task(self._run())
        # Not in a `finally`: a task cancelled before it began never gets there.
        self.task.add_done_callback(self._close)

    def change(self, mode: Mode) -> None:
        """Go on in another mode."""
        if not self.task.done():
            self._begin(mode)
            self._act(Reset() if self._has_lost else mode)

    def _begin(self, mode: Mode) -> None:
        self.mode = mode
        self._since: dict[Direction, int] = {"up": 0, "down": 0}
        self._changed.set()
        self._changed = asyncio.Event()

    def _act(self, mode: Mode) -> None:
        """Do what a mode does once."""
        match mode:
            case Reset() | Refuse():
                self._cut()
            case HalfClose(direction):
                self._finish(direction)
            case SwallowReplies(reset_after_seconds=seconds) if seconds is not None:
                self._loop.call_later(seconds, self._cut_unless, self._changed)

    def _cut_unless(self, changed: asyncio.Event) -> None:
        if not changed.is_set():
            self._cut()

    def _cut(self) -> None:
        self.mode = Reset()
        self.task.cancel()

    def _close(self, _: object) -> None:
        self._changed.set()
        is_cut = isinstance(self.mode, Reset)
        self._proxy.resets += is_cut
        for end in self._senders.values():
            if is_cut or self._is_broken:
                end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, NO_LINGERING)
            end.close()

    async def _run(self) -> None:
        try:
            if not self._has_lost:
                server = self._senders["down"] = _prepared(socket.socket())
                await self._loop.sock_connect(server, (HOST, self._proxy.target or 0))
            self._act(self.mode)
            async with asyncio.TaskGroup() as pumps:
                for direction in self._senders:
                    pumps.create_task(self._pump(direction))
        except* OSError:
            self._is_broken = True

    async def _pump(self, direction: Direction) -> None:
        try:
            await self._carry_all(direction)
        except ConnectionError:
            if not self._is_swallowed(direction):
                raise
        while self._is_swallowed(direction):
            await self._changed.wait()
        self._finish(direction)

    async def _carry_all(self, direction: Direction) -> None:
        while data := await self._loop.sock_recv(self._senders[direction], CHUNK_BYTES):
            # Where there is always more to read, recv never waits: the others have their turn.
            await asyncio.sleep(0)
            trigger = self._triggered(data) if direction == "up" else None
            if trigger:
                self._begin(trigger.mode)
                if trigger.is_forwarded:
                    await self._send(direction, data)
                # Counted first: a client that meets what was done may ask at once.
                trigger.fired += 1
                self._act(trigger.mode)
            else:
                await self._carry(direction, data)

    def _triggered(self, data: bytes) -> Trigger | None:
        sent = self._sent + data
        self._sent = sent[-MAX_PATTERN_BYTES:]
        for trigger in () if self._is_swallowed("up") else self._proxy.triggers:
            new = sent[-(len(data) + len(trigger.pattern) - 1) :]
            if trigger.fired < trigger.times and trigger.pattern in new:
                return trigger
        return None

    def _is_swallowed(self, direction: Direction) -> bool:
        match self.mode:
            case SwallowReplies():
                return direction == "down"
            case HalfClose(ended):
                return direction == ended
        return isinstance(self.mode, Blackhole | Reset | Refuse)

    async def _carry(self, direction: Direction, data: bytes) -> None:
        """Forward or swallow a chunk; when the mode changes, the new one holds for the rest."""
        if isinstance(self.mode, Slow):
            await self._pause(self.mode.delay_seconds)
        while data:
            limit, size, pause_seconds = self._limit(direction), len(data), 0.0
            if limit is not None:
                size = limit - self._since[direction]
            elif isinstance(self.mode, Slow):
                size, pause_seconds = self.mode.slice_bytes, self.mode.pause_seconds
            part, data = data[:size], data[size:]
            self._since[direction] += len(part)
            is_over = self._since[direction] == limit
            if self._is_swallowed(direction):
                self._has_lost = True
                self._proxy.swallowed[direction] += len(part)
            else:
                await self._send(direction, part)
            if is_over:
                self._cut()
            await self._pause(pause_seconds)

    def _limit(self, direction: Direction) -> int | None:
        """Return after how many bytes of a direction the mode resets the connection."""
        match self.mode:
            case ResetAfter(limited, most) if direction == limited:
                return most
            case SwallowReplies(most) if direction == "down":
                return most
        return None

    async def _pause(self, seconds: float) -> None:
        """Wait so long, or until the mode changes."""
        with suppress(TimeoutError):
            await asyncio.wait_for(self._changed.wait(), seconds)

    async def _send(self, direction: Direction, data: bytes) -> None:
        await self._loop.sock_sendall(self._senders[OPPOSITE[direction]], data)
        self._proxy.carried[direction] += len(data)

    def _finish(self, direction: Direction) -> None:
        """Tell the receiver that nothing more comes."""
        with suppress(OSError):
            self._senders[OPPOSITE[direction]].shutdown(socket.SHUT_WR)


def _prepared(end: socket.socket) -> socket.socket:
    end.setblocking(False)
    # A slice is a segment.
    end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return end


def _bind(ports: Sequence[int]) -> socket.socket:
    """Bind to the first port that is free."""
    listener = socket.socket()
    listener.setblocking(False)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    for port in ports:
        with suppress(OSError):
            listener.bind((HOST, port))
            return listener
    listener.close()
    raise OSError(f"no free port among {len(ports)} from {ports[0]} on")
