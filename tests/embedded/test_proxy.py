"""The proxy: each mode does what it says, and counts it."""

import contextlib
import socket
import socketserver
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.support.proxy import (
    Blackhole,
    Direction,
    HalfClose,
    Mode,
    Pass,
    Proxy,
    Refuse,
    Reset,
    ResetAfter,
    Slow,
    SwallowReplies,
    throttled,
)
from tests.support.sink import HOST
from tests.support.world import eventually

TIMEOUT_SECONDS = 5.0
SILENT_SECONDS = 0.15
FAREWELL = b"farewell"


class Echo(socketserver.ThreadingTCPServer):
    """Echoes, says farewell to who ends, and notes what came and how it ended."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__((HOST, 0), EchoHandler)
        self.port = int(self.server_address[1])
        self.pieces: list[bytes] = []
        self.ends: list[str] = []

    @property
    def received(self) -> bytes:
        """All that came."""
        return b"".join(self.pieces)


class EchoHandler(socketserver.BaseRequestHandler):
    """One connection."""

    server: Echo
    request: socket.socket

    def handle(self) -> None:
        """Echo until the client ends."""
        try:
            while piece := self.request.recv(64 * 1024):
                self.server.pieces.append(piece)
                self.request.sendall(piece)
            self.request.sendall(FAREWELL)
            self.server.ends.append("fin")
        except OSError:
            self.server.ends.append("reset")


@pytest.fixture
def echo() -> Iterator[Echo]:
    with Echo() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join(TIMEOUT_SECONDS)


@pytest.fixture
def proxy(echo: Echo) -> Iterator[Proxy]:
    with Proxy(echo.port) as running:
        yield running


@pytest.fixture
def client(proxy: Proxy) -> Iterator[socket.socket]:
    """Give a connection that has carried two bytes each way."""
    with connected(proxy) as connection:
        assert asked(connection, b"hi") == b"hi"
        yield connection


def test_everything_passes_both_ways(echo: Echo, proxy: Proxy, client: socket.socket) -> None:
    """Four megabytes come back as they were, the end is passed on, and all is counted."""
    sent = bytes(range(256)) * 16 * 1024
    with ThreadPoolExecutor(1) as pool:
        pool.submit(client.sendall, sent)
        assert read(client, len(sent)) == sent
    client.shutdown(socket.SHUT_WR)
    assert client.recv(100) == FAREWELL
    assert client.recv(1) == b""
    assert echo.ends == ["fin"]
    up = len(sent) + len(b"hi")
    assert (proxy.accepted, proxy.carried) == (1, {"up": up, "down": up + len(FAREWELL)})
    assert (proxy.resets, proxy.swallowed) == (0, {"up": 0, "down": 0})


def test_refused(echo: Echo, proxy: Proxy, client: socket.socket) -> None:
    """Nobody listens, who was connected is reset, and the port is the proxy's all along."""
    proxy.set(Refuse())
    with pytest.raises(ConnectionRefusedError):
        connected(proxy)
    with pytest.raises(ConnectionResetError):
        client.recv(1)
    eventually(lambda: echo.ends == ["reset"], within_seconds=TIMEOUT_SECONDS)
    assert (proxy.resets, proxy.accepted) == (1, 1)
    proxy.set(Pass())
    with connected(proxy) as another:
        assert asked(another, b"again") == b"again"


def test_a_black_hole_swallows_what_is_connected(
    echo: Echo, proxy: Proxy, client: socket.socket
) -> None:
    """Neither bytes nor ends come through, and behind the gap there is no stream."""
    proxy.set(Blackhole())
    client.sendall(b"lost")
    client.shutdown(socket.SHUT_WR)
    assert is_silent(client)
    eventually(lambda: proxy.swallowed["up"] == len(b"lost"), within_seconds=TIMEOUT_SECONDS)
    assert (echo.received, echo.ends) == (b"hi", [])
    proxy.set(Pass())
    with pytest.raises(ConnectionResetError):
        client.recv(1)
    assert proxy.resets == 1


def test_a_black_hole_in_which_nothing_was_lost(proxy: Proxy, client: socket.socket) -> None:
    """A connection that was idle meanwhile goes on."""
    proxy.set(Blackhole())
    proxy.set(Pass())
    assert asked(client, b"still here") == b"still here"
    assert proxy.resets == 0


def test_a_black_hole_accepts_and_never_answers(echo: Echo, proxy: Proxy) -> None:
    """A new client is connected to nobody, not even when there is no server."""
    proxy.target = None
    proxy.set(Blackhole())
    with connected(proxy) as client:
        client.sendall(b"anybody?")
        assert is_silent(client)
        eventually(
            lambda: (proxy.accepted, proxy.swallowed["up"]) == (1, len(b"anybody?")),
            within_seconds=TIMEOUT_SECONDS,
        )
        proxy.target = echo.port
        proxy.set(Pass())
        with pytest.raises(ConnectionResetError):
            client.recv(1)
    assert echo.received == b""


