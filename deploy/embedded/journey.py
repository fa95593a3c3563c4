"""One order's way to its mail, hop by hop, told from outside: HTTP, and both services' --json."""

import json
import subprocess
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx

from deploy.embedded.errors import StackError
from deploy.embedded.mailbox import Mailbox
from deploy.embedded.services import MAIL_SERVICE, ORDER_SERVICE, Pair

USER = "sample-user"
ORDER = {
    "email": "minji@example.com",
    "locale": "ko",
    "items": [{"sku": "TEA-GREEN-50", "quantity": 2}, {"sku": "CUP-WHITE", "quantity": 1}],
}
HTTP_TIMEOUT_SECONDS = 10.0
COMMAND_TIMEOUT_SECONDS = 30.0
MAIL_SECONDS = 30.0
POLL_SECONDS = 0.05


@dataclass(frozen=True)
class Hop:
    """One thing that happened, so many milliseconds after the request."""

    milliseconds: float
    what: str


@dataclass(frozen=True)
class Journey:
    """A sample order, its hops and the text of its mail."""

    order_id: str
    hops: list[Hop]
    mail_text: str


def travel(pair: Pair, mailbox: Mailbox, replica_pids: Mapping[int, str]) -> Journey:
    """Place a sample order and follow it; raise StackError when no mail comes."""
    headers = {"Authorization": f"Bearer {token(pair)}", "Idempotency-Key": str(uuid.uuid4())}
    with httpx.Client(base_url=pair.api_url, timeout=HTTP_TIMEOUT_SECONDS) as client:
        requested_at = datetime.now(UTC)
        response = client.post("/v1/orders", json=ORDER, headers=headers)
        answered_at = datetime.now(UTC)
        if response.status_code != httpx.codes.CREATED:
            raise StackError(f"the order was answered {response.status_code}: {response.text}")
        order_id = response.json()["id"]
        _wait_for_completed(client, order_id, headers)
    mail_text = _wait_for_mail(mailbox, order_id)

    def hop(at: str | datetime, what: str) -> Hop:
        moment = datetime.fromisoformat(at) if isinstance(at, str) else at
        return Hop((moment - requested_at).total_seconds() * 1000, what)

    (row,) = _ask(ORDER_SERVICE, pair.order_environment, "outbox", "show", order_id)
    (mail,) = _ask(MAIL_SERVICE, pair.mail_environment, "mails", "show", order_id)
    pid = int(mail["sent_by"].rpartition("-")[2])
    where = f"partition {row['partition']}, offset {row['offset']}"
    hops = [
        hop(answered_at, f"201, order {order_id}"),
        hop(row["published_at"], f"INIT → PUBLISHED, {where}"),
        hop(row["completed_at"], "COMPLETED: read back from the topic"),
        hop(mail["sent_at"], f"{mail['reply']}, to {replica_pids.get(pid, mail['sent_by'])}"),
    ]
    return Journey(order_id, hops, mail_text)


def token(pair: Pair) -> str:
    """Return a bearer token of the development issuer."""
    return _run(ORDER_SERVICE, pair.order_environment, "token", "--user", USER).strip()


def _wait_for_completed(client: httpx.Client, order_id: str, headers: Mapping[str, str]) -> None:
    deadline = time.monotonic() + MAIL_SECONDS
    while time.monotonic() < deadline:
        order = client.get(f"/v1/orders/{order_id}", headers=dict(headers)).json()
        if order["event"]["state"] == "COMPLETED":
            return
        time.sleep(POLL_SECONDS)
    raise StackError(f"the event of {order_id} was not COMPLETED within {MAIL_SECONDS:g} s")


def _wait_for_mail(mailbox: Mailbox, order_id: str) -> str:
    deadline = time.monotonic() + MAIL_SECONDS
    while time.monotonic() < deadline:
        text = mailbox.text_of(order_id)
        if text is not None:
            return text
        time.sleep(POLL_SECONDS)
    raise StackError(f"no mail for {order_id} came within {MAIL_SECONDS:g} s")


def _ask(program: Path, environment: Mapping[str, str], *arguments: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads(_run(program, environment, *arguments, "--json"))
    return rows


def _run(program: Path, environment: Mapping[str, str], *arguments: str) -> str:
    done = subprocess.run(
        [program, *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=COMMAND_TIMEOUT_SECONDS,
        check=False,
    )
    if done.returncode != 0:
        raise StackError(f"{program.name} {' '.join(arguments)}: {done.stderr.strip()}")
    return done.stdout
