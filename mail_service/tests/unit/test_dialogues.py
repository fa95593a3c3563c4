"""Dialogues that take turns, on sockets of the test's own."""

import socket
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from mail_service.dialogues import (
    LATE,
    READ,
    TICK_SECONDS,
    WRITE,
    Aside,
    Dialogues,
    Steps,
    Wait,
    finish,
)

PATIENCE_SECONDS = 10.0
Pair = tuple[socket.socket, socket.socket]


@pytest.fixture
def make_pair() -> Iterator[Callable[[], Pair]]:
    """Give a function that opens two sockets which are connected to each other."""
    opened: list[socket.socket] = []

    def make() -> Pair:
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        opened.extend((ours, theirs))
        return ours, theirs

    yield make
    for each in opened:
        each.close()


@pytest.fixture
def dialogues() -> Iterator[Dialogues]:
    """Run the thread while the test lasts."""
    dialogues = Dialogues()
    dialogues.start()
    yield dialogues
    dialogues.stop(patience_seconds=1.0)


def hear(on: socket.socket, *, seconds: float = PATIENCE_SECONDS) -> Steps[bytes]:
    """Return what comes first."""
    yield Wait(on, READ, time.monotonic() + seconds)
    return on.recv(100)


class Ends:
    """What became of dialogues, by name, in the order in which they ended."""

    def __init__(self) -> None:
        self.came: dict[str, object] = {}
        self._changed = threading.Condition()

    def noted(self, name: str, steps: Steps[object]) -> Steps[None]:
        """Hold a dialogue and note what it returned or raised."""
        try:
            end = yield from steps
        except Exception as error:  # noqa: BLE001 - it is what is looked at
            end = error
        with self._changed:
            self.came[name] = end
            self._changed.notify_all()

    def wait_for(self, count: int) -> None:
        """Wait until so many have ended."""
        with self._changed:
            assert self._changed.wait_for(lambda: len(self.came) >= count, PATIENCE_SECONDS)


def test_one_dialogue_is_held_to_its_end(make_pair: Callable[[], Pair]) -> None:
    """In the calling thread, wait by wait and call by call."""
    ours, theirs = make_pair()

    def steps() -> Steps[list[object]]:
        yield Wait(ours, WRITE, time.monotonic() + PATIENCE_SECONDS)
        asked = yield Aside(lambda: theirs.send(b"hello"))
        heard = yield from hear(ours)
        return [asked, heard]

    assert finish(steps()) == [5, b"hello"]


@pytest.mark.parametrize("seconds", [0.05, -1.0])
def test_what_comes_too_late_is_a_time_out(make_pair: Callable[[], Pair], seconds: float) -> None:
    """A deadline that has passed already is one too."""
    ours, _ = make_pair()
    with pytest.raises(TimeoutError, match=LATE):
        finish(hear(ours, seconds=seconds))


def test_what_a_call_raises_is_thrown_in() -> None:
    """The dialogue decides what it means."""

    def fail() -> None:
        raise ConnectionRefusedError

    def steps() -> Steps[str]:
        try:
            yield Aside(fail)
        except ConnectionRefusedError:
            return "refused"
        return "connected"

    assert finish(steps()) == "refused"


def test_what_is_answered_goes_before_what_is_new(
    dialogues: Dialogues, make_pair: Callable[[], Pair]
) -> None:
    """Mails that are handed out together keep nobody who has an answer waiting for all of them."""
    ends = Ends()
    ours, theirs = make_pair()

    def work(*, is_first: bool) -> Steps[object]:
        if is_first:
            theirs.send(b"answer")
        yield from ()

    new = [ends.noted(f"new {number}", work(is_first=number == 0)) for number in range(20)]
    dialogues.begin([ends.noted("waits", hear(ours)), *new])

    ends.wait_for(21)
    assert list(ends.came).index("waits") <= 2


