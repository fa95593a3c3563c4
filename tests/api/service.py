"""One running order API on its database, with canaries for secrets and address, on free ports."""

import json
import subprocess
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import psutil
import psycopg2

from deploy.embedded.infrastructure import add_infrastructure
from deploy.embedded.part import Command, Part
from deploy.embedded.ports import HOST, Ports
from deploy.embedded.services import ORDER_SERVICE, Pair, add_pair
from deploy.embedded.stack import Stack

REPOSITORY = Path(__file__).parents[2]
ORDER_PYTHON = REPOSITORY / ".venv/order/bin/python"
FORGER = REPOSITORY / "tests/api/forger.py"
COMMAND_SECONDS = 30.0
HTTP_SECONDS = 10.0
# Of the pair only these run: the API needs neither a broker nor the mail service.
PARTS = ("order-db", "order-migrate", "order-products", "order-api")
TABLES = ("orders", "order_items", "outbox", "idempotency_keys")

CANARY_PASSWORD = "canary-of-the-database-password"
CANARY_USER = "canary-of-a-user"
CANARY_ADDRESS = "canary.of.an.address@example.com"


@dataclass(frozen=True)
class Api:
    """The API under test as its clients, its database and its logs show it."""

    stack: Stack
    ports: Ports
    pair: Pair

    @property
    def address(self) -> tuple[str, int]:
        """Where it listens."""
        parts = urlsplit(self.pair.api_url)
        return str(parts.hostname), int(parts.port or 0)

    @property
    def logs(self) -> list[Path]:
        """Return what every process of this run has written."""
        return sorted((self.stack.state.root / "logs").iterdir())

    @property
    def workers(self) -> list[psutil.Process]:
        """Return gunicorn's worker processes."""
        return psutil.Process(self.stack.part("order-api").pid).children()

    @cached_property
    def tokens(self) -> dict[str, str]:
        """Keep every token issued, by user, so that the logs can be searched for it."""
        return {}

    def token(self, user: str) -> str:
        """Return a bearer token of a user, issued by the service's own command."""
        if user not in self.tokens:
            self.tokens[user] = self._run(str(ORDER_SERVICE), "token", "--user", user).strip()
        return self.tokens[user]

    def forged_tokens(self, listener: str) -> dict[str, str]:
        """Return tokens that prove nothing, by what is wrong; some of them name the listener."""
        forged: dict[str, str] = json.loads(self._run(str(ORDER_PYTHON), str(FORGER), listener))
        return forged

    @contextmanager
    def client(self, user: str, url: str | None = None) -> Iterator[httpx.Client]:
        """Give a client that is logged in."""
        headers = {"Authorization": f"Bearer {self.token(user)}"}
        with httpx.Client(
            base_url=url or self.pair.api_url, headers=headers, timeout=HTTP_SECONDS
        ) as client:
            yield client

    @contextmanager
    def another(self, name: str, **settings: str) -> Iterator[str]:
        """Run a second API on the same database with other settings; give its address."""
        port, probe_port = self.ports.choose(0), self.ports.choose(0)
        changed = {"HTTP_PORT": str(port), "PROBE_PORT": str(probe_port), **settings}
        state = self.stack.state
        part = Part(
            name=name,
            command=Command(
                argv=[str(ORDER_SERVICE), "api"],
                env={**self.pair.order_environment, **changed},
                log_path=state.log(name),
            ),
            pid_path=state.pid(name),
            is_ready=lambda: _is_ready(probe_port),
        )
        self.stack.add(part)
        self.stack.start(name)
        try:
            yield f"http://{HOST}:{port}"
        finally:
            self.stack.stop(name)

    @contextmanager
    def database(self) -> Iterator[Any]:
        """Give a cursor on the order database; each statement is its own transaction."""
        url = self.pair.order_environment["DATABASE_URL"].replace("+psycopg2", "")
        connection = psycopg2.connect(url)
        connection.autocommit = True
        try:
            with connection.cursor() as cursor:
                yield cursor
        finally:
            connection.close()

    def sql(self, statement: str, *values: object) -> list[tuple[Any, ...]]:
        """Read the order database."""
        with self.database() as cursor:
            cursor.execute(statement, values)
            rows: list[tuple[Any, ...]] = cursor.fetchall()
            return rows

    def _run(self, *argv: str) -> str:
        environment: Mapping[str, str] = self.pair.order_environment
        done = subprocess.run(
            argv,
            env=dict(environment),
            capture_output=True,
            text=True,
            timeout=COMMAND_SECONDS,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout


@contextmanager
def running(root: Path) -> Iterator[Api]:
    """Start database and API on a state directory of their own, and stop them."""
    ports = Ports(use_defaults=False)
    with Stack(root) as stack:
        _plant(root, "order-db.order_service", CANARY_PASSWORD)
        addresses = add_infrastructure(stack, ports, ("kafka", "order-db", "mail-db"))
        pair = add_pair(stack, ports, addresses, app_env="test", mail_replicas=0)
        stack.start(*PARTS)
        yield Api(stack, ports, pair)


def counts(cursor: Any) -> dict[str, int]:
    """Count the rows of every table that an order writes to."""
    columns = ", ".join(f"(SELECT count(*) FROM {table})" for table in TABLES)
    cursor.execute(f"SELECT {columns}")
    return dict(zip(TABLES, cursor.fetchone(), strict=True))


def order(**changes: Any) -> dict[str, Any]:
    """Return the body of an order; it goes to the canary address."""
    return {"email": CANARY_ADDRESS, "items": [{"sku": "TEA-GREEN-50", "quantity": 2}], **changes}


def place(client: httpx.Client, key: str | None = None, **changes: Any) -> httpx.Response:
    """Send an order with this key, else one of its own."""
    headers = {"Idempotency-Key": key or str(uuid.uuid4())}
    return client.post("/v1/orders", json=order(**changes), headers=headers)


def statuses(replies: Sequence[httpx.Response]) -> set[int]:
    """Return the different status codes."""
    return {reply.status_code for reply in replies}


def _plant(root: Path, name: str, secret: str) -> None:
    path = root / "secrets" / name
    path.parent.mkdir(mode=0o700, exist_ok=True)
    path.touch(mode=0o600)
    path.write_text(secret)


def _is_ready(port: int) -> bool:
    try:
        return httpx.get(f"http://{HOST}:{port}/readyz", timeout=HTTP_SECONDS).is_success
    except httpx.HTTPError:
        return False
