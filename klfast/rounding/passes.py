"""Passes of calibration text through a chain of blocks, and the places of matrices in it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch

from klfast.core.errors import InvalidInputError
from klfast.core.interrupts import interruptible
from klfast.models.block_chain import Carry, Chain, Passage
from klfast.models.expert_names import stack_in
from klfast.models.head import divergence, is_head_tied
from klfast.models.matrices import Matrix, matrix, named_matrices, sharers, with_experts
from klfast.quant.rounding import quantize
from klfast.quant.spec import QuantSpec
from klfast.quant.tensor import QuantizedTensor
from klfast.rounding.head_rows import Clusters, clusters, ridges
from klfast.rounding.moments import Moments

TIED, HEAD, NOWHERE = "tied head", "head", "nowhere"  # places beside the blocks


class Passes:
    """A chain, the text, and matrices by place.

    Attributes:
        chain: the model.
        windows: the text by micro-batch, on the head's device.
        matrices: by name.
        names: those names by place, an index of a block or one of TIED, HEAD and NOWHERE.

    Raises:
        UnknownLayerError: the model has no matrix of a name.
    """

    def __init__(self, chain: Chain, names: Collection[str], windows: Sequence[torch.Tensor]) -> None:
        self.chain = chain
        self.windows = [ids.to(chain.head.device) for ids in windows]
        known = named_matrices(chain.model)
        if any(name not in known for name in names):
            known |= with_experts(known)
        for name in names:
            if name not in known:
                matrix(chain.model, name)  # raises, naming the closest
        self.matrices = {name: known[name] for name in names}
        self.names: defaultdict[int | str, list[str]] = defaultdict(list)
        experts: defaultdict[str, list[str]] = defaultdict(list)
        for name, one in self.matrices.items():
            if one.expert is not None:
                experts[stack_in(name)].append(name)
        for same in sharers(chain.model):
            if chosen := [*([same[0]] if same[0] in self.matrices else []), *experts.get(same[0], ())]:
                self.names[self._place(same, self.matrices[chosen[0]])] += chosen

    def _place(self, names: Sequence[str], one: Matrix) -> int | str:
        """Return the block of a matrix with these names, or where else it is."""
        if one.holder is self.chain.head.module:
            return TIED if is_head_tied(self.chain.model) else HEAD
        blocks = {self.chain.block_of(name) for name in names}
        (block, *others) = blocks
        return NOWHERE if others or block is None else block

    def enter(self, windows: Sequence[torch.Tensor]) -> list[Passage]:
        """Return what enters the first block, by micro-batch."""
        with interruptible():
            return [self.chain.enter(ids) for ids in windows]

    def run(self, passages: Sequence[Passage]) -> list[torch.Tensor]:
        """Return what enters the head, by micro-batch, of a whole pass."""
        with interruptible():
            return [self.chain.run(passage.entry, passage) for passage in passages]

    def end(self, carries: Iterable[Carry], passages: Sequence[Passage]) -> list[torch.Tensor]:
        """Return what enters the head, by micro-batch, of what leaves the last block."""
        with interruptible():
            return [self.chain.finish(*each) for each in zip(carries, passages, strict=True)]

    def step(self, index: int, carry: Carry, passage: Passage) -> Carry:
        """Run a micro-batch through a block."""
        with interruptible():
            return self.chain.step(index, carry, passage)

    @contextmanager
    def swapped(self, rounded: Mapping[str, QuantizedTensor]) -> Iterator[None]:
        """Put rounded weights in their places, and afterwards the full ones back."""
        before = []
        try:
            for name, qt in rounded.items():
                one = self.matrices[name]
                tensor = one.held
                if one.expert is None:
                    before.append((tensor, tensor.data))
                    tensor.data = qt.dequantize(torch.float32).to(tensor.dtype).view_as(tensor)
                    continue
                if not any(tensor is other for other, _ in before):  # the first expert of a stack
                    before.append((tensor, tensor.data))
                    tensor.data = tensor.data.clone()
                tensor.data[one.expert] = qt.dequantize(torch.float32).to(tensor.dtype)
            yield
        finally:
            for tensor, data in before:
                tensor.data = data

    def head_moments(self, student: Sequence[torch.Tensor], teacher: Sequence[torch.Tensor]) -> Moments:
        """Return the moments of what enters the head."""
        moments = Moments(student[0].shape[-1], self.chain.head.device)
        for batch in zip(student, teacher, strict=True):
            moments.add(*batch)
        return moments

    def clusters(self, student: Sequence[torch.Tensor], teacher: Sequence[torch.Tensor], moments: Moments) -> Clusters:
        """Return clusters of the head's rows, for what enters the head (``head_rows.clusters``)."""
        with interruptible():
            return clusters(self.chain.head.readout(), student, teacher, moments)

    def ridges(self, name: str, spec: QuantSpec, hidden: torch.Tensor, clusters: Clusters) -> torch.Tensor:
        """Return what the rows of a tied head have beside their use as output weights, float32 [V].

        Args:
            name: the head.
            spec: to round it to for a measurement.
            hidden: what enters it in the first micro-batch.
            clusters: of its rows.
        """
        assert clusters.spread is not None  # as of every head
        return ridges(clusters.spread, self.windows, self._embedding_cost(name, spec, hidden))

    def _embedding_cost(self, name: str, spec: QuantSpec, hidden: torch.Tensor) -> float:
        """Return the divergence in the first micro-batch by a squared error of 1 in each embedding, in nats a token.

        The embedding alone is rounded to nearest for it.
        """
        ids, weight, readout = self.windows[0], self.matrices[name].weight, self.chain.head.readout()
        with named(name):
            nearest = quantize(weight, spec)
        error = (nearest.rows(ids) - weight[ids]).square().sum(-1).mean().item()
        with self.swapped({name: nearest}):
            passages = self.enter([ids])
        (moved,) = self.run(passages)
        with interruptible():
            kl = divergence(hidden, readout, moved, readout).kl_teacher_student.mean().item()
        return max(kl, 0.0) / error if error else 0.0


