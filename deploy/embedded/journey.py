"""One order's way to its mail, hop by hop, told from outside: HTTP, and both services' --json."""

import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime

import httpx

from deploy.commands import ServiceCommand
from deploy.embedded.errors import StackError
from deploy.embedded.mailbox import Mailbox
from deploy.embedded.services import MAIL_SERVICE, ORDER_SERVICE, Pair
from deploy.hops import Hop, hops

USER = "sample-user"
ORDER = {
    "email": "minji@example.com",
    "locale": "ko",
    "items": [{"sku": "TEA-GREEN-50", "quantity": 2}, {"sku": "CUP-WHITE", "quantity": 1}],
}
HTTP_TIMEOUT_SECONDS = 10.0
MAIL_SECONDS = 30.0
POLL_SECONDS = 0.05


@dataclass(frozen=True)
class Journey:
    """A sample order, its hops and the text of its mail."""

    order_id: str
    requested_at: datetime
    hops: list[Hop]
    mail_text: str


def travel(pair: Pair, mailbox: Mailbox, replica_pids: Mapping[str, str]) -> Journey:
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
    events = _order_service(pair).ask("outbox", "show", order_id, "--json")
    mails = _mail_service(pair).ask("mails", "show", order_id, "--json")
    for mail in mails:
        pid = (mail["sent_by"] or "").rpartition("-")[2]
        mail["sent_by"] = replica_pids.get(pid, mail["sent_by"])
    answered = Hop(answered_at, f"201, order {order_id}")
    return Journey(order_id, requested_at, hops(events, mails, answered), mail_text)


def token(pair: Pair) -> str:
    """Return a bearer token of the development issuer."""
    return _order_service(pair).print_out("token", "--user", USER).strip()


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


def _order_service(pair: Pair) -> ServiceCommand:
    return ServiceCommand([str(ORDER_SERVICE)], pair.order_environment)


def _mail_service(pair: Pair) -> ServiceCommand:
    return ServiceCommand([str(MAIL_SERVICE)], pair.mail_environment)