def test_nobody_waits_for_another(dialogues: Dialogues, make_pair: Callable[[], Pair]) -> None:
    """They end as what they wait for comes, not as they began; one that blocks is aside."""
    ends = Ends()
    (first, to_first), (second, to_second) = make_pair(), make_pair()
    blocked = threading.Event()

    def block() -> Steps[object]:
        return (yield Aside(lambda: blocked.wait(PATIENCE_SECONDS)))

    dialogues.begin(
        [
            ends.noted("blocks", block()),
            ends.noted("first", hear(first)),
            ends.noted("second", hear(second)),
        ]
    )
    for number, (name, come) in enumerate(
        {
            "second": lambda: to_second.send(b"2"),
            "first": lambda: to_first.send(b"1"),
            "blocks": blocked.set,
        }.items(),
        start=1,
    ):
        come()
        ends.wait_for(number)
        assert list(ends.came)[-1] == name
    assert ends.came == {"second": b"2", "first": b"1", "blocks": True}


def test_each_deadline_is_kept(dialogues: Dialogues, make_pair: Callable[[], Pair]) -> None:
    """To within a tick; what came in time is heard, however long another one took its step."""
    ends = Ends()
    (silent, _), (busy, to_busy), (heard, to_heard) = make_pair(), make_pair(), make_pair()

    def take_long() -> Steps[object]:
        yield from hear(busy)
        time.sleep(TICK_SECONDS * 3)
        return "done"

    began_at = time.monotonic()
    dialogues.begin(
        [
            ends.noted("silent", hear(silent, seconds=0.1)),
            ends.noted("long", take_long()),
            ends.noted("heard", hear(heard, seconds=TICK_SECONDS * 2)),
        ]
    )
    ends.wait_for(1)
    assert isinstance(ends.came["silent"], TimeoutError)
    assert time.monotonic() - began_at >= 0.1
    to_busy.send(b"go")
    to_heard.send(b"in time")
    ends.wait_for(3)
    assert ends.came["heard"] == b"in time"


def test_a_number_given_out_again_is_another_socket(
    dialogues: Dialogues, make_pair: Callable[[], Pair]
) -> None:
    """What was known of the socket that was closed is not taken for the new one's."""
    ends = Ends()
    ours, theirs = make_pair()
    theirs.send(b"old")

    def steps() -> Steps[object]:
        yield from hear(ours)
        number = ours.fileno()
        ours.close()
        new, to_new = make_pair()
        assert new.fileno() == number
        to_new.send(b"new")
        return (yield from hear(new))

    dialogues.begin([ends.noted("new", steps())])
    ends.wait_for(1)
    assert ends.came == {"new": b"new"}


def test_a_socket_that_nobody_reads_costs_nothing(
    dialogues: Dialogues, make_pair: Callable[[], Pair]
) -> None:
    """The relay hung up between two mails: the thread sleeps on, and the next one hears of it."""
    ends = Ends()
    ours, theirs = make_pair()
    theirs.send(b"hello")
    dialogues.begin([ends.noted("first", hear(ours))])
    ends.wait_for(1)
    theirs.close()
    cpu_began = time.process_time()
    time.sleep(0.5)
    assert time.process_time() - cpu_began < 0.1
    dialogues.begin([ends.noted("second", hear(ours))])
    ends.wait_for(2)
    assert ends.came == {"first": b"hello", "second": b""}


@pytest.mark.parametrize("said", [[b"bye"], []], ids=["answered", "silent"])
def test_the_end_waits_for_dialogues_for_a_while(
    make_pair: Callable[[], Pair], said: list[bytes]
) -> None:
    """One that never ends does not hold it up."""
    dialogues, ends = Dialogues(), Ends()
    dialogues.start()
    ours, theirs = make_pair()
    dialogues.begin([ends.noted("last", hear(ours))])
    for each in said:
        threading.Timer(0.1, theirs.send, [each]).start()
    began_at = time.monotonic()
    dialogues.stop(patience_seconds=1.0)
    assert time.monotonic() - began_at < PATIENCE_SECONDS / 2
    assert list(ends.came.values()) == said
