"""Second-order rounding of a model, block by block.

Two models walk through the chain side by side on the calibration text: the teacher, in full precision, and the student,
whose earlier blocks are rounded already. In each block both show what enters its matrices, with the block in full
precision; then each matrix is rounded so that the student's output comes nearest to the teacher's. Both share one set
of weights: rounded ones are in place only while the student needs them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import nn

from klfast.core.errors import InvalidInputError
from klfast.core.interrupts import interruptible
from klfast.core.progress import Progress, reporter
from klfast.models.batches import Batches
from klfast.models.block_chain import Carry, Chain, Passage
from klfast.models.head import divergence, is_head_tied
from klfast.models.matrices import named_matrices, sharers
from klfast.quant.rounding import quantize
from klfast.quant.spec import QuantSpec
from klfast.quant.tensor import QuantizedTensor
from klfast.rounding.experts import expert_moments
from klfast.rounding.moments import Moments
from klfast.rounding.second_order import on_uniform_grid, second_order
from klfast.rounding.tied_head import ridges
from klfast.rounding.watching import Routed, watched
from klfast.sensitivity.inputs import micro_batches, vocabulary
from klfast.sensitivity.measuring_mode import prepared

_MOST_TOKENS = 4096  # in a micro-batch
_TIED, _HEAD, _NOWHERE = "tied head", "head", "nowhere"


@dataclass(frozen=True)
class RoundedModel:
    """What ``round_model`` makes.

    Attributes:
        tensors: the quantized weights, by name.
        notes: why a matrix, or some of a stack's experts, were rounded to nearest: a clause, by name.
        nearest: the names of matrices that were rounded to nearest as a whole.
    """

    tensors: dict[str, QuantizedTensor] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)
    nearest: set[str] = field(default_factory=set)


def round_model(
    model: nn.Module,
    specs: Mapping[str, QuantSpec],
    calibration: Batches,
    *,
    scale: str = "absmax",
    progress: Progress = None,
) -> RoundedModel:
    """Round matrices of a model by second-order rounding; the model is left as it was.

    It computes in float32. In memory are, beyond the model, the hidden states between two blocks for the whole text, of
    both models, and the moments of one block's inputs, two [K, K] for each of its matrices.

    Args:
        model: a causal language model whose blocks form a chain, as for ``klfast.sweep``.
        specs: by the first of each matrix's names (``klfast.models.matrices.sharers``).
        calibration: token ids, as for ``klfast.sweep``. A matrix, or an expert, that fewer tokens reach than it has
            inputs is rounded to nearest.
        scale: of what is rounded to nearest, as in ``klfast.quantize``.
        progress: as for ``klfast.sweep``.

    Raises:
        InvalidInputError: the text is not valid, the model is not a chain, or a weight or its input is not finite.
    """
    windows = micro_batches(calibration, vocabulary(model), _MOST_TOKENS)
    with prepared(model, torch.float32):
        return _Walk(Chain(model), specs, windows, scale).finish(progress)


class _Walk:
    """The state between two blocks: ``teacher`` and ``student`` are what enters the next one, by micro-batch."""

    def __init__(
        self, chain: Chain, specs: Mapping[str, QuantSpec], windows: Sequence[torch.Tensor], scale: str
    ) -> None:
        self.chain, self.specs, self.scale = chain, specs, scale
        self.windows = [ids.to(chain.head.device) for ids in windows]
        named = named_matrices(chain.model)
        self.matrices = {name: named[name] for name in specs}
        self.names: defaultdict[int | str, list[str]] = defaultdict(list)  # by place
        for names in sharers(chain.model):
            if names[0] in specs:
                self.names[self._place(names)].append(names[0])
        self.found = RoundedModel()
        self.teacher: list[Carry] = []
        self.student: list[Carry] = []
        self.advance: Callable[..., None] = lambda *_: None

    def finish(self, progress: Progress) -> RoundedModel:
        with reporter(progress, "round", len(self.specs)) as self.advance:
            for name in self.names[_NOWHERE]:
                self._to_nearest(name, "no single block holds it")
            teacher = self._enter(self.windows)
            self.teacher = [passage.entry for passage in teacher]
            student = teacher
            for name in self.names[_TIED]:
                self._round_tied_head(name, teacher)
                with self._swapped([name]):
                    student = self._enter(self.windows)
            self.student = [passage.entry for passage in student]
            for index in range(len(self.chain.blocks)):
                self._round_block(index, teacher, student)
            for name in self.names[_HEAD]:
                self._round_head(name, self._end(self.student, student), self._end(self.teacher, teacher))
        return self.found

    def _place(self, names: Sequence[str]) -> int | str:
        """Return the block of a matrix with these names, or where else it is."""
        if self.matrices[names[0]].holder is self.chain.head.module:
            return _TIED if is_head_tied(self.chain.model) else _HEAD
        blocks = {self.chain.block_of(name) for name in names}
        (block, *others) = blocks
        return _NOWHERE if others or block is None else block

    # Passes -----------------------------------------------------------------------------------------------------------

    def _enter(self, windows: Sequence[torch.Tensor]) -> list[Passage]:
        with interruptible():
            return [self.chain.enter(ids) for ids in windows]

    def _run(self, passages: Sequence[Passage]) -> list[torch.Tensor]:
        """Return what enters the head, by micro-batch, of a whole pass."""
        with interruptible():
            return [self.chain.run(passage.entry, passage) for passage in passages]

    def _end(self, carries: Sequence[Carry], passages: Sequence[Passage]) -> list[torch.Tensor]:
        """Return what enters the head, by micro-batch, of what leaves the last block."""
        with interruptible():
            return [self.chain.finish(*each) for each in zip(carries, passages, strict=True)]

    def _step(self, index: int, carry: Carry, passage: Passage) -> Carry:
        with interruptible():
            return self.chain.step(index, carry, passage)

    @contextmanager
    def _swapped(self, names: Sequence[str]) -> Iterator[None]:
        """Put rounded weights in their places, and afterwards the full ones back."""
        before = []
        try:
            for name in names:
                tensor = self.matrices[name].tensor
                before.append((tensor, tensor.data))
                tensor.data = self.found.tensors[name].dequantize(torch.float32).to(tensor.dtype).view_as(tensor)
            yield
        finally:
            for tensor, data in before:
                tensor.data = data

    # Rounding ---------------------------------------------------------------------------------------------------------

    def _round_block(self, index: int, teacher: Sequence[Passage], student: Sequence[Passage]) -> None:
        names, shared = self.names[index], self.names[_NOWHERE]
        stacks = [name for name in names if self.matrices[name].is_stack]
        linear = {name: self.matrices[name] for name in names if name not in stacks}
        experts = {self.matrices[name].holder for name in stacks}
        moments: dict[str, Moments] = {}
        routed: list[tuple[Mapping[nn.Module, Routed], Mapping[nn.Module, Routed]]] = []
        for batch, passages in enumerate(zip(teacher, student, strict=True)):
            with watched(linear, experts) as of_teacher:
                self.teacher[batch] = self._step(index, self.teacher[batch], passages[0])
            with self._swapped(shared), watched(linear, experts) as of_student:
                self._step(index, self.student[batch], passages[1])
            _add(moments, of_student.inputs, of_teacher.inputs)
            routed.append((of_student.routed, of_teacher.routed))
        for name in linear:
            self._round_linear(name, moments.get(name))
        for name in stacks:
            holder = self.matrices[name].holder
            self._round_stack(name, [(y[holder], x[holder]) for y, x in routed if holder in y])
        with self._swapped([*names, *shared]):
            self.student = [self._step(index, *each) for each in zip(self.student, student, strict=True)]

    def _round_linear(self, name: str, moments: Moments | None, ridge: torch.Tensor | None = None) -> None:
        if moments is None:
            self._to_nearest(name, "its input was not seen")
        elif reason := self._why_nearest(self.specs[name], moments):
            self._to_nearest(name, reason)
        else:
            self._keep(name, self._second_order(name, self.matrices[name].weight, moments, ridge))

    def _round_stack(self, name: str, batches: Sequence[tuple[Routed, Routed]]) -> None:
        stack, spec = self.matrices[name], self.specs[name]
        parts, reasons = [], []
        for expert, weight in enumerate(stack.tensor):
            moments = expert_moments(stack, expert, batches)
            if reason := self._why_nearest(spec, moments):
                reasons.append(reason)
                parts.append(self._nearest(name, weight))
            else:
                parts.append(self._second_order(name, weight, moments))
        if reasons:
            self.found.notes[name] = f"{len(reasons)} of its {len(parts)} experts; {reasons[0]}"
        if len(reasons) == len(parts):
            self.found.nearest.add(name)
        self._keep(name, QuantizedTensor.joined(parts))

    def _round_head(self, name: str, student: Sequence[torch.Tensor], teacher: Sequence[torch.Tensor]) -> None:
        self._round_linear(name, self._head_moments(name, student, teacher))

    def _round_tied_head(self, name: str, passages: Sequence[Passage]) -> None:
        hidden = self._run(passages)
        cost = self._embedding_cost(name, hidden[0])
        with interruptible():
            ridge = ridges(self.chain.head.readout(), self.windows, hidden, cost)
        self._round_linear(name, self._head_moments(name, hidden, hidden), ridge)

    def _head_moments(self, name: str, student: Sequence[torch.Tensor], teacher: Sequence[torch.Tensor]) -> Moments:
        moments = Moments(self.matrices[name].shape[1], self.chain.head.device)
        for batch in zip(student, teacher, strict=True):
            moments.add(*batch)
        return moments

    def _embedding_cost(self, name: str, hidden: torch.Tensor) -> float:
        """Return the divergence in the first micro-batch by a squared error of 1 in each embedding, in nats a token.

        The embedding alone is rounded to nearest for it. ``hidden`` is what enters the head in full precision.
        """
        ids, weight, readout = self.windows[0], self.matrices[name].weight, self.chain.head.readout()
        self.found.tensors[name] = nearest = self._nearest(name, weight)
        error = (nearest.rows(ids) - weight[ids]).square().sum(-1).mean().item()
        with self._swapped([name]):
            passages = self._enter([ids])
        (moved,) = self._run(passages)
        with interruptible():
            kl = divergence(hidden, readout, moved, readout).kl_teacher_student.mean().item()
        return max(kl, 0.0) / error if error else 0.0

    def _why_nearest(self, spec: QuantSpec, moments: Moments) -> str:
        """Return why a matrix has to be rounded to nearest, a clause; empty if it has not."""
        needed = len(moments.hessian)
        if not on_uniform_grid(spec):
            return f"{spec} has no uniform grid"
        if moments.tokens < needed:
            return f"only {moments.tokens} of the {needed} tokens that are needed reach it"
        return "" if moments.hessian.any() else "its input is always 0"

    def _to_nearest(self, name: str, reason: str) -> None:
        self.found.notes[name] = reason
        self.found.nearest.add(name)
        self._keep(name, self._nearest(name, self.matrices[name].weight))

    def _keep(self, name: str, tensor: QuantizedTensor) -> None:
        self.found.tensors[name] = tensor
        self.advance(1, name)

    def _nearest(self, name: str, weight: torch.Tensor) -> QuantizedTensor:
        with _named(name), interruptible():
            return quantize(weight, self.specs[name], scale=self.scale)

    def _second_order(
        self, name: str, weight: torch.Tensor, moments: Moments, ridge: torch.Tensor | None = None
    ) -> QuantizedTensor:
        hessian, cross = moments.hessian / moments.tokens, moments.cross / moments.tokens
        with _named(name), interruptible():
            return second_order(weight, self.specs[name], hessian, cross, ridge=ridge)


@contextmanager
def _named(name: str) -> Iterator[None]:
    """Put the name of a layer in front of the message of an InvalidInputError."""
    try:
        yield
    except InvalidInputError as error:
        raise InvalidInputError(f"{name}: {error}") from None


def _add(moments: dict[str, Moments], student: Mapping[str, torch.Tensor], teacher: Mapping[str, torch.Tensor]) -> None:
    """Add a batch's inputs by name. Layers with one input (q, k and v) share their moments, which are added once."""
    seen: dict[tuple[int, tuple[int, ...], torch.Size], Moments] = {}
    for name, y in student.items():
        key = (y.data_ptr(), y.stride(), y.shape)
        if key in seen:
            moments.setdefault(name, seen[key])
        else:
            seen[key] = moments.setdefault(name, Moments(y.shape[-1], y.device))
            seen[key].add(y, teacher[name])
