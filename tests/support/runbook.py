"""`docs/runbook.md` as the tests read it: its sections with their commands, and what it names."""

import re
from collections.abc import Iterator
from pathlib import Path

RUNBOOK = Path(__file__).parents[2] / "docs/runbook.md"
HEADING = "## "
FENCE = "```"
SPAN = re.compile(r"`([^`\n]+)`")

Block = list[str]


def blocks() -> dict[str, list[Block]]:
    """Return the lines of each block of commands, by the section's heading."""
    found: dict[str, list[Block]] = {}
    heading, is_inside = "", False
    for line in RUNBOOK.read_text(encoding="utf-8").splitlines():
        if line.startswith(FENCE):
            is_inside = not is_inside
            if is_inside:
                assert line == f"{FENCE}sh", f"{heading}: a block that is no commands"
                found.setdefault(heading, []).append([])
        elif is_inside:
            found[heading][-1].append(line)
        elif line.startswith(HEADING):
            heading = line.removeprefix(HEADING)
    return found


def spans() -> Iterator[str]:
    """Yield what stands as code in the prose and in the tables."""
    is_inside = False
    for line in RUNBOOK.read_text(encoding="utf-8").splitlines():
        if line.startswith(FENCE):
            is_inside = not is_inside
        elif not is_inside:
            assert line.count("`") % 2 == 0, f"code that is broken over two lines: {line}"
            yield from SPAN.findall(line.removeprefix(HEADING))
