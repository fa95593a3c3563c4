"""One running API for all tests of this folder; the search of its logs comes last."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from deploy.embedded.state import fresh_root
from tests.api.service import CANARY_USER, Api, running

REPOSITORY = Path(__file__).parents[2]
LAST = "test_the_logs.py"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Search the logs after everything that could have written into them."""
    items.sort(key=lambda item: item.path.name == LAST)


@pytest.fixture(scope="session")
def api() -> Iterator[Api]:
    with fresh_root(REPOSITORY / ".run") as root, running(root) as api:
        yield api


@pytest.fixture(scope="session")
def token(api: Api) -> str:
    return api.token(CANARY_USER)


@pytest.fixture(scope="session")
def cursor(api: Api) -> Iterator[Any]:
    with api.database() as cursor:
        yield cursor


@pytest.fixture(scope="session")
def client(api: Api) -> Iterator[httpx.Client]:
    with api.client(CANARY_USER) as client:
        yield client


@pytest.fixture(scope="session")
def alice(api: Api) -> Iterator[httpx.Client]:
    with api.client("alice") as client:
        yield client


@pytest.fixture(scope="session")
def bob(api: Api) -> Iterator[httpx.Client]:
    with api.client("bob") as client:
        yield client
