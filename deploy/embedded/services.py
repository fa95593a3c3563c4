"""The pair on the stack: migrations and topic first, then api, relay and mail replicas."""

import os
from collections.abc import Mapping
from dataclasses import dataclass

import httpx

from deploy.embedded.infrastructure import Addresses
from deploy.embedded.jars import REPOSITORY
from deploy.embedded.part import Command, Job, Part
from deploy.embedded.ports import HOST, Ports
from deploy.embedded.stack import Stack
from deploy.embedded.state import State

ORDER_SERVICE = REPOSITORY / ".venv/order/bin/order-service"
MAIL_SERVICE = REPOSITORY / ".venv/mail/bin/mail-service"
PRODUCTS = REPOSITORY / "deploy/products.csv"
PROBE_TIMEOUT_SECONDS = 2.0
# A replica awaits answers for 30 s before it leaves.
STOP_SECONDS = 40.0
# The group lets a replica in only after one that vanished has been away for 45 s.
REPLICA_READY_SECONDS = 100.0


@dataclass(frozen=True, kw_only=True)
class Pair:
    """The running pair: where the API answers, and what both services' commands need."""

    api_url: str
    order_environment: Mapping[str, str]
    mail_environment: Mapping[str, str]


def add_pair(
    stack: Stack,
    ports: Ports,
    addresses: Addresses,
    *,
    app_env: str = "development",
    mail_replicas: int = 2,
) -> Pair:
    """Add both services to a stack that has the infrastructure."""
    http_port, api_probe_port = ports.choose(8000), ports.choose(8001)
    order = _order_environment(stack.state, addresses, app_env) | {"HTTP_PORT": str(http_port)}
    mail = _mail_environment(addresses, app_env)
    state = stack.state
    stack.add(_job(state, "order-migrate", order, str(ORDER_SERVICE), "migrate"), ["order-db"])
    stack.add(_job(state, "order-topics", order, str(ORDER_SERVICE), "topics", "ensure"), ["kafka"])
    stack.add(
        _job(state, "order-products", order, str(ORDER_SERVICE), "products", "load", str(PRODUCTS)),
        ["order-migrate"],
    )
    stack.add(_job(state, "mail-migrate", mail, str(MAIL_SERVICE), "migrate"), ["mail-db"])
    stack.add(
        _service(state, "order-api", order, api_probe_port, str(ORDER_SERVICE), "api"),
        ["order-products"],
    )
    stack.add(
        _service(state, "order-relay", order, ports.choose(8002), str(ORDER_SERVICE), "relay"),
        ["order-migrate", "order-topics"],
    )
    pair = Pair(
        api_url=f"http://{HOST}:{http_port}", order_environment=order, mail_environment=mail
    )
    for number in range(1, mail_replicas + 1):
        add_replica(stack, ports, pair, number)
    return pair


def replica(number: int) -> str:
    """Name a mail replica."""
    return f"mail-{number}"


def add_replica(stack: Stack, ports: Ports, pair: Pair, number: int) -> None:
    """Add a mail replica to a stack that has the pair."""
    port, argv = ports.choose(8010 + number), (str(MAIL_SERVICE), "consume")
    part = _service(stack.state, replica(number), pair.mail_environment, port, *argv)
    part.ready_seconds = REPLICA_READY_SECONDS
    stack.add(part, ["mail-migrate", "order-topics"])


def _order_environment(state: State, addresses: Addresses, app_env: str) -> dict[str, str]:
    return {
        "PATH": os.environ.get("PATH", ""),
        "APP_ENV": app_env,
        "DATABASE_URL": addresses.order_database_url,
        "KAFKA_BOOTSTRAP_SERVERS": addresses.kafka_bootstrap_servers,
        "AUTH_ISSUER": "urn:order-service:development",
        "AUTH_AUDIENCE": "order-service",
        "AUTH_JWKS": str(state.data("order-keys") / "jwks.json"),
        "SHOP_CURRENCY": "KRW",
        # Whoever plays with it orders more than a customer does.
        "ORDERS_PER_USER_PER_MINUTE": "100000",
        "ORDERS_PER_RECIPIENT_PER_HOUR": "100000",
    }


def _mail_environment(addresses: Addresses, app_env: str) -> dict[str, str]:
    return {
        "PATH": os.environ.get("PATH", ""),
        "APP_ENV": app_env,
        "DATABASE_URL": addresses.mail_database_url,
        "KAFKA_BOOTSTRAP_SERVERS": addresses.kafka_bootstrap_servers,
        "SMTP_HOST": addresses.smtp_host,
        "SMTP_PORT": str(addresses.smtp_port),
        "SMTP_TLS": "off",
        "MAIL_FROM": "orders@teahouse.example",
        # The relay is the inbox: nothing leaves this machine.
        "MAIL_ONLY_TO": "*",
        "SHOP_NAME": "차 한 잔 Teahouse",
        "SHOP_URL": "https://teahouse.example",
    }


def _job(state: State, name: str, environment: Mapping[str, str], *argv: str) -> Job:
    return Job(name=name, command=Command(argv=argv, env=environment, log_path=state.log(name)))


def _service(
    state: State, name: str, environment: Mapping[str, str], probe_port: int, *argv: str
) -> Part:
    return Part(
        name=name,
        command=Command(
            argv=argv,
            env={**environment, "PROBE_PORT": str(probe_port)},
            log_path=state.log(name),
        ),
        pid_path=state.pid(name),
        is_ready=lambda: _is_ready(probe_port),
        stop_seconds=STOP_SECONDS,
    )


def _is_ready(port: int) -> bool:
    try:
        answer = httpx.get(f"http://{HOST}:{port}/readyz", timeout=PROBE_TIMEOUT_SECONDS)
    except httpx.HTTPError:
        return False
    return answer.status_code == httpx.codes.OK
