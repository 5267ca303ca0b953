"""Measurement of a sweep's jobs, one after another."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from operator import attrgetter

import torch

from klfast.models.head import is_head_tied
from klfast.sensitivity.comparison import Teacher
from klfast.sensitivity.measure import Engine
from klfast.sensitivity.state import Job
from klfast.sensitivity.steps import Step
from klfast.sensitivity.unfinished import Unfinished


class Measurer:
    """Measures jobs here.

    Args:
        engine: measures a step.
        steps: of one micro-batch.
        windows: the micro-batches, int64 [B, T].
    """

    def __init__(self, engine: Engine, steps: Sequence[Step], windows: Sequence[torch.Tensor]) -> None:
        self.engine, self.steps, self._windows = engine, steps, windows

    def measured(self, jobs: Iterable[Job], unfinished: Unfinished | None = None) -> Iterator[tuple[Job, torch.Tensor]]:
        """Yield each job with its sums, float64 [C, len(COLUMNS), B].

        The first goes on from ``unfinished``, if that is given. The teacher runs once a micro-batch.
        """
        for micro_batch, of_one in groupby(jobs, attrgetter("micro_batch")):
            teacher = self._teach(micro_batch)
            for job in of_one:
                yield job, self._measure(teacher, job, unfinished)
                unfinished = None
            del teacher  # before the next one takes memory

    def _teach(self, micro_batch: int) -> Teacher:
        return self.engine.teach(self._windows[micro_batch].to(self.engine.chain.head.device))

    def _measure(self, teacher: Teacher, job: Job, unfinished: Unfinished | None) -> torch.Tensor:
        engine, step = self.engine, self.steps[job.step].only(job.rows)
        if step.place == "noise":
            return engine.measure_noise(teacher, job.micro_batch, unfinished)
        if isinstance(step.place, int):
            return engine.measure_block(teacher, step.place, step.candidates, unfinished)
        (head,) = step.candidates
        return engine.measure_head(teacher, head, is_head_tied(engine.chain.model), unfinished)
