"""What could not be read: rows that wait for another release, or for nobody."""

import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, RowMapping, text

from mail_service.kafka import Record

ERASED = "erased"
READ_AT_ONCE = 100
# What cannot be read may be cut off, of another letter code, or have its letters escaped.
LETTER_CODES = ("utf-8", "utf-16-le", "utf-16-be")
ESCAPED = re.compile(r"\\u([0-9a-fA-F]{4})")
NAMED_ORDER = re.compile(r"\"orderId\"\s*:\s*\"?([A-Za-z0-9_.-]+)")
WORD = re.compile(r"[A-Za-z0-9_.-]+")

_LIST = text("""
    SELECT id, topic_id, partition, "offset", key, value, value_sha256, headers, reason, taken_in_at
      FROM dead_letters
     WHERE (CAST(:ids AS bigint[]) IS NULL OR id = ANY(CAST(:ids AS bigint[])))
       AND (CAST(:reason AS text) IS NULL OR strpos(reason, :reason) > 0)
     ORDER BY id
     LIMIT :limit
""")
_LOCK = text("SELECT id FROM dead_letters WHERE id = :id FOR UPDATE")
_FORGET = text("DELETE FROM dead_letters WHERE id = :id")
_KEPT = text("""
    SELECT id, key, value, headers FROM dead_letters
     WHERE key IS NOT NULL OR value IS NOT NULL
     ORDER BY id
""")
# The digest goes as well: who knows all but the address could find it by trying.
_ERASE = text("""
    UPDATE dead_letters
       SET key = NULL, value = NULL, value_sha256 = '', headers = '[]', reason = :reason
     WHERE id = ANY(CAST(:ids AS bigint[]))
""")
_AT = text("""
    SELECT partition, "offset" FROM dead_letters
     WHERE topic_id = :topic_id AND partition = :partition
       AND "offset" = ANY(CAST(:offsets AS bigint[]))
""")


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """A record as far as it was kept; `value_sha256` is of the whole."""

    id: int
    topic_id: str
    partition: int
    offset: int
    key: bytes | None
    value: bytes | None
    value_sha256: str
    headers: Sequence[tuple[str, str]]
    reason: str
    taken_in_at: datetime

    def record(self) -> Record:
        """Return the record it was, with the time of its take-in for its own."""
        return Record(
            topic_id=self.topic_id,
            partition=self.partition,
            offset=self.offset,
            key=self.key,
            value=self.value,
            headers=[(name, content.encode()) for name, content in self.headers],
            at=self.taken_in_at,
        )


def choose(
    connection: Connection,
    *,
    ids: Collection[int] | None = None,
    reason: str | None = None,
    limit: int | None = None,
) -> list[DeadLetter]:
    """Return dead letters, the oldest first."""
    which = {"ids": None if ids is None else list(ids), "reason": reason, "limit": limit}
    return [_letter(row) for row in connection.execute(_LIST, which).mappings()]


def claim(connection: Connection, letter_id: int) -> bool:
    """Keep others off a dead letter until the transaction ends; False when it is gone."""
    return connection.execute(_LOCK, {"id": letter_id}).one_or_none() is not None


def forget(connection: Connection, letter_id: int) -> None:
    """Remove one that became a mail."""
    connection.execute(_FORGET, {"id": letter_id})


def erase(connection: Connection, order_ids: Collection[str], address: str | None) -> int:
    """Remove what dead letters of these orders, or with this address, hold; return how many."""
    orders = frozenset(order_ids)
    kept = connection.execute(_KEPT, execution_options={"yield_per": READ_AT_ONCE}).mappings()
    ids = [row["id"] for row in kept if _concerns(row, orders, address)]
    connection.execute(_ERASE, {"ids": ids, "reason": ERASED})
    return len(ids)


def offsets_among(
    connection: Connection, *, topic_id: str, partition: int, offsets: Collection[int]
) -> set[int]:
    """Return those of the offsets that became dead letters."""
    which = {"topic_id": topic_id, "partition": partition, "offsets": list(offsets)}
    return {row.offset for row in connection.execute(_AT, which)}


def _concerns(row: RowMapping, order_ids: Collection[str], address: str | None) -> bool:
    """Say whether a dead letter is of one of these orders, or has the address anywhere."""
    key = bytes(row["key"] or b"").decode("utf-8", errors="replace")
    headers = " ".join(content for _, content in row["headers"])
    texts = list(_texts(bytes(row["value"] or b"")))
    if address and any(address.casefold() in each.casefold() for each in (key, headers, *texts)):
        return True
    # One that names no order may be of any order whose id stands in it as a word.
    named = {order_id for each in texts for order_id in NAMED_ORDER.findall(each)}
    words = named or {word.strip(".") for each in texts for word in WORD.findall(each)}
    return key in order_ids or not words.isdisjoint(order_ids)


def _texts(value: bytes) -> Iterator[str]:
    """Yield what a value may say."""
    for code in LETTER_CODES if b"\0" in value else LETTER_CODES[:1]:
        legible = value.decode(code, errors="replace")
        yield ESCAPED.sub(lambda found: chr(int(found[1], 16)), legible)


def _letter(row: RowMapping) -> DeadLetter:
    values: dict[str, Any] = dict(row)
    for name in ("key", "value"):
        values[name] = None if values[name] is None else bytes(values[name])
    return DeadLetter(**values)
