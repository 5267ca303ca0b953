"""Tables as plain data, Markdown, JSON, or rich for a terminal."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from klfast.core.io import require_suffix, write_atomic

if TYPE_CHECKING:
    import rich.table


Cell = str | int | float | None
REPORT_SUFFIXES = (".md", ".json")


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

    def rich(self) -> rich.table.Table:
        """Return the table for rich's console."""
        from rich.table import Table as RichTable
        from rich.text import Text

        table = RichTable(title=self.title, title_justify="left")
        for i, heading in enumerate(self.headings):
            table.add_column(heading, justify="right" if self.is_numeric(i) else "left")
        for row in self.rows:
            table.add_row(*(Text(shown(cell)) for cell in row))
        return table

    def is_numeric(self, column: int) -> bool:
        """Return True if a column holds numbers alone."""
        return all(row[column] is None or isinstance(row[column], (int, float)) for row in self.rows)


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
