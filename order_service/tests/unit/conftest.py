import json
import time
from collections.abc import Callable
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any
from uuid import UUID

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import rsa
from flask import Flask
from flask.testing import FlaskClient

from order_service.app import create_app
from order_service.events import Item, PlacedOrder
from order_service.operate.token import KEY_ID, signing_key
from order_service.settings import Settings

CONTRACT = Path(__file__).parents[3] / "shared_schemas"


@pytest.fixture(scope="session")
def contract() -> Path:
    """Give the folder of the wire contract."""
    return CONTRACT


@pytest.fixture(scope="session")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Give the variables of a service whose database and broker nobody serves."""
    return {
        "APP_ENV": "test",
        "DATABASE_URL": "postgresql://nobody@127.0.0.1:1/none",
        "KAFKA_BOOTSTRAP_SERVERS": "127.0.0.1:1",
        "AUTH_ISSUER": "https://issuer.example",
        "AUTH_AUDIENCE": "order-service",
        "AUTH_JWKS": str(tmp_path_factory.mktemp("keys") / "jwks.json"),
    }


@pytest.fixture(scope="session")
def settings(environment: dict[str, str]) -> Settings:
    """Give the settings read from that environment."""
    return Settings.from_environment(environment)


@pytest.fixture(scope="session")
def key(settings: Settings) -> rsa.RSAPrivateKey:
    """Give the issuer's key; its public half is in AUTH_JWKS."""
    return signing_key(Path(settings.auth_jwks))


@pytest.fixture(scope="session")
def claims(settings: Settings) -> dict[str, Any]:
    """Give the claims of a token that is good."""
    return {
        "iss": settings.auth_issuer,
        "aud": settings.auth_audience,
        "sub": "user-7",
        "scope": "orders:read orders:write",
        "exp": int(time.time()) + 600,
    }


@pytest.fixture(scope="session")
def sign(key: rsa.RSAPrivateKey, claims: dict[str, Any]) -> Callable[..., str]:
    """Give a function that issues a token, with claims changed or, by None, left out."""

    def issue(*, kid: str = KEY_ID, **changed: Any) -> str:
        whole = {name: value for name, value in (claims | changed).items() if value is not None}
        return jwt.encode(whole, key, algorithm="RS256", headers={"kid": kid})

    return issue


@pytest.fixture
def client(settings: Settings) -> FlaskClient:
    """Give a client of an application that finds no database."""
    app: Flask = create_app(settings)
    return app.test_client()


@pytest.fixture
def post(client: FlaskClient, sign: Callable[..., str]) -> Callable[..., Any]:
    """Give a function that posts a body, good token and key in the headers, as an order."""

    def send(body: Any, **headers: str) -> Any:
        authorized = {"Authorization": f"Bearer {sign()}", "Idempotency-Key": "key-1"}
        raw = body if isinstance(body, str | bytes) else json.dumps(body)
        return client.post(
            "/v1/orders", data=raw, content_type="application/json", headers=authorized | headers
        )

    return send


@pytest.fixture
def order() -> PlacedOrder:
    """Give an accepted order of two lines, one of them named in Korean."""
    return PlacedOrder(
        id=UUID("01936f6e-7c1a-7000-8000-000000000001"),
        user_id="user-7",
        email="minji@example.com",
        locale="ko",
        currency="KRW",
        amount=Decimal(57000),
        ordered_at=datetime(2026, 11, 21, 9, 0, 0, 123456, tzinfo=UTC),
        items=[
            Item("TEA-GREEN-50", "녹차 50g", 2, Decimal(12000)),
            Item("CUP-WHITE", "백자 찻잔", 1, Decimal(33000)),
        ],
    )