def test_reset_once(echo: Echo, proxy: Proxy, client: socket.socket) -> None:
    """Both ends see the reset, also one that was not yet accepted; later ones pass."""
    with connected(proxy) as newcomer:
        proxy.set(Reset())
        for end in (client, newcomer):
            with pytest.raises(ConnectionResetError):
                end.recv(1)
    eventually(lambda: "reset" in echo.ends, within_seconds=TIMEOUT_SECONDS)
    assert proxy.resets == 2
    with connected(proxy) as later:
        assert asked(later, b"later") == b"later"


@pytest.mark.parametrize("direction", ["up", "down"])
def test_reset_after_so_many_bytes(
    echo: Echo, proxy: Proxy, client: socket.socket, direction: Direction
) -> None:
    """What was connected before has its bytes counted from now on."""
    proxy.set(ResetAfter(direction, 5))
    assert asked(client, b"abcd") == b"abcd"
    client.sendall(b"efgh")
    if direction == "down":
        assert read(client, 1) == b"e"
    with pytest.raises(ConnectionResetError):
        read(client, 2)
    assert (proxy.resets, proxy.carried[direction]) == (1, len(b"hi") + 5)
    eventually(lambda: echo.ends == ["reset"], within_seconds=TIMEOUT_SECONDS)
    assert echo.received == (b"hiabcde" if direction == "up" else b"hiabcdefgh")


def test_swallow_replies_and_reset_after_bytes(
    echo: Echo, proxy: Proxy, client: socket.socket
) -> None:
    """The server has done its work, and the client never hears of it."""
    proxy.set(SwallowReplies(reset_after_bytes=6))
    client.sendall(b"abcd")
    assert is_silent(client)
    client.sendall(b"efgh")
    with pytest.raises(ConnectionResetError):
        client.recv(1)
    assert echo.received == b"hiabcdefgh"
    assert proxy.swallowed["up"] == 0
    assert proxy.swallowed["down"] >= 6
    assert (proxy.carried["down"], proxy.resets) == (len(b"hi"), 1)


def test_swallow_replies_and_reset_after_a_time(
    echo: Echo, proxy: Proxy, client: socket.socket
) -> None:
    """The time is over even when no reply comes; one that a later mode replaced is void."""
    proxy.set(SwallowReplies(reset_after_seconds=1.0))
    began_at = time.monotonic()
    client.sendall(b"abcd")
    with pytest.raises(ConnectionResetError):
        client.recv(1)
    assert time.monotonic() - began_at >= 1.0
    assert (echo.received, proxy.swallowed["down"], proxy.resets) == (b"hiabcd", 4, 1)
    with connected(proxy) as another:
        eventually(lambda: proxy.accepted == 2, within_seconds=TIMEOUT_SECONDS)
        proxy.set(Pass())
        assert is_silent(another, seconds=1.3)
        assert asked(another, b"fine") == b"fine"


def test_delay(proxy: Proxy, client: socket.socket) -> None:
    """Each direction adds its delay, and the mode's end ends it."""
    proxy.set(Slow(delay_seconds=0.15))
    assert seconds_to_ask(client, b"late") >= 0.3
    proxy.set(Slow(delay_seconds=60))
    client.sendall(b"much later")
    assert is_silent(client)
    proxy.set(Pass())
    assert read(client, len(b"much later")) == b"much later"


def test_slices(echo: Echo, proxy: Proxy, client: socket.socket) -> None:
    """What was sent at once comes in pieces, one after the other."""
    proxy.set(Slow(slice_bytes=3, pause_seconds=0.1))
    assert seconds_to_ask(client, b"abcdefghij") >= 0.3
    assert echo.pieces == [b"hi", b"abc", b"def", b"ghi", b"j"]


def test_throttle(proxy: Proxy, client: socket.socket) -> None:
    """Forty kilobytes at a hundred a second take four tenths of a second."""
    proxy.set(throttled(100_000))
    assert seconds_to_ask(client, bytes(40_000)) >= 0.35


def test_half_close_down(echo: Echo, proxy: Proxy, client: socket.socket) -> None:
    """The client hears the end, and the server still hears the client."""
    proxy.set(HalfClose("down"))
    assert client.recv(1) == b""
    client.sendall(b"can you hear me?")
    eventually(lambda: echo.received == b"hican you hear me?", within_seconds=TIMEOUT_SECONDS)
    eventually(lambda: proxy.swallowed["down"] == 16, within_seconds=TIMEOUT_SECONDS)
    assert (echo.ends, proxy.resets) == ([], 0)


def test_half_close_up(echo: Echo, proxy: Proxy, client: socket.socket) -> None:
    """The server hears the end, and the client still hears the server."""
    proxy.set(HalfClose("up"))
    assert read(client, len(FAREWELL)) == FAREWELL
    eventually(lambda: echo.ends == ["fin"], within_seconds=TIMEOUT_SECONDS)
    with contextlib.suppress(ConnectionError):
        client.sendall(b"unheard")
    assert echo.received == b"hi"


