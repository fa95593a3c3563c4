"""The pair in containers, driven through `docker compose` as an operator would."""

import json
import os
import subprocess
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from deploy.embedded.ports import Ports
from tests.support.inbox import Inbox

REPOSITORY = Path(__file__).parents[2]
COMMAND_SECONDS = 300
HTTP_TIMEOUT_SECONDS = 10.0
# What clients do with an order whose answer did not come: the same key again, for a while.
PATIENCE_SECONDS = 60.0
STAND_INS = {
    "PYTHON_IMAGE": "order-and-mail-python:trixie",
    "KAFKA_IMAGE": "order-and-mail-kafka:stand-in",
    "POSTGRES_IMAGE": "order-and-mail-postgres:stand-in",
    "INBOX_IMAGE": "order-and-mail-inbox:stand-in",
    "HAPROXY_IMAGE": "order-and-mail-haproxy:stand-in",
    "BUILD_NETWORK": "host",
}


def engine_fault() -> str | None:
    """Say why no container can be run here; None when one can."""
    for command in (["docker", "info"], ["docker", "compose", "version"]):
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
        except OSError as error:
            return f"{' '.join(command)}: {error.strerror}"
        if done.returncode != 0:
            return f"{' '.join(command)}: {done.stderr.strip()}"
    return None


@dataclass(frozen=True)
class Containers:
    """One compose project of the tests' own."""

    environment: Mapping[str, str]
    api_url: str
    inbox: Inbox
    kafka: str

    def compose(self, *arguments: str, check: bool = True) -> str:
        """Run `docker compose …` and return what it printed; its errors are in the exception."""
        return run(["docker", "compose", *arguments], self.environment, check=check)

    def execute(self, service: str, *argv: str, check: bool = True) -> str:
        """Run a command in a service's first container."""
        return self.compose("exec", "-T", service, *argv, check=check)

    def ids(self, service: str) -> list[str]:
        """Return the containers of a service."""
        return self.compose("ps", "--all", "--quiet", service).split()

    def inspect(self, container: str, template: str) -> str:
        """Ask the engine about a container."""
        return run(["docker", "inspect", "--format", template, container], self.environment).strip()

    def crash(self, service: str) -> None:
        """End a container's first process like a fault would: the engine restarts it."""
        pid = self.inspect(self.ids(service)[0], "{{.State.Pid}}")
        # `docker kill` would count as an operator's wish, and the restart policy stand aside.
        program = ["--entrypoint", "python3", self.image("order-api")]
        program += ["-c", f"import os; os.kill({pid}, 9)"]
        limits = ["--pid=host", "--user=0", "--cap-drop=ALL", "--cap-add=KILL", "--network=none"]
        run(["docker", "run", "--rm", *limits, *program], self.environment)

    def image(self, service: str) -> str:
        """Return the image a service runs."""
        config = json.loads(self.compose("config", "--format", "json"))
        return str(config["services"][service]["image"])

    def wait(self) -> None:
        """Return when every service is healthy again."""
        self.compose("up", "--detach", "--no-build", "--no-recreate", "--wait")

    @contextmanager
    def stopped(self, *services: str) -> Iterator[None]:
        """Have services stopped for the block, healthy after it."""
        self.compose("stop", *services)
        try:
            yield
        finally:
            self.compose("start", *services)
            self.wait()

    @contextmanager
    def client(self, user: str) -> Iterator[httpx.Client]:
        """Give a client that is logged in."""
        token = self.execute("order-api", "order-service", "token", "--user", user).strip()
        with httpx.Client(
            base_url=self.api_url,
            headers={"Authorization": f"Bearer {token}"},
            timeout=HTTP_TIMEOUT_SECONDS,
        ) as client:
            yield client


@contextmanager
def containers(secrets: Path) -> Iterator[Containers]:
    """Build, start and load a project; remove it with its volumes afterwards."""
    ports = Ports(use_defaults=False)
    chosen = {name: str(ports.choose(0)) for name in ("API_PORT", "KAFKA_PORT", "INBOX_PORT")}
    images = STAND_INS if os.environ.get("COMPOSE_IMAGES") == "stand-ins" else {}
    environment = {
        **os.environ,
        **images,
        **chosen,
        "COMPOSE_PROJECT_NAME": f"order-and-mail-test-{os.getpid()}",
        "APP_ENV": "test",
        "SECRETS": str(secrets),
    }
    if images:
        run(["tests/compose/images/build.sh"], environment)
    run(["sh", "deploy/make-secrets.sh", str(secrets)], environment)
    project = Containers(
        environment,
        api_url=f"http://127.0.0.1:{chosen['API_PORT']}",
        inbox=Inbox(f"http://127.0.0.1:{chosen['INBOX_PORT']}"),
        kafka=f"127.0.0.1:{chosen['KAFKA_PORT']}",
    )
    try:
        project.compose("build", "--quiet")
        project.wait()
        catalogue = "/etc/order-service/products.csv"
        project.execute("order-api", "order-service", "products", "load", catalogue)
        yield project
    finally:
        project.compose("down", "--volumes", "--timeout", "10", check=False)


def place(client: httpx.Client) -> str:
    """Place an order, with the same key again until it is answered 201; return its id."""
    body = {"email": "minji@example.com", "items": [{"sku": "CUP-WHITE", "quantity": 1}]}
    headers = {"Idempotency-Key": str(uuid.uuid4())}
    deadline = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < deadline:
        try:
            response = client.post("/v1/orders", json=body, headers=headers)
        except httpx.TransportError:
            time.sleep(0.2)
            continue
        if response.status_code == httpx.codes.CREATED:
            return str(response.json()["id"])
        assert response.status_code in {409, 502, 503}, response.text
        time.sleep(0.2)
    raise AssertionError(f"no 201 within {PATIENCE_SECONDS:g} s")


def run(argv: Sequence[str], environment: Mapping[str, str], *, check: bool = True) -> str:
    """Run a command in the repository and return its standard output."""
    done = subprocess.run(
        argv,
        cwd=REPOSITORY,
        env=dict(environment),
        capture_output=True,
        text=True,
        timeout=COMMAND_SECONDS,
        check=False,
    )
    if check and done.returncode != 0:
        raise AssertionError(f"{' '.join(argv)}: {done.stderr[-3000:]}")
    return done.stdout


def services(config: str) -> dict[str, dict[str, Any]]:
    """Return the services of `docker compose config --format json`."""
    loaded: dict[str, dict[str, Any]] = json.loads(config)["services"]
    return loaded
