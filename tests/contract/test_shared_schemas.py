"""The contract is whole: schemas are valid, examples are what they claim, nothing is an orphan."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator

CONTRACT = Path(__file__).parents[2] / "shared_schemas"
TOPICS = sorted(CONTRACT.glob("topics/*.yaml"))
SCHEMAS = sorted(CONTRACT.glob("events/*.json"))
VALID = sorted(CONTRACT.glob("examples/valid/*.json"))
INVALID = sorted(CONTRACT.glob("examples/invalid/*.json"))


def validator() -> Draft202012Validator:
    (schema,) = SCHEMAS
    return Draft202012Validator(
        json.loads(schema.read_text()), format_checker=Draft202012Validator.FORMAT_CHECKER
    )


def example(path: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads(path.read_text())
    return loaded


@pytest.mark.parametrize("path", SCHEMAS, ids=lambda path: path.name)
def test_a_schema_is_valid_json_schema(path: Path) -> None:
    """Every schema obeys the 2020-12 meta-schema."""
    Draft202012Validator.check_schema(json.loads(path.read_text()))


@pytest.mark.parametrize("path", VALID, ids=lambda path: path.name)
def test_a_valid_example_matches_its_schema(path: Path) -> None:
    """Every valid example's value is accepted."""
    assert list(validator().iter_errors(example(path)["value"])) == []


@pytest.mark.parametrize("path", INVALID, ids=lambda path: path.name)
def test_an_invalid_example_is_refused_by_whom_it_says(path: Path) -> None:
    """Every invalid example fails the schema, or says that only a reader can see its fault."""
    content = example(path)
    is_accepted = validator().is_valid(content["value"])
    assert is_accepted == (content.get("seen_by") == "reader")


@pytest.mark.parametrize("path", [*VALID, *INVALID], ids=lambda path: path.name)
def test_an_example_holds_no_real_address(path: Path) -> None:
    """Every address in the examples is of a domain kept for documentation."""
    assert "@" not in path.read_text().replace("@example.com", "")


def test_every_schema_belongs_to_a_topic_and_every_topic_has_its_schema() -> None:
    """The files the topics name are exactly the files there are."""
    declared = {
        CONTRACT / path
        for topic in TOPICS
        for path in yaml.safe_load(topic.read_text())["types"].values()
    }
    assert declared == set(SCHEMAS)


def test_a_topic_is_named_like_its_file_and_says_who_uses_it() -> None:
    """A topic's declaration names key, writers and readers."""
    for path in TOPICS:
        topic = yaml.safe_load(path.read_text())
        assert path.stem == topic["name"]
        assert topic["description"]
        assert topic["key"]
        assert topic["written_by"] == ["order_service"]
        assert topic["read_by"]


def test_within_a_version_a_reader_may_meet_fields_it_does_not_know() -> None:
    """No object of the schema is closed: adding an optional field is not a breaking change."""
    (schema,) = SCHEMAS
    assert "additionalProperties" not in schema.read_text()
    assert "unevaluatedProperties" not in schema.read_text()


def test_the_schema_id_ends_in_the_version_of_its_file() -> None:
    """`order-created.v1.json` is `urn:order-created:v1`."""
    for path in SCHEMAS:
        name, _, version = path.stem.rpartition(".")
        assert f"urn:{name}:{version}" == json.loads(path.read_text())["$id"]
