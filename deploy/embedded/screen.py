"""What a person sees of the stack: one line for each part, alive on a terminal, plain in a log."""

import threading
import time
from dataclasses import dataclass, field

from rich.console import Console, RenderableType
from rich.live import Live
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from deploy.embedded.stack import Phase

MARKS = {
    Phase.READY: Text("✓", style="green"),
    Phase.DONE: Text("✓", style="green"),
    Phase.FAILED: Text("✗", style="red"),
    Phase.DIED: Text("✗", style="red"),
    Phase.STOPPED: Text("·"),
}
REFRESHES_PER_SECOND = 10


@dataclass
class Row:
    """What is shown of one part or job."""

    phase: Phase
    detail: str
    began_at: float = field(default_factory=time.monotonic)
    seconds: float = 0.0


class Screen:
    """Shows every change; inside the `with` block as a table, if this is a terminal."""

    def __init__(self, console: Console) -> None:
        """Show nothing yet."""
        self._console = console
        self._rows: dict[str, Row] = {}
        self._lock = threading.Lock()
        self._spinner = Spinner("dots")
        self._live: Live | None = None

    def __enter__(self) -> None:
        """Begin the table."""
        if self._console.is_terminal:
            self._live = Live(
                get_renderable=self._table,
                console=self._console,
                refresh_per_second=REFRESHES_PER_SECOND,
            )
            self._live.start()

    def __exit__(self, *_: object) -> None:
        """Leave the table standing; later changes are lines below it."""
        if self._live:
            self._live.stop()
            self._live = None

    def changed(self, name: str, phase: Phase, detail: str) -> None:
        """Show that this part or job is in this phase now."""
        headline = detail.partition("\n")[0]
        with self._lock:
            row = self._rows.setdefault(name, Row(phase, headline))
            if phase is Phase.WAITING or row.phase in {Phase.READY, Phase.STOPPED}:
                row.began_at = time.monotonic()
            row.phase, row.detail = phase, headline
            row.seconds = time.monotonic() - row.began_at
            if not self._live and phase not in {Phase.WAITING, Phase.STOPPED}:
                self._console.print(_line(name, row))

    def _table(self) -> RenderableType:
        table = Table.grid(padding=(0, 1))
        with self._lock:
            for name, row in self._rows.items():
                if row.phase in {Phase.WAITING, Phase.STARTING}:
                    row.seconds = time.monotonic() - row.began_at
                mark = MARKS.get(row.phase, self._spinner)
                text = Text(row.detail or row.phase.value)
                table.add_row(mark, name, Text(f"{row.seconds:5.1f} s", style="dim"), text)
        return table


def _line(name: str, row: Row) -> Text:
    mark = MARKS.get(row.phase, Text("·"))
    detail = row.detail or row.phase.value
    return Text.assemble(mark, f" {name:12} {row.seconds:5.1f} s  {detail}")
