"""What commands print: results on standard output, everything else on standard error."""

from __future__ import annotations

import json
import math
import shlex
import sys
from collections.abc import Iterable, Sequence


def emit(data: object, text: object, as_json: bool) -> None:
    """Print a result: ``data`` as JSON, or ``text`` (a string, or what rich renders: one thing or a list)."""
    if as_json:
        print(json.dumps(_finite(data), indent=1, allow_nan=False))
    elif isinstance(text, str):
        print(text)
    else:
        from rich.console import Console

        console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
        for part in text if isinstance(text, list) else [text]:
            console.print(part)


def say(message: str, as_json: bool = False) -> None:
    """A sentence about what goes on; on standard error where standard output belongs to JSON."""
    print(message, file=sys.stderr if as_json else sys.stdout, flush=True)


def table(columns: Sequence[str], rows: Iterable[Sequence[str]], title: str | None = None):
    """A rich table: the first column to the left, the others, numbers, to the right."""
    from rich import box
    from rich.table import Table

    made = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for i, column in enumerate(columns):
        made.add_column(column, justify="right" if i else "left", no_wrap=True)
    for row in rows:
        made.add_row(*row)
    return made


def command(*words: object) -> str:
    """A command line for the user to copy: each word quoted where a shell needs it."""
    return shlex.join(map(str, words))


def megabytes(count: float) -> str:
    return f"{count / 1e6:.2f} MB"


def _finite(data: object) -> object:
    """JSON has no infinities and no NaN: these become null."""
    if isinstance(data, dict):
        return {key: _finite(value) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [_finite(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data
