"""What this service's code does not contain."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import mail_service
from mail_service.models import Base

SOURCE = Path(mail_service.__file__).parent
FILES = sorted(SOURCE.rglob("*.py"))
STATEMENT = re.compile(r"\b(SELECT|INSERT|UPDATE|DELETE)\b")
TABLE = re.compile(r"\b(?:FROM|JOIN|INTO|UPDATE)\s+(?!unnest|SET\b|SKIP\b|OF\b)([a-z_]+)\b(?!\()")
# A part of a statement that has a name, as a table has.
NAMED = re.compile(r"\b([a-z_]+) AS \(")


def texts() -> Iterator[str]:
    """Yield every literal in the code."""
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_nothing_here_can_write_to_kafka(path: Path) -> None:
    """The topic is read only: no file names a producer."""
    assert "Producer" not in path.read_text(encoding="utf-8")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_nothing_here_knows_the_order_service(path: Path) -> None:
    """Neither its package nor its database is named."""
    assert not re.search(r"order_service|order-service", path.read_text(encoding="utf-8"))


def test_the_statements_touch_the_ledgers_tables_only() -> None:
    """No table of another service is in any statement."""
    statements = [text for text in texts() if STATEMENT.search(text)]

    touched = {name for statement in statements for name in TABLE.findall(statement)}
    touched -= {name for statement in statements for name in NAMED.findall(statement)}

    assert touched - {"pg_settings", "alembic_version"} == set(Base.metadata.tables)
