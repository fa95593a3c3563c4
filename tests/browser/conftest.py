"""One running pair and one browser for all tests of this folder; without one they are skipped."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from selenium.webdriver import Chrome

from deploy.embedded.state import fresh_root
from tests.support.browser import browser_fault, chromium
from tests.support.world import World, running

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chrome]:
    fault = browser_fault()
    if fault and os.environ.get("REQUIRE_BROWSER") == "1":
        pytest.fail(f"REQUIRE_BROWSER is set, and {fault}")
    if fault:
        pytest.skip(f"no browser: {fault}")
    with chromium(tmp_path_factory.mktemp("profile")) as browser:
        yield browser


@pytest.fixture(scope="session")
def world(browser: Chrome) -> Iterator[World]:
    with fresh_root(REPOSITORY / ".run") as root, running(root) as world:
        yield world