def without_entries(passages: Sequence[Passage]) -> list[Passage]:
    """Return passages without what entered the first block, which would stay in memory."""
    return [replace(passage, entry=Carry(passage.entry.hidden[:0].clone())) for passage in passages]


@contextmanager
def named(name: str) -> Iterator[None]:
    """Put the name of a layer in front of the message of an InvalidInputError."""
    try:
        yield
    except InvalidInputError as error:
        raise InvalidInputError(f"{name}: {error}") from None


def add_inputs(
    moments: dict[str, Moments], student: Mapping[str, torch.Tensor], teacher: Mapping[str, torch.Tensor], tokens: int
) -> None:
    """Add a batch's inputs by name. Layers with one input (q, k and v) share their moments, which are added once.

    Which of a layer's inputs in the two models are of one token is known only if all ``tokens`` of the batch reach it,
    once or several times; of the linear layers of experts they do not.
    """
    seen: dict[object, Moments] = {}
    added: set[Moments] = set()
    for name in dict.fromkeys((*student, *teacher)):
        y, x = student.get(name), teacher.get(name)
        if name not in moments:
            either = teacher[name] if y is None else y
            shared = None if y is None else seen.get(input_key(y))
            moments[name] = shared or Moments(either.shape[-1], either.device)
        of_layer = moments[name]
        if y is not None:
            seen[input_key(y)] = of_layer
        if y is None or x is None or y.shape != x.shape or not _reach(y, tokens):
            of_layer.are_paired = False
        elif of_layer not in added:
            added.add(of_layer)
            of_layer.add(y, x)


def _reach(inputs: torch.Tensor, tokens: int) -> bool:
    """Return True if inputs [..., K] can be those of all tokens of a batch."""
    rows = inputs.shape[:-1].numel()
    return rows > 0 and rows % tokens == 0


def input_key(x: torch.Tensor) -> object:
    """Return what inputs have in common that are one tensor, as long as they are kept."""
    return x.data_ptr(), x.stride(), x.shape
