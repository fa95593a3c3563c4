"""The same key, the same order (draft-ietf-httpapi-idempotency-key-header-06)."""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy import Connection, text

from order_service.errors import IdempotencyKeyRejected, IdempotencyKeyReused, RequestInFlight

KEY = re.compile(r"[\x21-\x7e](?:[\x20-\x7e]{0,253}[\x21-\x7e])?")
UNIQUE_CONSTRAINT = "idempotency_keys_pkey"
KEPT_HOURS = 48
PURGE_ROWS = 1_000

# The lock and the look-up are one round trip. The statement's snapshot is older than its lock, so
# an order committed in between is not seen here: the unique key decides in the end.
_CLAIM = text("""
    SELECT pg_try_advisory_xact_lock(
               hashtextextended(jsonb_build_array(:principal, :operation, :key)::text, 0)
           ) AS is_granted,
           earlier.fingerprint,
           earlier.order_id,
           now() AS claimed_at
      FROM (VALUES (1)) AS request
      LEFT JOIN idempotency_keys AS earlier
        ON earlier.principal = :principal AND earlier.operation = :operation AND earlier.key = :key
""")

_PURGE = text("""
    DELETE FROM idempotency_keys
     WHERE ctid = ANY(ARRAY(SELECT ctid FROM idempotency_keys
                             WHERE created_at < now() - :hours * interval '1 hour'
                             LIMIT :limit))
""")


@dataclass(frozen=True, slots=True)
class Use:
    """One use of a key: by whom, for what, with which payload."""

    principal: str
    operation: str
    key: str
    fingerprint: bytes


@dataclass(frozen=True, slots=True)
class Claim:
    """A key that is held: the order of an earlier use, and the database's time."""

    order_id: UUID | None
    at: datetime


def parse_key(header: str | None) -> str:
    """Return the key, bare or in quotes; raise IdempotencyKeyRejected when it is none."""
    key = (header or "").strip()
    if len(key) > 1 and key[0] == key[-1] == '"':
        key = key[1:-1]
    if not KEY.fullmatch(key):
        raise IdempotencyKeyRejected(
            "Send an Idempotency-Key header of 1 to 255 printable ASCII characters."
        )
    return key


def fingerprint(payload: Mapping[str, Any]) -> bytes:
    """Digest a payload so that spacing and the order of members make no difference."""
    canonical = json.dumps(payload, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(canonical.encode()).digest()


def claim(connection: Connection, use: Use) -> Claim:
    """Hold the key until the transaction ends; return the order it already stands for, if any.

    Raises RequestInFlight at once when another transaction holds it, IdempotencyKeyReused when it
    came before with another payload.
    """
    row = connection.execute(
        _CLAIM, {"principal": use.principal, "operation": use.operation, "key": use.key}
    ).one()
    if not row.is_granted:
        raise RequestInFlight(
            "A request with this Idempotency-Key is being worked on.", headers={"Retry-After": "1"}
        )
    if row.order_id is not None and bytes(row.fingerprint) != use.fingerprint:
        raise IdempotencyKeyReused("This Idempotency-Key came before with another payload.")
    return Claim(row.order_id, row.claimed_at)


def purge(connection: Connection) -> int:
    """Delete a batch of the keys that are too old to be replayed; return how many."""
    return connection.execute(_PURGE, {"hours": KEPT_HOURS, "limit": PURGE_ROWS}).rowcount
