"""The same key, the same order (draft-ietf-httpapi-idempotency-key-header-06)."""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from uuid import UUID

from sqlalchemy import Connection, text

from order_service.errors import IdempotencyKeyRejected, IdempotencyKeyReused, RequestInFlight

KEY = re.compile(r"[\x21-\x7e](?:[\x20-\x7e]{0,253}[\x21-\x7e])?")
UNIQUE_CONSTRAINT = "idempotency_keys_pkey"
KEPT_HOURS = 48
PURGE_ROWS = 1_000

TRY_LOCK = """
    pg_try_advisory_xact_lock(
        hashtextextended(
            jsonb_build_array(CAST(%(principal)s AS text), CAST(%(operation)s AS text),
                              CAST(%(key)s AS text))::text, 0))
"""

# For a later statement than the lock: its snapshot has what was committed before it was granted.
EARLIER = """
    SELECT fingerprint, order_id FROM idempotency_keys
     WHERE principal = %(principal)s AND operation = %(operation)s AND key = %(key)s
"""

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


def earlier_order(
    use: Use, *, is_held: bool, fingerprint: bytes | None, order_id: UUID | None
) -> UUID | None:
    """Return the order that a key stands for already, by a row of EARLIER, or None.

    Raises RequestInFlight when somebody else holds the key, IdempotencyKeyReused when it came
    before with another payload.
    """
    if not is_held:
        raise RequestInFlight(
            "A request with this Idempotency-Key is being worked on.", headers={"Retry-After": "1"}
        )
    if fingerprint is not None and bytes(fingerprint) != use.fingerprint:
        raise IdempotencyKeyReused("This Idempotency-Key came before with another payload.")
    return order_id


def purge(connection: Connection) -> int:
    """Delete a batch of the keys that are too old to be replayed; return how many."""
    return connection.execute(_PURGE, {"hours": KEPT_HOURS, "limit": PURGE_ROWS}).rowcount
