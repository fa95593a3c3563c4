"""How PostgreSQL runs the outbox's statements; runs in the order service's environment.

One JSON object: by function, its milliseconds, the indexes used, and the scans that use none.
"""

import json
import sys
from collections.abc import Callable, Iterator
from typing import Any

from sqlalchemy import Connection, event

from order_service import outbox
from order_service.models import make_engine
from order_service.relay import BATCH_ROWS
from order_service.settings import Settings

TRIES = 3

engine = make_engine(Settings.from_environment().database_url)


def nodes(plan: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Give a node of a plan and all below it."""
    yield plan
    for inner in plan.get("Plans", ()):
        yield from nodes(inner)


def plans(call: Callable[[Connection], object]) -> dict[str, Any]:
    """Explain each statement as it is executed, with its values, and take all back.

    The fastest of some tries tells how long it takes: the others waited for a busy machine.
    """
    return min((_explained(call) for _ in range(TRIES)), key=lambda one: one["milliseconds"])


def _explained(call: Callable[[Connection], object]) -> dict[str, Any]:
    found: list[Any] = []

    def explain(_: Any, cursor: Any, statement: str, values: Any, *__: Any) -> None:
        cursor.execute(f"EXPLAIN (ANALYZE, FORMAT JSON) {statement}", values)
        found.append(cursor.fetchone()[0][0])

    with engine.connect() as connection:
        event.listen(connection, "before_cursor_execute", explain)
        call(connection)
        connection.rollback()
    all_nodes = [node for each in found for node in nodes(each["Plan"])]
    return {
        "milliseconds": sum(each["Execution Time"] + each["Planning Time"] for each in found),
        "indexes": sorted({node["Index Name"] for node in all_nodes if "Index Name" in node}),
        "scanned": sorted(
            {node["Relation Name"] for node in all_nodes if node["Node Type"] == "Seq Scan"}
        ),
    }


with engine.connect() as reader:
    published = outbox.select_published(reader, after=None, limit=1_000)
result = {
    "select_init": plans(lambda on: outbox.select_init(on, after=None, limit=BATCH_ROWS)),
    "select_published": plans(lambda on: outbox.select_published(on, after=None, limit=1_000)),
    "republish_lost": plans(
        lambda on: outbox.republish_lost(on, topic_id="new", published=published, end_offsets={})
    ),
    "backlog": plans(outbox.backlog),
    "purge": plans(outbox.purge),
}
sys.stdout.write(json.dumps(result))
