"""One order service on breakable parts for all directed faults; every test finds it whole."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from deploy.embedded.state import fresh_root
from tests.support.order_side import OrderSide, running

REPOSITORY = Path(__file__).parents[3]


@pytest.fixture(scope="session")
def parts() -> Iterator[OrderSide]:
    with fresh_root(REPOSITORY / ".run") as root, running(root / "stack") as side:
        yield side


@pytest.fixture
def side(parts: OrderSide) -> OrderSide:
    parts.reset()
    return parts
