"""What the tests of the embedded stack share."""

from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give a state directory that PostgreSQL's user may enter when we are root."""
    directory = tmp_path_factory.mktemp("stack")
    for parent in (directory, directory.parent, directory.parent.parent):
        parent.chmod(0o755)
    return directory
