"""Tables as plain data, Markdown, JSON, or rich for a terminal."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from klfast.core.io import require_suffix, write_atomic

if TYPE_CHECKING:
    import rich.console

Cell = str | int | float | None
REPORT_SUFFIXES = (".md", ".json")
_FOLDED = 8  # the least columns of text and headings on a narrow console


@dataclass(frozen=True)
class Table:
    """Rows of plain values under headings; None is an empty cell. Floats are shown with four significant digits."""

    title: str
    headings: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]

    def data(self) -> dict[str, object]:
        """Return the table for JSON; NaN and infinity, which JSON lacks, become None."""
        rows = [
            [None if isinstance(cell, float) and not math.isfinite(cell) else cell for cell in row] for row in self.rows
        ]
        return {"title": self.title, "headings": list(self.headings), "rows": rows}

    def markdown(self) -> str:
        """Return the table as Markdown."""
        aligned = ["---:" if self.is_numeric(i) else "---" for i in range(len(self.headings))]
        lines = [self.headings, aligned, *([shown(cell).replace("|", "\\|") for cell in row] for row in self.rows)]
        return f"### {self.title}\n\n" + "".join(f"| {' | '.join(line)} |\n" for line in lines)

    def rich(self) -> Folding:
        """Return the table for rich's console."""
        return Folding(self)

    def is_numeric(self, column: int) -> bool:
        """Return True if a column holds numbers alone."""
        return all(row[column] is None or isinstance(row[column], (int, float)) for row in self.rows)


@dataclass(frozen=True)
class Folding:
    """A table for rich's console: where it is narrow, headings and text are folded, and no number is cut.

    A table whose numbers alone are wider than the console is wider, too (print it with ``crop=False``).
    """

    table: Table

    def __rich_console__(self, console: rich.console.Console, options: rich.console.ConsoleOptions) -> Iterator[object]:
        from rich.cells import cell_len
        from rich.table import Table as RichTable
        from rich.text import Text

        rows = [[shown(cell) for cell in row] for row in self.table.rows]
        headings = [cell_len(text) for text in self.table.headings]
        cells = [max((cell_len(row[i]) for row in rows), default=0) for i in range(len(headings))]
        room = options.max_width - 3 * len(headings) - 1  # within lines and a space on both sides of each cell
        is_narrow = sum(map(max, headings, cells)) > room
        made = RichTable(title=self.table.title, title_justify="left")
        least = 0
        for i, heading in enumerate(self.table.headings):
            is_numeric, folded = self.table.is_numeric(i), min(headings[i], _FOLDED)
            width = max(cells[i], folded) if is_numeric and is_narrow else None
            made.add_column(heading, justify="right" if is_numeric else "left", overflow="fold", width=width)
            least += min(max(cells[i], headings[i]), _FOLDED) if width is None else width
        for row in rows:
            made.add_row(*map(Text, row))
        if is_narrow and least > room:
            made.width = options.max_width + least - room
        yield made


def write(path: str | os.PathLike[str], tables: Iterable[Table]) -> None:
    """Write tables as Markdown (.md) or JSON (.json), atomically."""
    require_suffix(path, "a report", REPORT_SUFFIXES)
    if Path(path).suffix == ".md":
        write_atomic(path, "\n".join(table.markdown() for table in tables))
    else:
        write_atomic(path, json.dumps([table.data() for table in tables], indent=1, allow_nan=False) + "\n")


def shown(cell: Cell) -> str:
    """Return a cell as text."""
    if cell is None:
        return ""
    if isinstance(cell, float):
        return "" if math.isnan(cell) else f"{cell:.4g}" if abs(cell) < 1e4 or math.isinf(cell) else f"{cell:,.0f}"
    return f"{cell:,}" if isinstance(cell, int) else cell
