"""The AsyncAPI document says what the topic's declaration and the schema say."""

from pathlib import Path
from typing import Any

import pytest
import yaml

CONTRACT = Path(__file__).parents[2] / "shared_schemas"


@pytest.fixture(scope="module")
def document() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((CONTRACT / "asyncapi.yaml").read_text())
    return loaded


@pytest.fixture(scope="module")
def topic() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((CONTRACT / "topics/order-created.yaml").read_text())
    return loaded


def test_every_topic_is_a_channel(document: dict[str, Any]) -> None:
    """No topic is left out, none is invented."""
    addresses = {channel["address"] for channel in document["channels"].values()}
    assert addresses == {path.stem for path in CONTRACT.glob("topics/*.yaml")}


def test_the_channel_is_the_topic(document: dict[str, Any], topic: dict[str, Any]) -> None:
    """Partitions, replicas and settings are those of the declaration."""
    binding = document["channels"]["orderCreated"]["bindings"]["kafka"]
    assert (binding["topic"], binding["partitions"], binding["replicas"]) == (
        topic["name"],
        topic["partitions"],
        topic["replication"],
    )
    settings = topic["settings"]
    assert binding["topicConfiguration"] == {
        "cleanup.policy": [settings["cleanup.policy"]],
        "retention.ms": settings["retention.ms"],
    }


def test_every_event_type_is_a_message_with_its_schema(
    document: dict[str, Any], topic: dict[str, Any]
) -> None:
    """A message is named like the type and refers to the same file."""
    messages = document["components"]["messages"].values()
    described = {message["name"]: message["payload"]["schema"]["$ref"] for message in messages}
    assert described == topic["types"]


def test_every_reference_inside_leads_somewhere(document: dict[str, Any]) -> None:
    """A `$ref` names a part of the document, or a file."""

    def references(node: object) -> list[str]:
        if isinstance(node, dict):
            own = [node["$ref"]] if "$ref" in node else []
            return own + [found for value in node.values() for found in references(value)]
        if isinstance(node, list):
            return [found for value in node for found in references(value)]
        return []

    for reference in references(document):
        target: Any = document
        if reference.startswith("#/"):
            for step in reference.removeprefix("#/").split("/"):
                target = target[step]
        else:
            assert (CONTRACT / reference).exists(), reference


def test_who_sends_and_who_receives(document: dict[str, Any], topic: dict[str, Any]) -> None:
    """One operation for each writer and each reader."""
    actions = [operation["action"] for operation in document["operations"].values()]
    assert actions.count("send") == len(topic["written_by"])
    assert actions.count("receive") == len(topic["read_by"])
