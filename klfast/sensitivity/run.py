"""The loop of a sweep over micro-batches and their steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from klfast.core.errors import InvalidInputError
from klfast.core.progress import Progress, reporter
from klfast.models.head import is_head_tied
from klfast.sensitivity.comparison import COLUMNS, Teacher
from klfast.sensitivity.outcome import Outcome
from klfast.sensitivity.results import Sensitivities
from klfast.sensitivity.resume_file import ResumeFile
from klfast.sensitivity.steps import Step
from klfast.sensitivity.unfinished import Unfinished


class Run:
    """A sweep from where its resume file stops to its end.

    Args:
        outcome: what is to be completed.
        windows: the micro-batches, int64 [B, T].
        file: keeps the outcome.
    """

    def __init__(self, outcome: Outcome, windows: Sequence[torch.Tensor], file: ResumeFile) -> None:
        self._outcome, self._windows, self._file = outcome, windows, file
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
        except KeyboardInterrupt:
            self._file.save(and_unfinished=True)
            raise
        self._file.save()
        self._file.forget_step()
        return self._outcome.sensitivities()

    def _measure_round(self) -> None:
        while not self._state.is_round_over:
            self._measure_micro_batch()

    def _measure_micro_batch(self) -> None:
        state, teacher = self._state, None
        for step in state.steps[state.step :]:
            due, rows = state.due(step)
            if not rows:
                state.pass_step()
                continue
            teacher = teacher or self._teach()
            sums = self._measure(teacher, due)
            self._require_finite(due, sums)
            state.add(rows, sums, teacher.passage.input_ids.shape[1] - 1)
            state.pass_step()
            if state.step == 0 or self._file.is_due:
                self._file.save()
            self._advance(len(rows), step.name, state.share())

    def _teach(self) -> Teacher:
        return self._engine.teach(self._windows[self._state.micro_batch].to(self._engine.chain.head.device))

    def _measure(self, teacher: Teacher, step: Step) -> torch.Tensor:
        engine, unfinished = self._engine, self._state.unfinished
        if step.place == "noise":
            return engine.measure_noise(teacher, self._state.micro_batch, unfinished)
        if isinstance(step.place, int):
            return engine.measure_block(teacher, step.place, step.candidates, unfinished)
        (head,) = step.candidates
        return engine.measure_head(teacher, head, is_head_tied(engine.chain.model), unfinished)

    def _require_finite(self, step: Step, sums: torch.Tensor) -> None:
        """Raise InvalidInputError, naming the candidate, for a sum that is NaN or infinite: files cannot hold it."""
        broken = (~sums.isfinite()).nonzero()
        if len(broken):
            row, column, _ = broken[0].tolist()
            who = step.candidates[row] if step.candidates else "the noise floor"
            raise InvalidInputError(
                f"{COLUMNS[column]} of {who} is NaN or infinite; leave this layer out of `layers`, or sweep other specs"
            )

    def _pause(self, unfinished: Unfinished) -> None:
        """Save if it is time, and report progress, between two blocks of a step."""
        state = self._state
        if self._file.path is not None:  # else it would only take memory
            state.unfinished = unfinished
        if self._file.is_due:
            self._file.save(and_unfinished=True)
        self._advance(0, state.steps[state.step].name, state.share(unfinished))
