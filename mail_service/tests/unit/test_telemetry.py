"""Log lines that are written together."""

import logging
import threading
from io import StringIO

import pytest

from mail_service.telemetry import Lines, lines


class Stream(StringIO):
    """Notes each call."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []

    def write(self, text: str) -> int:
        """Keep what is written."""
        self.calls.append(text)
        return len(text)


@pytest.fixture
def stream(monkeypatch: pytest.MonkeyPatch) -> Stream:
    """Catch what is logged."""
    stream = Stream()
    monkeypatch.setattr(Lines, "handler", logging.StreamHandler(stream), raising=False)
    return stream


def test_lines_are_written_in_one_call_and_not_lost(stream: Stream) -> None:
    """In their order, those before an error too; afterwards each is written at once again."""

    def fail() -> None:
        with lines.together():
            lines.info("first")
            lines.warning("second")
            assert stream.calls == []
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    lines.info("third")

    assert stream.calls == ["first\nsecond\n", "third\n"]


def test_another_threads_line_does_not_wait(stream: Stream) -> None:
    """Only what this thread logs is held back."""
    with lines.together():
        lines.info("ours")
        other = threading.Thread(target=lambda: lines.info("another's"))
        other.start()
        other.join()
        assert stream.calls == ["another's\n"]


def test_without_lines_nothing_is_written(stream: Stream) -> None:
    """An empty batch leaves no empty line."""
    with lines.together():
        pass

    assert stream.calls == []
