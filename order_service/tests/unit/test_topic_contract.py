from pathlib import Path
from typing import Any

import pytest
import yaml

from order_service import events, kafka


@pytest.fixture
def declared(contract: Path) -> dict[str, Any]:
    """Give the topic as the contract declares it."""
    content: dict[str, Any] = yaml.safe_load(
        (contract / "topics/order-created.yaml").read_text(encoding="utf-8")
    )
    return content


def test_name_and_partitions_are_as_declared(declared: dict[str, Any]) -> None:
    """`topics ensure` creates the topic that the contract names."""
    assert (declared["name"], declared["partitions"]) == (kafka.TOPIC, kafka.PARTITIONS)


def test_replication_is_as_declared(declared: dict[str, Any]) -> None:
    """The promise wants three replicas, two of them in sync."""
    assert (
        declared["replication"],
        declared["settings"]["min.insync.replicas"],
    ) == (kafka.REPLICATION_WANTED, kafka.MIN_INSYNC_REPLICAS_WANTED)


def test_settings_are_as_declared(declared: dict[str, Any]) -> None:
    """Retention, segments and clean-up have one source; ours is a copy that this compares."""
    settings = {name: str(value) for name, value in declared["settings"].items()}
    del settings["min.insync.replicas"]
    assert settings == kafka.TOPIC_SETTINGS


def test_the_type_we_write_is_declared(declared: dict[str, Any]) -> None:
    """Every type in the topic has a schema, ours included."""
    assert declared["types"] == {events.TYPE: "events/order-created.v1.json"}


def test_we_are_declared_as_the_writer(declared: dict[str, Any]) -> None:
    """The contract says who writes: this service, and nobody else."""
    assert declared["written_by"] == ["order_service"]