@pytest.mark.parametrize(
    ("mode", "ends"),
    [(SwallowReplies(reset_after_bytes=1), "reset"), (Reset(), "reset"), (Blackhole(), None)],
)
def test_the_pattern_is_forwarded_and_its_reply_is_not(
    echo: Echo, proxy: Proxy, client: socket.socket, mode: Mode, ends: str | None
) -> None:
    """The pattern comes in two pieces; other connections and later ones are left alone."""
    assert asked(client, b"COMMIT") == b"COMMIT"
    trigger = proxy.when_sent(b"COMMIT", mode)
    with connected(proxy) as other:
        assert asked(client, b"; COM") == b"; COM"
        assert asked(other, b"MIT") == b"MIT"
        client.sendall(b"MIT;")
        if ends:
            with pytest.raises(ConnectionResetError):
                client.recv(1)
        else:
            assert is_silent(client)
        eventually(lambda: echo.received.endswith(b"MIT;"), within_seconds=TIMEOUT_SECONDS)
        assert asked(other, b"COMMIT") == b"COMMIT"
    assert (trigger.fired, proxy.resets) == (1, 1 if ends else 0)


def test_a_pattern_is_waited_for_as_often_as_told(proxy: Proxy) -> None:
    """Here twice, on a connection each."""
    trigger = proxy.when_sent(b"QUIT", Reset(), times=2)
    for _ in range(2):
        with connected(proxy) as client:
            client.sendall(b"QUIT")
            with pytest.raises(ConnectionResetError):
                client.recv(1)
    with connected(proxy) as client:
        assert asked(client, b"QUIT") == b"QUIT"
    assert (trigger.fired, proxy.resets) == (2, 2)


def test_a_pattern_that_is_not_to_arrive(echo: Echo, proxy: Proxy, client: socket.socket) -> None:
    """Nor does what comes with its end; what came before has arrived."""
    trigger = proxy.when_sent(b"COMMIT", Reset(), is_forwarded=False)
    assert asked(client, b"BEGIN; COM") == b"BEGIN; COM"
    client.sendall(b"MIT; BEGIN")
    with pytest.raises(ConnectionResetError):
        client.recv(1)
    eventually(lambda: echo.ends == ["reset"], within_seconds=TIMEOUT_SECONDS)
    assert echo.received.endswith(b"BEGIN; COM")
    assert (trigger.fired, proxy.resets) == (1, 1)


def test_a_server_that_is_not_there(echo: Echo) -> None:
    """The client is reset until there is a target; the proxy did not do it."""
    with Proxy() as proxy:
        # The reset may overtake the client's own connect.
        with pytest.raises(ConnectionResetError), connected(proxy) as client:
            client.recv(1)
        proxy.target = echo.port
        with connected(proxy) as client:
            assert asked(client, b"there") == b"there"
        assert (proxy.accepted, proxy.resets) == (2, 0)


def test_a_reset_is_passed_on(echo: Echo, proxy: Proxy, client: socket.socket) -> None:
    """A client that resets looks to the server as if there were no proxy."""
    client.sendall(b"unread")
    eventually(lambda: echo.received == b"hiunread", within_seconds=TIMEOUT_SECONDS)
    eventually(lambda: proxy.carried["down"] == len(b"hiunread"), within_seconds=TIMEOUT_SECONDS)
    client.close()
    eventually(lambda: echo.ends == ["reset"], within_seconds=TIMEOUT_SECONDS)
    assert proxy.resets == 0


def test_a_port_of_ones_own(echo: Echo, proxy: Proxy) -> None:
    """A port that is named is used, one that is taken is an error."""
    with pytest.raises(OSError, match="no free port"), Proxy(echo.port, port=proxy.port):
        pass
    with Proxy(echo.port) as another:
        port = another.port
    with Proxy(echo.port, port=port) as again, connected(again) as client:
        assert again.port == port
        assert asked(client, b"hello") == b"hello"


def connected(proxy: Proxy) -> socket.socket:
    return socket.create_connection((HOST, proxy.port), TIMEOUT_SECONDS)


def asked(client: socket.socket, data: bytes) -> bytes:
    """Send something and return as much."""
    client.sendall(data)
    return read(client, len(data))


def read(client: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        piece = client.recv(size - len(data))
        assert piece, f"the end after {len(data)} bytes of {size}"
        data += piece
    return data


def seconds_to_ask(client: socket.socket, data: bytes) -> float:
    began_at = time.monotonic()
    assert asked(client, data) == data
    return time.monotonic() - began_at


def is_silent(client: socket.socket, *, seconds: float = SILENT_SECONDS) -> bool:
    """Whether neither a byte nor an end comes for a while."""
    client.settimeout(seconds)
    try:
        client.recv(1)
    except TimeoutError:
        return True
    finally:
        client.settimeout(TIMEOUT_SECONDS)
    return False
