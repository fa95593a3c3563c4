"""A member of the group, on a real topic: what it reads while partitions come and go."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest
from harness import PARTITIONS, Environment, Topic, wait_for
from records import order

from mail_service.kafka import Member, Record
from mail_service.settings import TEST_TIMING
from mail_service.telemetry import offsets_not_committed

# The broker keeps 4,096 characters beside a commit.
TOO_LONG = "x" * 10_000


class Reading:
    """A member that reads each partition from where it has read up to."""

    def __init__(self, bootstrap_servers: str) -> None:
        self._next_offsets: dict[int, int] = {}
        self._read: list[Record] = []
        self.member = Member(
            {"bootstrap.servers": bootstrap_servers},
            client_id="reading",
            session_timeout_ms=TEST_TIMING.session_timeout_ms,
            place=lambda where: self._next_offsets.setdefault(where.partition, where.start),
        )

    def read_until(self, is_good: Callable[[list[Record]], object]) -> list[Record]:
        """Read, and place what waits, until what was read is good."""
        return wait_for(self.read_on, is_good)

    def read_on(self) -> list[Record]:
        """Place what waits, read what has come, and return all that was read."""
        self.member.place_waiting()
        new = self.member.read(limit=10, timeout_seconds=0.1)
        self._next_offsets.update({each.partition: each.offset + 1 for each in new})
        self._read += new
        return self._read


@pytest.fixture
def joined(base_environment: Environment) -> Iterator[Callable[[], Reading]]:
    """Return how more members join; all leave in the end."""
    with ExitStack() as left:

        def join() -> Reading:
            reading = Reading(base_environment["KAFKA_BOOTSTRAP_SERVERS"])
            left.callback(reading.member.leave)
            reading.member.join()
            return reading

        yield join


@pytest.fixture
def reading(joined: Callable[[], Reading], topic: Topic) -> Reading:
    """Return a member that reads the whole topic, which is empty."""
    assert topic.exists()
    reading = joined()
    reading.read_until(lambda _: len(reading.member.placed) == PARTITIONS)
    return reading


@pytest.mark.parametrize("is_resumed_before", [True, False])
def test_a_pause_ends_for_a_partition_that_was_away(
    reading: Reading, topic: Topic, *, is_resumed_before: bool
) -> None:
    """It came back after all others were resumed, or before: its records are read."""
    reading.member.pause()
    reading.member.place_anew({0})
    if is_resumed_before:
        reading.member.resume()
        reading.member.place_waiting()
    else:
        reading.member.place_waiting()
        reading.member.pause()
        reading.member.resume()
    topic.send([{**order("away"), "partition": 0}, {**order("stayed"), "partition": 1}])

    read = reading.read_until(lambda read: len(read) == 2)

    assert {record.key for record in read} == {b"order-away", b"order-stayed"}


def test_a_commit_not_taken_is_not_said_again_of_a_partition_that_was_away(
    reading: Reading, joined: Callable[[], Reading], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another member has said more of it meanwhile: the group's commit would go back."""
    all_partitions = set(range(PARTITIONS))
    refused = not_committed()
    reading.member.commit(dict.fromkeys(all_partitions, (TOO_LONG, 1)))
    reading.read_until(lambda _: not_committed() > refused)
    other = joined()
    wait_for(lambda: (reading.read_on(), other.read_on()), lambda _: other.member.placed)
    away = set(other.member.placed)
    assert away < all_partitions
    other.member.leave()
    reading.read_until(lambda _: set(reading.member.placed) == all_partitions)
    said: list[dict[int, tuple[str, int]]] = []
    monkeypatch.setattr(reading.member, "commit", said.append)

    reading.member.commit_again()

    assert [set(each) for each in said] == [all_partitions - away]


def not_committed() -> float:
    """Return how many commits the group did not take."""
    ((sample, *_),) = (metric.samples for metric in offsets_not_committed.collect())
    return sample.value
