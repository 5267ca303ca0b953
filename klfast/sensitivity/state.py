"""State of a sweep: the sums so far, the next job, and which rows of the tally the rest of the round adds to."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch

from klfast.core import signed_json
from klfast.core.window_stats import WindowStats
from klfast.sensitivity.adaptive import ALLOWED, Schedule, parts_due
from klfast.sensitivity.comparison import COLUMNS
from klfast.sensitivity.steps import Step, from_group
from klfast.sensitivity.unfinished import Unfinished


@dataclass(frozen=True)
class Job:
    """What is measured at once: the candidates of a step that are due, by their rows in the tally, on a micro-batch."""

    micro_batch: int
    step: int
    rows: tuple[int, ...]


class State:
    """How far a sweep is. An exhaustive one goes through the text once, an adaptive one in rounds.

    Args:
        steps: of one micro-batch.
        windows: their number in each micro-batch.
        blocks: of the network.
        schedule: of an adaptive sweep.

    Attributes:
        tally: sums of ``COLUMNS``, row by row.
        micro_batch, step: of the next job; after the last one of the round the number of micro-batches, and 0.
        had, goals: of each row, the number of micro-batches (the first ones) that it had before this round, and is to
            have after it.
        taught: micro-batches that the teacher runs on, of all rounds up to this one.
        unfinished: state within the next step.
    """

    def __init__(self, steps: Sequence[Step], windows: Sequence[int], blocks: int, schedule: Schedule | None) -> None:
        self.steps, self.windows, self.schedule = steps, windows, schedule
        self.rows = steps[-1].first + steps[-1].rows
        self.tally = WindowStats(self.rows, len(COLUMNS))
        self.micro_batch, self.step = 0, 0
        self.had: dict[int, int] = {}
        self.goals = dict.fromkeys(range(self.rows), len(windows)) if schedule is None else schedule.first()
        self.taught = parts_due(self.had, self.goals)
        self.unfinished: Unfinished | None = None
        # Work before each step; the last entry is that of a whole micro-batch.
        self._work = list(accumulate((step.work for step in steps), initial=0.0))
        self._blocks = blocks

    @property
    def position(self) -> tuple[int, ...]:
        """Numbers that differ whenever more has been measured."""
        return self.taught, self.micro_batch, self.step

    @property
    def is_round_over(self) -> bool:
        """True if all of the text has been gone through."""
        return self.micro_batch == len(self.windows)

    def jobs(self) -> Iterator[Job]:
        """Yield the jobs of the rest of the round, in order."""
        return self._jobs_from(self.micro_batch, self.step)

    def add(self, job: Job, sums: torch.Tensor, tokens: int) -> None:
        """Add a job's sums over windows of ``tokens`` scored tokens to its rows of the tally; go on to the next job."""
        for row, of_row in zip(job.rows, sums.split(1), strict=True):
            self.tally.add(row, of_row, tokens)
        self.unfinished = None
        self._go_to(job.micro_batch, job.step + 1)

    def _jobs_from(self, micro_batch: int, step: int) -> Iterator[Job]:
        for number in range(micro_batch, len(self.windows)):
            for at in range(step if number == micro_batch else 0, len(self.steps)):
                of_step = range(self.steps[at].first, self.steps[at].first + self.steps[at].rows)
                due = tuple(row for row in of_step if self.had.get(row, 0) <= number < self.goals.get(row, 0))
                if due:
                    yield Job(number, at, due)

    def _go_to(self, micro_batch: int, step: int) -> None:
        """Make the first job from there on the next one."""
        job = next(self._jobs_from(micro_batch, step), Job(len(self.windows), 0, ()))
        self.micro_batch, self.step = job.micro_batch, job.step

    def start_round(self) -> bool:
        """Go through the text again for what an adaptive sweep needs more of; False if that is nothing."""
        if self.schedule is None:
            return False
        self.had = {**self.had, **self.goals}
        self.goals = self.schedule.following(self.tally, self.had, self.taught)
        self.taught += parts_due(self.had, self.goals)
        if self.goals:
            self._go_to(0, 0)
        return bool(self.goals)

    # Progress -----------------------------------------------------------------------------------------------------

    @property
    def total(self) -> int:
        """The number of measurements, at most."""
        every = len(self.windows) * self.rows
        return every if self.schedule is None else max(len(self.schedule.first()), math.ceil(ALLOWED * every))

    @property
    def done(self) -> int:
        """The number of measurements so far."""
        under_way = sum(
            max(0, min(goal, self.micro_batch + self._is_before(row)) - self.had.get(row, 0))
            for row, goal in self.goals.items()
        )
        return sum(self.had.values()) + under_way

    def _is_before(self, row: int) -> bool:
        return not self.is_round_over and row < self.steps[self.step].first

    def share(self, unfinished: Unfinished | None = None) -> float:
        """Return the share of the work that is done, 0 to 1, with that of a step under way."""
        if self.schedule is not None:
            return min(1.0, self.done / self.total)
        done = self.micro_batch * self._work[-1] + self._work[self.step]
        if unfinished is not None:
            step, windows = self.steps[self.step], self.windows[self.micro_batch]
            under_way = len(unfinished.carry.hidden) / windows * unfinished.block / self._blocks
            done += step.work * min(1.0, (len(unfinished.finals) + under_way) / step.rows)
        return done / (len(self.windows) * self._work[-1])

    # Files --------------------------------------------------------------------------------------------------------

    def to_data(self) -> dict[str, object]:
        """Return all but ``unfinished`` as values that JSON can hold."""
        rounds = {"had": list(self.had.items()), "goals": list(self.goals.items()), "taught": self.taught}
        return {
            "steps": len(self.steps),
            "next": [self.micro_batch, self.step],
            "sums": self.tally.to_data(),
            **({} if self.schedule is None else rounds),
        }

    def load(self, data: Mapping[str, Any]) -> None:
        """Restore the state from ``to_data``.

        Raises:
            KeyError, TypeError, ValueError, OverflowError, CheckpointError: it is damaged.
        """
        self.micro_batch, self.step = (signed_json.whole(number, "its next step") for number in data["next"])
        if "steps" not in data:
            self.step = from_group(self.steps, self.step)
        elif data["steps"] != len(self.steps):
            raise ValueError(f"it has {data['steps']} steps, not {len(self.steps)}")
        if not (0 <= self.micro_batch <= len(self.windows) and 0 <= self.step < len(self.steps)):
            raise ValueError(f"it stops at step {data['next']}")
        self.tally.load(data["sums"])
        if self.schedule is not None:
            self.had, self.goals = (_row_counts(data[name]) for name in ("had", "goals"))
            self.taught = signed_json.whole(data["taught"], "taught")
        self._go_to(self.micro_batch, self.step)


def _row_counts(data: object) -> dict[int, int]:
    pairs = signed_json.is_a(list, data, "its rounds")
    return {signed_json.whole(row, "a row"): signed_json.whole(count, "micro-batches") for row, count in pairs}
