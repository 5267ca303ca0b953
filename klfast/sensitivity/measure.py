"""Measurement of one micro-batch of a sweep: how each candidate changes the model's next-token distributions.

The teacher runs once and leaves the carry at every block boundary; a candidate re-runs its own block from there, and
all candidates of a block go through the rest of the network as one larger batch: its suffix. Products other than with
the candidate's own weight are taken as they are, or by differences from the teacher's. Only through a block that uses a
candidate's weight again (Zamba's shared blocks) they go one by one, each with its own weight.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch

from klfast.core.errors import InvalidInputError
from klfast.core.interrupts import interruptible
from klfast.models.block_chain import Carry, Chain, Passage
from klfast.sensitivity.candidates import Candidate, chunks
from klfast.sensitivity.comparison import Comparison, Teacher
from klfast.sensitivity.differences import Differences, Products
from klfast.sensitivity.int8_inputs import int8_inputs, rounded
from klfast.sensitivity.stages import Stages
from klfast.sensitivity.unfinished import Unfinished


class Engine:
    """Measures candidates, one micro-batch at a time.

    The measuring methods return sums over each window's T - 1 tokens, as a Comparison makes them. Given ``unfinished``
    they continue an earlier, interrupted call.

    Attributes:
        stages: wall time spent so far.
        comparison: of candidates with the teacher.
        differences: how products of candidates are taken; None for as they are.
        block_tokens: tokens that went through a block so far, counted once for each block.
        pause: called after each block that candidates went through, with the state needed to continue from there.
    """

    def __init__(
        self,
        chain: Chain,
        scale: str,
        max_batch_tokens: int,
        vocabulary_rows: int | None = None,
        differences: Differences | None = None,
    ) -> None:
        self.chain = chain
        self.scale = scale
        self.differences = differences
        self.max_batch_tokens = max_batch_tokens
        self.stages = Stages()
        self.comparison = Comparison(chain.head, vocabulary_rows, self.stages)
        self.block_tokens = 0
        self._stacks_of: Passage | None = None
        self._stacks: dict[int, Passage] = {}  # by number of copies of that passage
        self.pause: Callable[[Unfinished], None] = lambda unfinished: None

    def reset_costs(self) -> None:
        """Count time and work from zero."""
        self.stages.seconds = dict.fromkeys(self.stages.seconds, 0.0)
        self.block_tokens = self.comparison.in_full = 0

    def teach(self, input_ids: torch.Tensor) -> Teacher:
        """Run the full-precision model on a micro-batch, int64 [B, T]."""
        with self.stages.timed("teacher"):
            passage = self.chain.enter(input_ids)
            carries, products = [passage.entry], []
            for index in range(len(self.chain.blocks)):
                with self._noted(index) as of_block:
                    carries.append(self._step(index, carries[-1], passage))
                products.append(of_block)
            hidden = self.chain.finish(carries[-1], passage)
            if not torch.isfinite(hidden).all():
                self._blame_block(carries)
            return self.comparison.teacher(passage, carries[:-1], products, hidden)

    def measure_block(
        self, teacher: Teacher, index: int, candidates: Sequence[Candidate], unfinished: Unfinished | None = None
    ) -> torch.Tensor:
        """Measure at most COMPARED_TOGETHER candidates, whose weights are first used in block ``index``."""
        windows, length = teacher.passage.input_ids.shape
        width = max(1, self.max_batch_tokens // (windows * length))
        finals = [] if unfinished is None else list(unfinished.finals)
        for part in chunks(candidates, width)[len(finals) // width :]:
            if unfinished is None:
                at, known = (teacher.carries[index], teacher.passage), teacher.products[index]
                carry = Carry.stack([self._own_block(index, *at, one, known) for one in part])
                start = index + 1
                self.pause(Unfinished(list(finals), carry, start))
            else:
                carry, start, unfinished = unfinished.carry, unfinished.block, None
            with self.stages.timed("suffix"):
                hidden = self._run(teacher.passage, carry, start, finals, part, teacher.products)
            finals += hidden.split(windows)
        hidden = self.comparison.scored(torch.cat(finals), len(candidates))
        return self.comparison.under_full_head(teacher, hidden)

    def measure_head(
        self, teacher: Teacher, candidate: Candidate, tied: bool, unfinished: Unfinished | None = None
    ) -> torch.Tensor:
        """Measure the head under one spec. A tied embedding reads the quantized rows, which affects every block."""
        if candidate.inputs_of:
            return self.comparison.under_full_head(teacher, rounded(teacher.hidden, candidate.spec).unsqueeze(0))
        with self._swapped(candidate):
            if tied:
                with self.stages.timed("suffix"):
                    passage = self.chain.enter(teacher.passage.input_ids)
                    start = _start(unfinished, passage.entry)
                    hidden = self.comparison.scored(self._run(passage, *start, products=teacher.products))
            else:
                hidden = teacher.hidden.unsqueeze(0)
            return self.comparison.in_full_under(self.chain.head.readout(), teacher, hidden)

    def measure_noise(self, teacher: Teacher, seed: int, unfinished: Unfinished | None = None) -> torch.Tensor:
        """Measure the teacher against itself, each embedding moved by at most one ulp, so that all rounding differs."""
        entry = teacher.carries[0].hidden
        generator = torch.Generator().manual_seed(seed)
        ulps = (torch.rand(entry.shape, generator=generator) * 2 - 1).to(entry.device)
        nudged = (entry.float() * (1 + torch.finfo(entry.dtype).eps * ulps)).to(entry.dtype)
        with self.stages.timed("suffix"):
            hidden = self._run(teacher.passage, *_start(unfinished, Carry(nudged, teacher.carries[0].extra)))
        return self.comparison.under_full_head(teacher, self.comparison.scored(hidden))

    def _own_block(
        self, index: int, carry: Carry, passage: Passage, candidate: Candidate, products: Products | None = None
    ) -> Carry:
        known = {layer: one for layer, one in (products or {}).items() if not candidate.changes(layer)}
        with self._swapped(candidate), self.stages.timed("own_block"):
            return self._step(index, carry, passage, known)

    def _run(
        self,
        passage: Passage,
        carry: Carry,
        start: int,
        finals: list[torch.Tensor],
        candidates: Sequence[Candidate] = (),
        products: Sequence[Products] = (),
    ) -> torch.Tensor:
        """Run C passes from the input of block ``start``; return the head's input, [C * B, T, H].

        Each of the ``candidates`` changes its weight in one of the passes; without any, the weights stay as they are.
        ``finals`` are the results of the candidates before them, for ``pause``, and ``products`` those of the teacher,
        by block; without any, all are taken as they are.
        """
        copies = len(carry.hidden) // len(passage.input_ids)
        together = self._repeated(passage, copies)
        for index in range(start, len(self.chain.blocks)):
            if any(index in candidate.blocks for candidate in candidates):
                carry = self._one_by_one(index, carry, passage, candidates)
            else:
                carry = self._step(index, carry, together, products[index] if products else None)
            self.pause(Unfinished(list(finals), carry, index + 1))
        return self.chain.finish(carry, together)

    def _repeated(self, passage: Passage, copies: int) -> Passage:
        """Return the passage of a batch repeated ``copies`` times, which the next stack of that size takes again."""
        if copies == 1:
            return passage
        if passage is not self._stacks_of:
            self._stacks_of, self._stacks = passage, {}
        if copies not in self._stacks:
            self._stacks[copies] = self.chain.enter(passage.input_ids.repeat(copies, 1))
        return self._stacks[copies]

    def _one_by_one(self, index: int, carry: Carry, passage: Passage, candidates: Sequence[Candidate]) -> Carry:
        """Run a block that uses the weights of some candidates, each with its own change."""
        found = []
        for candidate, one in zip(candidates, carry.split(len(passage.input_ids)), strict=True):
            changed = index in candidate.blocks
            found.append(
                self._own_block(index, one, passage, candidate) if changed else self._step(index, one, passage)
            )
        return Carry.stack(found)

    def _noted(self, index: int) -> AbstractContextManager[Products]:
        return nullcontext({}) if self.differences is None else self.differences.noted(index)

    def _step(self, index: int, carry: Carry, passage: Passage, known: Products | None = None) -> Carry:
        """Run a block; products of which the teacher's are ``known``, by differences from them."""
        self.block_tokens += passage.input_ids.numel()
        with interruptible(), self._by_differences(known):
            return self.chain.step(index, carry, passage)

    def _by_differences(self, known: Products | None) -> AbstractContextManager[None]:
        return self.differences.products(known) if self.differences is not None and known else nullcontext()

    @contextmanager
    def _swapped(self, candidate: Candidate) -> Iterator[None]:
        """Round the weight, or its input; restore its storage afterwards. A tied embedding shares the weight."""
        if candidate.inputs_of:
            with int8_inputs(candidate.inputs_of, candidate.matrix.attribute, candidate.spec, candidate.expert):
                yield
            return
        with self.stages.timed("quantize"):
            values = candidate.rounded(self.scale)
        tensor = candidate.matrix.tensor
        original = tensor.data
        try:
            tensor.data = values.view_as(tensor)
            yield
        finally:
            tensor.data = original

    def _blame_block(self, carries: Sequence[Carry]) -> None:
        names = {id(module): name for name, module in self.chain.model.named_modules()}
        places = ["the embedding", *(names[id(block)] for block in self.chain.blocks)]
        broken = next(
            (place for place, carry in zip(places, carries, strict=True) if not torch.isfinite(carry.hidden).all()),
            "the final norm",
        )
        raise InvalidInputError(
            f"the full-precision model's hidden states are NaN or infinite from {broken} on; "
            "repair the checkpoint before sweeping it"
        )


def _start(unfinished: Unfinished | None, entry: Carry) -> tuple[Carry, int, list[torch.Tensor]]:
    return (entry, 0, []) if unfinished is None else (unfinished.carry, unfinished.block, [])
