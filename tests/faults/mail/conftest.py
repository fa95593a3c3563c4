"""One mail service on breakable parts for all directed faults; every test finds it whole."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from deploy.embedded.state import fresh_root
from tests.support.mail_side import MailSide, running

REPOSITORY = Path(__file__).parents[3]


@pytest.fixture(scope="session")
def parts() -> Iterator[MailSide]:
    with fresh_root(REPOSITORY / ".run") as root, running(root / "stack") as side:
        yield side


@pytest.fixture
def side(parts: MailSide) -> MailSide:
    parts.reset()
    return parts
