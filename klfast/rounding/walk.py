"""Second-order rounding of a model, block by block.

Two models walk through the chain side by side on the calibration text: the teacher, in full precision, and the student,
whose earlier matrices are rounded already. Each block is rounded in stages, by order of use: both show what enters the
matrices of a stage, which are then rounded so that their output in the student comes nearest to the teacher's. Both
share one set of weights: rounded ones are in place only while the student needs them.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import nn

from klfast import __version__
from klfast.core import lock
from klfast.core.interrupts import interruptible
from klfast.core.progress import Progress, reporter
from klfast.models.batches import Batches
from klfast.models.block_chain import Chain, Passage
from klfast.models.fingerprint import state_digest
from klfast.quant.rounding import quantize
from klfast.quant.spec import QuantSpec
from klfast.quant.tensor import QuantizedTensor
from klfast.rounding.carries import Carries
from klfast.rounding.experts import expert_moments
from klfast.rounding.head_rows import Rows
from klfast.rounding.moments import Moments
from klfast.rounding.passes import HEAD, NOWHERE, TIED, Passes, add_inputs, input_key, named, without_entries
from klfast.rounding.rounded import Kept, RoundedModel
from klfast.rounding.second_order import on_uniform_grid, second_order
from klfast.rounding.watching import Routed, watched
from klfast.sensitivity.inputs import digest, micro_batches, vocabulary
from klfast.sensitivity.measuring_mode import prepared

MOST_TOKENS = 4096  # in a micro-batch


def round_model(
    model: nn.Module,
    specs: Mapping[str, QuantSpec],
    calibration: Batches,
    *,
    scale: str = "absmax",
    resume: str | os.PathLike[str] | None = None,
    progress: Progress = None,
) -> RoundedModel:
    """Round matrices of a model by second-order rounding; the model is left as it was.

    It computes in float32. Beyond the model there are the hidden states between two blocks for the whole text, of both
    models, on disk if memory is short, and in memory the moments of one block's inputs, two [K, K] for each matrix.

    Args:
        model: a causal language model whose blocks form a chain, as for ``klfast.sweep``.
        specs: by the first of each matrix's names (``klfast.models.matrices.sharers``).
        calibration: token ids, as for ``klfast.sweep``. A matrix, or an expert, that fewer tokens reach than it has
            inputs is rounded to nearest.
        scale: of what is rounded to nearest, as in ``klfast.quantize``.
        resume: a folder that keeps what is rounded, block by block. If it exists, the blocks in it are not rounded
            again, and the result is the same, bit for bit. The caller removes it (``rounded.forget``).
        progress: as for ``klfast.sweep``.

    Raises:
        InvalidInputError: the text is not valid, the model is not a chain, a weight or its input is not finite, or
            ``resume`` belongs to a run with another model, text, specs or klfast, or another process is working on it.
    """
    windows = micro_batches(calibration, vocabulary(model), MOST_TOKENS)
    settings = {} if resume is None else _settings(model, specs, windows, scale)
    with prepared(model, torch.float32), lock.held(resume):
        kept = None if resume is None else Kept(resume, settings)
        return _Walk(Chain(model), specs, windows, scale, kept).finish(progress)


def _settings(
    model: nn.Module, specs: Mapping[str, QuantSpec], windows: Sequence[torch.Tensor], scale: str
) -> dict[str, object]:
    """Return what the result depends on."""
    return {
        "version of klfast": __version__,
        "model": state_digest(model),
        "specs": {name: str(spec) for name, spec in specs.items()},
        "calibration": digest(windows),
        "scale": scale,
    }


class _Walk(Passes):
    """The state between two blocks: ``teacher`` and ``student`` are what enters the next one, by micro-batch."""

    def __init__(
        self,
        chain: Chain,
        specs: Mapping[str, QuantSpec],
        windows: Sequence[torch.Tensor],
        scale: str,
        kept: Kept | None,
    ) -> None:
        super().__init__(chain, specs, windows)
        self.specs, self.scale, self.kept = specs, scale, kept
        self.found = RoundedModel()
        self.teacher, self.student = Carries(()), Carries(())
        self.advance: Callable[..., None] = lambda *_: None

    def finish(self, progress: Progress) -> RoundedModel:
        with reporter(progress, "round", len(self.specs)) as self.advance:
            for name in self.names[NOWHERE]:
                self._to_nearest(name, "no single block holds it")
            teacher = self.enter(self.windows)
            self.teacher = Carries([passage.entry for passage in teacher])
            student = teacher
            for name in self.names[TIED]:
                with self._keeping(TIED) as is_kept:
                    if not is_kept:
                        self._round_tied_head(name, teacher)
                with self._rounded([name]):
                    student = self.enter(self.windows)
            self.student = Carries([passage.entry for passage in student])
            teacher, student = without_entries(teacher), without_entries(student)
            for index in range(len(self.chain.blocks)):
                with self._keeping(index) as is_kept:
                    self._see_block(index, teacher, student, is_kept)
                self._pass_block(index, student)
            for name in self.names[HEAD]:
                with self._keeping(HEAD) as is_kept:
                    if not is_kept:
                        self._round_head(name, self.end(self.student, student), self.end(self.teacher, teacher))
        return self.found

    @contextmanager
    def _keeping(self, place: int | str) -> Iterator[bool]:
        """Yield True if a place's matrices were kept, and are in ``found`` now; else keep those rounded in here."""
        names = self.names[place]
        before = None if self.kept is None or not names else self.kept.read(place, names, self.chain.head.device)
        if before is not None:
            self.found.add(before)
            self.advance(len(names), f"kept: {names[0]}")
        yield before is not None
        if self.kept is not None and before is None and names:
            self.kept.write(place, names, self.found.only(names))

    def _rounded(self, names: Sequence[str]) -> AbstractContextManager[None]:
        """Put the rounded weights of these matrices in their places."""
        return self.swapped({name: self.found.tensors[name] for name in names})

    def _see_block(self, index: int, teacher: Sequence[Passage], student: Sequence[Passage], is_kept: bool) -> None:
        """Move the teacher past a block, and unless its matrices are kept, round them by what enters them in both."""
        names = self.names[index]
        if names and not is_kept:
            done: list[str] = []
            for uses in self._stages(index, teacher[0]):
                self._round_stage(index, [name for name in names if name in uses], done, uses, teacher, student)
                done += uses
            if rest := [name for name in names if name not in done]:
                self._round_stage(index, rest, done, {}, teacher, student)
        for batch, passage in enumerate(teacher):
            self.teacher[batch] = self.step(index, self.teacher[batch], passage)

    def _stages(self, index: int, passage: Passage) -> Iterable[dict[str, int]]:
        """Return how often a block's linear layers are used, those with one input together, by order of use.

        Only the first micro-batch is looked at.
        """
        linear = {name: one for name in self.names[index] if not (one := self.matrices[name]).is_of_experts}
        with watched(linear) as seen:
            self.step(index, self.teacher[0], passage)
        found: defaultdict[object, dict[str, int]] = defaultdict(dict)
        for name, x in seen.inputs.items():
            found[input_key(x)][name] = seen.uses[name]
        return found.values()

    def _round_stage(
        self,
        index: int,
        names: Sequence[str],
        done: Sequence[str],
        uses: Mapping[str, int],
        teacher: Sequence[Passage],
        student: Sequence[Passage],
    ) -> None:
        """Round some matrices of a block by what enters them, in the student with those rounded that are ``done``.

        Args:
            index: of the block.
            names: the matrices.
            done: those of the block that are rounded already.
            uses: how often the matrices are used: the rest of the block is not run. Empty: all of it is.
            teacher, student: by micro-batch.
        """
        routed_to = [name for name in names if self.matrices[name].is_of_experts]
        linear = {name: self.matrices[name] for name in names if name not in routed_to}
        experts = {self.matrices[name].holder for name in routed_to}
        moments: dict[str, Moments] = {}
        routed: list[tuple[Mapping[nn.Module, Routed], Mapping[nn.Module, Routed]]] = []
        for batch, passages in enumerate(zip(teacher, student, strict=True)):
            carry = self.teacher[batch]
            with watched(linear, experts, uses) as of_teacher:
                self.step(index, carry, passages[0])
            with self._rounded([*done, *self.names[NOWHERE]]), watched(linear, experts, uses) as of_student:
                self.step(index, self.student[batch], passages[1])
            add_inputs(moments, of_student.inputs, of_teacher.inputs, carry.hidden.shape[:-1].numel())
            routed.append((of_student.routed, of_teacher.routed))
        for name in linear:
            self._round_linear(name, moments.get(name))
        for name in routed_to:
            holder = self.matrices[name].holder
            self._round_experts(name, [(y[holder], x[holder]) for y, x in routed if holder in y])

    def _pass_block(self, index: int, student: Sequence[Passage]) -> None:
        """Move the student past a block whose matrices are rounded."""
        with self._rounded([*self.names[index], *self.names[NOWHERE]]):
            for batch, passage in enumerate(student):
                self.student[batch] = self.step(index, self.student[batch], passage)

    def _round_linear(self, name: str, moments: Moments | None, rows: Rows | None = None) -> None:
        if moments is None:
            self._to_nearest(name, "its input was not seen")
        elif reason := self._why_nearest(self.specs[name], moments):
            self._to_nearest(name, reason)
        else:
            self._keep(name, self._second_order(name, self.matrices[name].weight, moments, rows))

    def _round_experts(self, name: str, batches: Sequence[tuple[Routed, Routed]]) -> None:
        """Round all experts' matrices of a stack, or a single one."""
        one, spec = self.matrices[name], self.specs[name]
        parts, reasons = [], []
        for expert in range(len(one.held)) if one.expert is None else [one.expert]:
            moments, weight = expert_moments(one, expert, batches), one.held[expert]
            if reason := self._why_nearest(spec, moments):
                reasons.append(reason)
                parts.append(self._nearest(name, weight))
            else:
                parts.append(self._second_order(name, weight, moments))
        if reasons:
            of_stack = f"{len(reasons)} of its {len(parts)} experts; " if one.is_stack else ""
            self.found.notes[name] = of_stack + reasons[0]
        if len(reasons) == len(parts):
            self.found.nearest.add(name)
        self._keep(name, QuantizedTensor.joined(parts))

    def _round_head(self, name: str, student: Sequence[torch.Tensor], teacher: Sequence[torch.Tensor]) -> None:
        moments = self.head_moments(student, teacher)
        self._round_linear(name, moments, Rows(self.clusters(student, teacher, moments)))

    def _round_tied_head(self, name: str, passages: Sequence[Passage]) -> None:
        hidden = self.run(passages)
        moments = self.head_moments(hidden, hidden)
        clusters = self.clusters(hidden, hidden, moments)
        ridge = self.ridges(name, self.specs[name].base, hidden[0], clusters)
        self._round_linear(name, moments, Rows(clusters, ridge))

    def _why_nearest(self, spec: QuantSpec, moments: Moments) -> str:
        """Return why a matrix has to be rounded to nearest, a clause; empty if it has not."""
        return moments.why_useless() if on_uniform_grid(spec) else f"{spec} has no uniform grid"

    def _to_nearest(self, name: str, reason: str) -> None:
        self.found.notes[name] = reason
        self.found.nearest.add(name)
        self._keep(name, self._nearest(name, self.matrices[name].weight))

    def _keep(self, name: str, tensor: QuantizedTensor) -> None:
        self.found.tensors[name] = tensor
        self.advance(1, name)

    def _nearest(self, name: str, weight: torch.Tensor) -> QuantizedTensor:
        with named(name), interruptible():
            return quantize(weight, self.specs[name], scale=self.scale)

    def _second_order(
        self, name: str, weight: torch.Tensor, moments: Moments, rows: Rows | None = None
    ) -> QuantizedTensor:
        spec = self.specs[name]
        with named(name), interruptible():
            if rows is None:
                return second_order(weight, spec, moments.hessian / moments.tokens, moments.cross / moments.tokens)
            of = rows.clusters
            return second_order(weight, spec, of.hessian, of.cross, cluster=of.of_row, ridge=rows.ridge, cost=of.spread)
