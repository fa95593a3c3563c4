"""The running pair as users and operators meet it: HTTP, topic, SQL, the relay's journal."""

import dataclasses
import subprocess
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psycopg2

from deploy.embedded.infrastructure import Addresses, add_infrastructure
from deploy.embedded.ports import Ports
from deploy.embedded.services import ORDER_SERVICE, Pair, add_pair
from deploy.embedded.stack import Stack
from tests.support.sink import Accepted, Sink

HTTP_TIMEOUT_SECONDS = 10.0
COMMAND_TIMEOUT_SECONDS = 30.0
POLL_SECONDS = 0.05
REPLICAS = ("mail-1", "mail-2")


@dataclass(frozen=True)
class World:
    """Both services on real parts, with the journaled sink as their SMTP relay."""

    stack: Stack
    sink: Sink
    addresses: Addresses
    pair: Pair

    def token(self, user: str) -> str:
        """Return a bearer token of a user."""
        done = subprocess.run(
            [ORDER_SERVICE, "token", "--user", user],
            env=self.pair.order_environment,
            capture_output=True,
            text=True,
            timeout=COMMAND_TIMEOUT_SECONDS,
            check=True,
        )
        return done.stdout.strip()

    @contextmanager
    def client(self, user: str) -> Iterator[httpx.Client]:
        """Give a client that is logged in."""
        headers = {"Authorization": f"Bearer {self.token(user)}"}
        with httpx.Client(
            base_url=self.pair.api_url, headers=headers, timeout=HTTP_TIMEOUT_SECONDS
        ) as client:
            yield client

    def outbox(self, order_id: str) -> dict[str, Any]:
        """Return the outbox row of an order."""
        (row,) = self.order_sql(
            'SELECT state, partition, "offset" FROM outbox WHERE aggregateid = %s', order_id
        )
        return dict(zip(("state", "partition", "offset"), row, strict=True))

    def order_sql(self, statement: str, *values: object) -> list[tuple[Any, ...]]:
        """Read the order database."""
        return _read(self.addresses.order_database_url, statement, values)

    def mail_sql(self, statement: str, *values: object) -> list[tuple[Any, ...]]:
        """Read the ledger."""
        return _read(self.addresses.mail_database_url, statement, values)

    def mails(self, order_ids: Sequence[str]) -> list[Accepted]:
        """Return what the relay accepted for these orders."""
        wanted = set(order_ids)
        return [mail for mail in self.sink.accepted() if mail.order_id in wanted]


@contextmanager
def running(root: Path) -> Iterator[World]:
    """Start the pair on a state directory of its own, and stop it."""
    ports = Ports(use_defaults=False)
    with Sink(root / "sink") as sink, Stack(root / "stack") as stack:
        addresses = add_infrastructure(stack, ports, ("kafka", "order-db", "mail-db"))
        addresses = dataclasses.replace(addresses, smtp_port=sink.port)
        pair = add_pair(stack, ports, addresses, app_env="test", mail_replicas=len(REPLICAS))
        stack.start()
        yield World(stack, sink, addresses, pair)


def place(client: httpx.Client, **changes: Any) -> httpx.Response:
    """Send an order with a key of its own."""
    headers = {"Idempotency-Key": str(uuid.uuid4())}
    return client.post("/v1/orders", json=order(**changes), headers=headers)


def order(**changes: Any) -> dict[str, Any]:
    """Return the body of an order."""
    return {
        "email": "minji@example.com",
        "items": [{"sku": "TEA-GREEN-50", "quantity": 2}],
        **changes,
    }


def eventually(is_so: Callable[[], object], *, within_seconds: float) -> None:
    """Wait until something is so; fail when its time is over."""
    deadline = time.monotonic() + within_seconds
    while not is_so():
        assert time.monotonic() < deadline, f"not so within {within_seconds:g} s"
        time.sleep(POLL_SECONDS)


def _read(url: str, statement: str, values: Sequence[object]) -> list[tuple[Any, ...]]:
    connection = psycopg2.connect(url.replace("+psycopg2", ""))
    try:
        with connection, connection.cursor() as cursor:
            cursor.execute(statement, values)
            return cursor.fetchall()
    finally:
        connection.close()
