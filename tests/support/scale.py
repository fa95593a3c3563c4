"""How many: the catalogue's own counts in `make test-long`, a tenth of them in `make test`."""

import os

IS_LONG = os.environ.get("TEST_LONG") == "1"
SHARE = 10


def scaled(literal: int) -> int:
    """Return a count of the catalogue as it stands there in a long run, else a tenth."""
    return literal if IS_LONG else literal // SHARE
