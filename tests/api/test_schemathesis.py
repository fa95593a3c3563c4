"""What the API says of itself is so, for thousands of generated requests (schemathesis)."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.api.service import CANARY_USER, Api, counts

PROGRAM = Path(sys.executable).with_name("schemathesis")
CONFIG = Path(__file__).with_name("schemathesis.toml")
# `make fuzz` asks for more.
CASES = int(os.environ.get("FUZZ_CASES", "1500"))
# The operations and the links between them make about so many cases of each example.
CASES_OF_AN_EXAMPLE = 10
SECONDS = 60 + CASES // 10


@pytest.mark.timeout(SECONDS + 60)
def test_the_api_is_as_its_description_says(api: Api, cursor: Any, tmp_path: Path) -> None:
    """In all phases and by all checks there is no failure; what was stored is whole orders."""
    report = tmp_path / "report.json"
    done = subprocess.run(
        [
            PROGRAM,
            f"--config-file={CONFIG}",
            "run",
            f"{api.pair.api_url}/openapi.json",
            f"--header=Authorization: Bearer {api.token(CANARY_USER)}",
            f"--max-examples={CASES // CASES_OF_AN_EXAMPLE}",
            f"--report-json-path={report}",
            "--no-color",
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    summary = json.loads(report.read_text())
    assert summary["test_cases"]["generated"] >= CASES
    assert not summary["failures"]
    assert not summary["errors"]
    assert {phase["status"] for phase in summary["phases"].values()} == {"success"}
    assert summary["operations"]["tested"] == summary["operations"]["total"] > 0
    placed = summary["valid_rates"]["POST /v1/orders"]["fuzzing"]["accepted"]
    assert placed > 0, "no generated order was one"
    rows = counts(cursor)
    assert rows["orders"] == rows["outbox"] == rows["idempotency_keys"] <= rows["order_items"]
