"""Mails made due once more from their records: what `replay` and `mails resend` have in common."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from itertools import zip_longest

from sqlalchemy import Engine, RowMapping

from mail_service import decisions, events
from mail_service.confirmation import message_id
from mail_service.decisions import Campaign
from mail_service.events import UnreadableRecord
from mail_service.kafka import KafkaUnavailable, Log, Reader, Record, Topic
from mail_service.ledger import NewMail
from mail_service.operate.output import progress
from mail_service.settings import Settings

# Fewer records in between are read through; for more the reader goes on elsewhere.
READ_THROUGH = 5_000
GONE = "gone from the topic"


@dataclass(frozen=True, slots=True)
class Wanted:
    """A record to read back, and the order that is to be in it."""

    order_id: str
    partition: int
    offset: int


@dataclass(slots=True)
class Made:
    """The orders whose mails are due now, and why others are not."""

    order_ids: list[str] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)


def make_due(
    settings: Settings,
    engine: Engine,
    reader: Reader,
    wanted: Sequence[Wanted],
    *,
    topic_id: str,
    reason: str,
    campaign: Campaign | None = None,
) -> Made:
    """Read records back and write a row for each, a transaction a batch; safe to be repeated.

    A row that is there already is left as it is.
    """
    by_place = {(each.partition, each.offset): each.order_id for each in wanted}
    made = Made()
    with progress("reading the topic", len(wanted)) as advance:
        for records in _read_back(reader, wanted, topic_id):
            mails = []
            for record in records:
                order_id = by_place.pop((record.partition, record.offset), None)
                if order_id is None:
                    continue
                if _order_in(record) == order_id:
                    mails.append(new_mail(record, order_id, settings, campaign))
                else:
                    made.refused[order_id] = "another record lies there"
            if not mails:
                continue
            with decisions.deciding(engine) as connection:
                due = decisions.make_due(
                    connection,
                    mails,
                    patience=timedelta(hours=settings.mail_give_up_hours),
                    reason=reason,
                    campaign=campaign,
                )
            made.order_ids += due
            are_due = set(due)
            made.refused |= {
                mail.order_id: "known by now, erased, or beyond the limit"
                for mail in mails
                if mail.order_id not in are_due
            }
            advance(len(mails))
    told = {*made.order_ids, *made.refused}
    made.refused |= {each.order_id: GONE for each in wanted if each.order_id not in told}
    return made


def ranges_from(topic: Topic, since: datetime, logs: Sequence[Log]) -> dict[int, range]:
    """Return what to read of each partition: from a moment up to where it ends now.

    Raises KafkaUnavailable when one does not answer: half a topic must not be taken for the whole.
    """
    starts = topic.offsets_at(since, logs)
    if silent := [where.partition for where in logs if where.partition not in starts]:
        raise KafkaUnavailable(f"no answer for partitions {silent}")
    return {where.partition: range(starts[where.partition], where.end) for where in logs}


def is_retained(mail: RowMapping, logs: Mapping[int, Log]) -> bool:
    """Say whether a mail's record can still be read."""
    where = logs.get(mail["partition"])
    return (
        where is not None and where.topic_id == mail["topic_id"] and mail["offset"] >= where.start
    )


def _read_back(
    reader: Reader, wanted: Iterable[Wanted], topic_id: str
) -> Iterator[Sequence[Record]]:
    offsets: dict[int, list[int]] = defaultdict(list)
    for each in wanted:
        offsets[each.partition].append(each.offset)
    windows = [
        [(partition, window) for window in _windows(sorted(found))]
        for partition, found in offsets.items()
    ]
    for together in zip_longest(*windows):
        ranges = dict(window for window in together if window is not None)
        yield from reader.read_between(ranges, topic_id=topic_id)


def _windows(offsets: Sequence[int]) -> Iterator[range]:
    """Split ascending offsets where too much lies between."""
    first = last = offsets[0]
    for offset in offsets[1:]:
        if offset - last > READ_THROUGH:
            yield range(first, last + 1)
            first = offset
        last = offset
    yield range(first, last + 1)


def _order_in(record: Record) -> str | None:
    try:
        event = events.read(record)
    except UnreadableRecord:
        return None
    return None if event is None else event.order_id


def new_mail(
    record: Record, order_id: str, settings: Settings, campaign: Campaign | None = None
) -> NewMail:
    """Return the mail that a record becomes when a person makes it due."""
    event_at = events.occurred_at(record)
    name = campaign.name if campaign else ""
    return NewMail(
        order_id=order_id,
        message_id=message_id(order_id, mail_from=settings.mail_from, campaign=name),
        event=record.value or b"",
        event_at=event_at,
        give_up_at=event_at,
        topic_id=record.topic_id,
        partition=record.partition,
        offset=record.offset,
    )
