"""The loop of a sweep over its jobs."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from klfast.core.errors import ClusterError, InvalidInputError
from klfast.core.progress import Progress, reporter
from klfast.sensitivity.measurer import Measurer
from klfast.sensitivity.outcome import Outcome
from klfast.sensitivity.ray_measurer import RayMeasurer
from klfast.sensitivity.results import Sensitivities
from klfast.sensitivity.resume_file import ResumeFile
from klfast.sensitivity.state import Job
from klfast.sensitivity.steps import NOISE
from klfast.sensitivity.unfinished import Unfinished


class Run:
    """A sweep from where its resume file stops to its end.

    Args:
        outcome: what is to be completed.
        measurer: measures jobs.
        windows: the micro-batches, int64 [B, T].
        file: keeps the outcome.
    """

    def __init__(
        self, outcome: Outcome, measurer: Measurer | RayMeasurer, windows: Sequence[torch.Tensor], file: ResumeFile
    ) -> None:
        self._outcome, self._measurer, self._windows, self._file = outcome, measurer, windows, file
        self._engine, self._state = outcome.engine, outcome.state
        self._advance: Callable[..., None] = lambda *_: None

    def finish(self, progress: Progress) -> Sensitivities:
        """Measure what is left, and return everything."""
        self._file.load()
        self._file.save()  # so that a path that cannot be written is found out now
        self._engine.pause = self._pause
        state = self._state
        try:
            with reporter(progress, "sweep", state.total, state.done) as self._advance:
                self._advance(0, "", state.share(state.unfinished))
                self._measure_round()
                while state.start_round():
                    self._file.save()
                    self._measure_round()
        except (KeyboardInterrupt, ClusterError):
            self._file.save(and_unfinished=True)
            raise
        self._file.save()
        self._file.forget_step()
        return self._outcome.sensitivities()

    def _measure_round(self) -> None:
        state = self._state
        for job, sums in self._measurer.measured(state.jobs(), state.unfinished):
            self._require_finite(job, sums)
            state.add(job, sums, self._windows[job.micro_batch].shape[1] - 1)
            if state.micro_batch != job.micro_batch or self._file.is_due:
                self._file.save()
            self._advance(len(job.rows), state.steps[job.step].name, state.share())

    def _require_finite(self, job: Job, sums: torch.Tensor) -> None:
        if NOISE in job.rows and not sums.isfinite().all():
            raise InvalidInputError(
                "the full-precision model's logits are NaN, infinite or too large; repair the checkpoint before "
                "sweeping it"
            )

    def _pause(self, unfinished: Unfinished) -> None:
        """Save if it is time, and report progress, between two blocks of a step."""
        state = self._state
        if self._file.path is not None:  # else it would only take memory
            state.unfinished = unfinished
        if self._file.is_due:
            self._file.save(and_unfinished=True)
        self._advance(0, state.steps[state.step].name, state.share(unfinished))
