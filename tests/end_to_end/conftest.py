"""One running pair for all end-to-end tests."""

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from deploy.embedded.state import fresh_root
from tests.support.world import World, running

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def world() -> Iterator[World]:
    with fresh_root(REPOSITORY / ".run") as root, running(root) as world:
        yield world


@pytest.fixture(scope="session")
def alice(world: World) -> Iterator[httpx.Client]:
    with world.client("alice") as client:
        yield client


@pytest.fixture(scope="session")
def bob(world: World) -> Iterator[httpx.Client]:
    with world.client("bob") as client:
        yield client
