"""Progress of long work: a bar on a terminal, occasional lines elsewhere, a callback, or nothing."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Progress = bool | None | Callable[[int, int, str], None]
FIRST_LINE, NEXT_LINES = 10.0, 30.0  # seconds until the first line, and between any two


class _Estimate:
    """The remaining time, estimated from the share of the work that is done."""

    def __init__(self, total: int, done: int) -> None:
        self.total, self.done, self.start = total, done, time.monotonic()
        self.first = self.share = done / total if total else 1.0
        self._is_new = True

    def advance(self, steps: int, share: float | None) -> None:
        self.done += steps
        self.share = self.done / self.total if share is None else share
        if self._is_new and not steps:
            self.first = self.share
        self._is_new = False

    @property
    def elapsed(self) -> float:
        return time.monotonic() - self.start

    @property
    def left(self) -> str:
        """Text such as ", about 12 min left"; empty while there is no estimate."""
        if self.share <= self.first or self.done >= self.total:
            return ""
        return f", about {duration(self.elapsed * (1 - self.share) / (self.share - self.first))} left"


@contextmanager
def reporter(progress: Progress, title: str, total: int, done: int = 0) -> Iterator[Callable[..., None]]:
    """Yield ``advance(steps, what, share=None)``, to be called after each piece of work.

    ``share`` is the share of all work that is done, 0 to 1, for steps of different length; with 0 steps it reports
    progress within the current step or, at the very start, the work done by an earlier run.

    Args:
        progress: True or None for a bar on stderr if that is a terminal, else a line after 10 s and every 30 s (True
            also prints one at the end); False for nothing; or a function called with (done, total, what) after each
            step.
        title: the label of the bar and the lines.
        total: the number of steps.
        done: steps done by an earlier run.
    """
    if callable(progress):

        def advance(steps: int, what: str, share: float | None = None) -> None:
            nonlocal done
            done += steps
            if steps:
                progress(done, total, what)

        yield advance
    elif progress is False:
        yield lambda steps, what, share=None: None
    elif sys.stderr.isatty():
        with _bar(title, _Estimate(total, done)) as advance:
            yield advance
    else:
        with _lines(title, _Estimate(total, done), bool(progress)) as advance:
            yield advance


@contextmanager
def _bar(title: str, estimate: _Estimate) -> Iterator[Callable[..., None]]:
    from rich import progress as bars
    from rich.console import Console

    told = bars.TextColumn("{task.fields[what]}{task.fields[left]}")
    columns = (bars.TextColumn("{task.description}"), bars.BarColumn(), bars.MofNCompleteColumn(), told)
    with bars.Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(title, total=estimate.total, completed=estimate.done, what="", left="")

        def advance(steps: int, what: str, share: float | None = None) -> None:
            estimate.advance(steps, share)
            bar.update(task, completed=estimate.done, what=what, left=estimate.left)

        yield advance


@contextmanager
def _lines(title: str, estimate: _Estimate, always: bool) -> Iterator[Callable[..., None]]:
    due = FIRST_LINE

    def say(end: str) -> None:
        print(
            f"{title}: {estimate.done}/{estimate.total}, {duration(estimate.elapsed)}{end}", file=sys.stderr, flush=True
        )

    def advance(steps: int, what: str, share: float | None = None) -> None:
        nonlocal due
        estimate.advance(steps, share)
        if estimate.elapsed >= due and estimate.done < estimate.total:
            due = estimate.elapsed + NEXT_LINES
            say(f" so far{estimate.left}{f' ({what})' if what else ''}")

    yield advance
    if always or due > FIRST_LINE:
        say("")


def duration(seconds: float) -> str:
    """Format seconds for people: 45 s, 12 min, 3 h 20 min."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"
