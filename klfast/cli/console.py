"""Output of commands: results on standard output, everything else on standard error."""

from __future__ import annotations

import json
import math
import shlex
import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table


def emit(data: object, text: object, as_json: bool) -> None:
    """Print a result: ``data`` as JSON, or ``text`` (a string, or one or several renderables of rich).

    Strings are flushed, so that what follows on standard error stands below them.
    """
    if as_json:
        print(json.dumps(_finite(data), indent=1, allow_nan=False), flush=True)
    elif isinstance(text, str):
        print(text, flush=True)
    else:
        from rich.console import Console

        # Texts are shown as they are: brackets and colons in a path are no markup.
        console = Console(width=None if sys.stdout.isatty() else 120, highlight=False, markup=False, emoji=False)
        for part in text if isinstance(text, list) else [text]:
            console.print(part, crop=False)  # a table cannot be narrower than its numbers


def say(message: str, as_json: bool = False) -> None:
    """Print a sentence about the progress; on standard error if standard output is for JSON."""
    print(message, file=sys.stderr if as_json else sys.stdout, flush=True)


def table(columns: Sequence[str], rows: Iterable[Sequence[str]], title: str | None = None) -> Table:
    """Return a rich table: the first column aligned left, the others, numbers, aligned right."""
    from rich import box
    from rich.table import Table

    made = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for i, column in enumerate(columns):
        made.add_column(column, justify="right" if i else "left", no_wrap=True)
    for row in rows:
        made.add_row(*row)
    return made


def command(*words: object) -> str:
    """Return a command line for the user to copy, with words quoted where a shell needs it."""
    return shlex.join(map(str, words))


def megabytes(count: float) -> str:
    """Format bytes as megabytes."""
    return f"{count / 1e6:.2f} MB"


def _finite(data: object) -> object:
    """Replace infinities and NaN, which JSON lacks, by None."""
    if isinstance(data, dict):
        return {key: _finite(value) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [_finite(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data
