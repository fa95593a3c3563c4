"""The two services share a topic and nothing else."""

import re
import subprocess
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
TABLES = {
    "order": {
        "products",
        "orders",
        "order_items",
        "outbox",
        "idempotency_keys",
        "readback_positions",
    },
    "mail": {
        "deliveries",
        "campaigns",
        "dead_letters",
        "positions",
        "replicas",
        "gaps",
        "control",
    },
}
OTHER = {"order": "mail", "mail": "order"}
AFTER_SQL_WORD = re.compile(r"\b(?:FROM|JOIN|INTO|UPDATE|TABLE)\s+(\w+)")


def sources(service: str) -> dict[Path, str]:
    return {
        path: path.read_text() for path in (REPOSITORY / f"{service}_service/src").rglob("*.py")
    }


@pytest.mark.parametrize("service", TABLES)
def test_a_service_names_its_own_tables(service: str) -> None:
    """The table lists of this test are those of the models, so the next test can be believed."""
    models = (REPOSITORY / f"{service}_service/src/{service}_service/models.py").read_text()
    assert TABLES[service] == set(re.findall(r'__tablename__ = "(\w+)"', models))


@pytest.mark.parametrize("service", TABLES)
def test_no_table_of_the_other_service_is_in_its_sql(service: str) -> None:
    """No statement reads or writes what belongs to the other."""
    found = {
        (path.name, table)
        for path, text in sources(service).items()
        for table in AFTER_SQL_WORD.findall(text)
        if table in TABLES[OTHER[service]]
    }
    assert set() == found


@pytest.mark.parametrize("service", TABLES)
def test_the_other_service_is_not_imported(service: str) -> None:
    """Neither package names the other one in an import."""
    other = re.compile(rf"^\s*(?:from|import)\s+{OTHER[service]}_service", re.MULTILINE)
    assert [path.name for path, text in sources(service).items() if other.search(text)] == []


def test_the_mail_service_has_no_producer() -> None:
    """Nothing in the mail service can write to Kafka."""
    assert [path.name for path, text in sources("mail").items() if "Producer" in text] == []


@pytest.mark.parametrize(
    ("service", "word", "file"),
    [
        ("order", "confluent_kafka", "kafka.py"),
        ("mail", "confluent_kafka", "kafka.py"),
        ("order", "os.environ", "settings.py"),
        ("mail", "os.environ", "settings.py"),
        ("mail", "smtplib", "smtp.py"),
    ],
)
def test_one_file_knows_each_outside_thing(service: str, word: str, file: str) -> None:
    """Kafka, the environment and SMTP are each in one file."""
    assert [file] == [path.name for path, text in sources(service).items() if word in text]


@pytest.mark.parametrize("service", TABLES)
def test_a_service_is_installed_without_the_other(service: str) -> None:
    """In a service's own environment the other one cannot be imported."""
    python = REPOSITORY / f".venv/{service}/bin/python"
    other = f"{OTHER[service]}_service"
    program = (
        "import importlib.util, sys;"
        f"import {service}_service.cli;"
        f"sys.exit(importlib.util.find_spec({other!r}) is not None)"
    )
    done = subprocess.run([python, "-I", "-c", program], cwd="/", check=False, timeout=30)
    assert done.returncode == 0
