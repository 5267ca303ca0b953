"""Progress of long work: a bar on a terminal, a callback, or nothing."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Progress = bool | None | Callable[[int, int, str], None]


@contextmanager
def reporter(progress: Progress, title: str, total: int, done: int = 0) -> Iterator[Callable[[int, str], None]]:
    """Yield ``advance(steps, what)``, to be called after each piece of work.

    Args:
        progress: True for a bar on stderr, False for none, None for one if stderr is a terminal; or a function that is
            called with (done, total, what).
        title: what the bar is called.
        total: steps in all.
        done: steps that an earlier run has done.
    """
    if callable(progress):

        def advance(steps: int, what: str) -> None:
            nonlocal done
            done += steps
            progress(done, total, what)

        yield advance
    elif progress or (progress is None and sys.stderr.isatty()):
        from rich import progress as bars
        from rich.console import Console

        columns = (bars.TextColumn("{task.description}"), bars.BarColumn(), bars.MofNCompleteColumn(), bars.TimeRemainingColumn(), bars.TextColumn("{task.fields[what]}"))
        with bars.Progress(*columns, console=Console(stderr=True)) as bar:
            task = bar.add_task(title, total=total, completed=done, what="")
            yield lambda steps, what: bar.update(task, advance=steps, what=what)
    else:
        yield lambda steps, what: None
