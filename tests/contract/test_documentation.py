"""What the documents say is what is there."""

import re
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
LINK = re.compile(r"\]\(([^)#:]+)\)")
DOCUMENTS = sorted(
    path
    for path in REPOSITORY.glob("**/*.md")
    if not {".venv", ".run", ".pytest_cache"} & set(path.parts)
)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_every_link_leads_somewhere(path: Path) -> None:
    """A relative link names a file or folder that exists."""
    targets = LINK.findall(path.read_text())
    assert [target for target in targets if not (path.parent / target).exists()] == []


@pytest.mark.parametrize("service", ["order", "mail"])
def test_every_setting_is_in_the_readme(service: str) -> None:
    """The table of settings names exactly what the service reads."""
    folder = REPOSITORY / f"{service}_service"
    code = (folder / f"src/{service}_service/settings.py").read_text()
    table = (folder / "README.md").read_text().partition("## Settings")[2].partition("| name |")[2]
    rows = re.findall(r"^\|([^|]*)\|", table, re.MULTILINE)
    documented = {name for row in rows for name in re.findall(r"`([A-Z_]+)`", row)}
    read = set(re.findall(r'data_key="([A-Z_]+)"', code)) | {"KAFKA_BOOTSTRAP_SERVERS"}
    assert documented == read


def test_every_make_target_in_the_documents_exists() -> None:
    """`make X` is only written of targets the Makefile has."""
    targets = set(re.findall(r"^([a-z-]+):", (REPOSITORY / "Makefile").read_text(), re.MULTILINE))
    named = {
        target
        for path in DOCUMENTS
        for target in re.findall(r"(?:`|^)make ([a-z-]+)", path.read_text(), re.MULTILINE)
    }
    assert named - targets == set()


def test_every_command_in_the_readmes_exists() -> None:
    """The tables of commands name what the services' own help lists."""
    for service in ("order", "mail"):
        text = (REPOSITORY / f"{service}_service/README.md").read_text()
        named = set(re.findall(rf"`{service}-service ([a-z-]+)", text))
        cli = (REPOSITORY / f"{service}_service/src/{service}_service/cli.py").read_text()
        (listed,) = re.findall(r"^for job in \(([^)]*)\)", cli, re.MULTILINE)
        jobs = {name.replace("_", "-") for name in re.findall(r"\w+", listed)}
        processes = {"api", "relay"} if service == "order" else {"consume"}
        assert named == jobs | processes
