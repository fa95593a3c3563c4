"""One order's way to its mail, hop by hop, as both services' --json tell it."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

Row = Mapping[str, Any]

LAST = datetime.max.replace(tzinfo=UTC)


@dataclass(frozen=True)
class Hop:
    """One thing that happened to an order; without a time, how it stands now."""

    at: datetime | None
    what: str

    def after(self, since: datetime) -> str:
        """Say how many milliseconds later it was, in 10 columns."""
        if self.at is None:
            return " " * 10
        return f"{(self.at - since).total_seconds() * 1000:7.0f} ms"


def hops(events: Sequence[Row], mails: Sequence[Row], *others: Hop) -> list[Hop]:
    """Describe an order's outbox row and its mails, with other hops, in the order of time."""
    found = [*others]
    found += [hop for event in events for hop in _of_event(event)]
    found += [hop for mail in mails for hop in _of_mail(mail)]
    return sorted(found, key=lambda hop: hop.at or LAST)


def _of_event(row: Row) -> Iterator[Hop]:
    where = f"partition {row['partition']}, offset {row['offset']}"
    yield Hop(_moment(row["occurred_at"]), "accepted: INIT")
    if row["published_at"]:
        yield Hop(_moment(row["published_at"]), f"INIT → PUBLISHED, {where}")
    if row["completed_at"]:
        yield Hop(_moment(row["completed_at"]), f"COMPLETED: read back from the topic, {where}")
    if row["state"] != "COMPLETED":
        yield Hop(None, f"event now {row['state']}{_reason(row)}")


def _of_mail(row: Row) -> Iterator[Hop]:
    mail = f"mail of campaign {row['campaign']}" if row["campaign"] else "mail"
    yield Hop(_moment(row["taken_in_at"]), f"{mail} taken in")
    attempts = f"{row['attempts']} attempt{'' if row['attempts'] == 1 else 's'}"
    if row["sent_at"]:
        what = f"{mail} {row['state']} by {row['sent_by']} after {attempts}: {row['reply']}"
        yield Hop(_moment(row["sent_at"]), f"{what}, {row['message_id']}")
        return
    owner = f" of {row['owner']}" if row["owner"] else ""
    due = f", due {row['due_at']}" if row["due_at"] else ""
    what = f"{mail} now {row['state']}{owner} after {attempts}{due}{_reason(row)}"
    yield Hop(None, f"{what}, {row['message_id']}")


def _reason(row: Row) -> str:
    return f": {row['reason']}" if row["reason"] else ""


def _moment(text: str) -> datetime:
    return datetime.fromisoformat(text)
