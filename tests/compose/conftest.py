"""One compose project for all tests of this folder; without an engine they are skipped."""

import os
from collections.abc import Iterator

import httpx
import pytest

from tests.support.containers import Containers, containers, engine_fault


@pytest.fixture(scope="session")
def project(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Containers]:
    fault = engine_fault()
    if fault and os.environ.get("REQUIRE_DOCKER") == "1":
        pytest.fail(f"REQUIRE_DOCKER is set, and {fault}")
    if fault:
        pytest.skip(f"no container engine: {fault}")
    with containers(tmp_path_factory.mktemp("secrets")) as project:
        yield project


@pytest.fixture(scope="session")
def alice(project: Containers) -> Iterator[httpx.Client]:
    with project.client("alice") as client:
        yield client
