"""Measurement of one micro-batch of a sweep: how each candidate changes the model's next-token distributions.

A candidate is one matrix quantized, or the input of one rounded to int8, all else at full precision. The teacher runs
once and leaves the carry at every block boundary; a candidate re-runs its own block from there, and all candidates of a
block go through the rest of the network as one larger batch. Only through a block that uses a candidate's weight again
(Zamba's shared blocks) they go one by one, each with its own weight. Full logits are never materialised.

Inputs are rounded beside the exact weight. The errors of a weight and of its input are small and independent, so their
KLs add up. With the quantized weight, the KL that int8 adds would be the small difference of two large ones, noisy, and
another one for each spec.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import nn

from klfast.core.errors import InvalidInputError
from klfast.core.interrupts import interruptible
from klfast.models.block_chain import Carry, Chain, Passage
from klfast.models.head import Readout, divergence
from klfast.models.matrices import Matrix
from klfast.quant.rounding import fake_quantize
from klfast.quant.spec import QuantSpec
from klfast.sensitivity import sampled_vocabulary
from klfast.sensitivity.int8_inputs import int8_inputs, rounded
from klfast.sensitivity.results import METRICS
from klfast.sensitivity.sampled_vocabulary import Sample
from klfast.sensitivity.unfinished import Unfinished

SQNR_CAP = 150.0  # dB; beyond float32's resolution, so that a token with equal logits does not make the mean infinite
COLUMNS = (*METRICS, "ce_teacher")  # the columns of the measuring methods' sums
SAMPLED = ("kl_teacher_student", "delta_ce")  # the metrics that a part of the vocabulary gives
STAGES = ("teacher", "quantize", "own_block", "suffix", "divergence")
_T = TypeVar("_T")
LARGE = 0.1  # nats: a mean KL above this is measured with the whole vocabulary,
UNSURE = 0.05  # as is one whose standard error over draws is more than this share of it
COMPARED_TOGETHER = 16  # candidates that share one computation of the teacher's logits


@dataclass(frozen=True)
class Candidate:
    """A named matrix and the spec to quantize it to; only its ``rows`` (first, end), if it has a ``use``.

    With ``inputs_of``, the modules that hold it, their input is rounded to int8 in the spec's groups, not the weight.
    ``blocks`` are the indices of all blocks that use its weight, in order; empty for the head.
    """

    name: str
    matrix: Matrix
    spec: QuantSpec
    blocks: tuple[int, ...] = ()
    use: str | None = None
    rows: tuple[int, int] | None = None
    inputs_of: tuple[nn.Module, ...] = ()

    def __str__(self) -> str:
        if self.inputs_of:
            return f"{self.name} with int8 activations"
        return f"{self.name}{f' ({self.use} rows)' if self.use else ''} as {self.spec}"


@dataclass(frozen=True)
class Teacher:
    """The full-precision model on one micro-batch of B windows, T tokens each.

    Attributes:
        passage: the micro-batch.
        carries: the input of each block, in order.
        hidden: input of the head, [B * (T - 1), H]; a window's last token has no next one to be compared at.
        targets: the next tokens, int64 [B * (T - 1)].
        sample: the part of the vocabulary that stands for all of it; None to compare all of it.
    """

    passage: Passage
    carries: list[Carry]
    hidden: torch.Tensor
    targets: torch.Tensor
    sample: Sample | None


class Engine:
    """Measures candidates, one micro-batch at a time.

    The measuring methods return sums over each window's T - 1 tokens, float64 [C, len(COLUMNS), B]; of a sampled
    vocabulary only ``SAMPLED`` and ce_teacher, and zeros in the other columns. Given ``unfinished`` they continue an
    earlier, interrupted call.

    Attributes:
        seconds: wall time spent so far, by stage.
        block_tokens: tokens that went through a block so far, counted once for each block.
        in_full: comparisons with the whole vocabulary so far, one a candidate and micro-batch.
        pause: called after each block that candidates went through, with the state needed to continue from there.
    """

    def __init__(self, chain: Chain, scale: str, max_batch_tokens: int, vocabulary_rows: int | None = None) -> None:
        self.chain = chain
        self._full_head = chain.head.readout()  # unaffected while the head is swapped
        self.scale = scale
        self.max_batch_tokens = max_batch_tokens
        self.seconds = dict.fromkeys(STAGES, 0.0)
        self.vocabulary_rows = vocabulary_rows  # of a sample a token; None for the whole vocabulary
        self.block_tokens = self.in_full = 0
        self._stacks_of: Passage | None = None
        self._stacks: dict[int, Passage] = {}  # by number of copies of that passage
        self.pause: Callable[[Unfinished], None] = lambda unfinished: None

    def teach(self, input_ids: torch.Tensor) -> Teacher:
        """Run the full-precision model on a micro-batch, int64 [B, T]."""
        with self._timed("teacher"):
            passage = self.chain.enter(input_ids)
            carries = [passage.entry]
            for index in range(len(self.chain.blocks)):
                carries.append(self._step(index, carries[-1], passage))
            hidden = self.chain.finish(carries[-1], passage)
            if not torch.isfinite(hidden).all():
                self._blame_block(carries)
            compared, targets = self._compared(hidden)[0], input_ids[:, 1:].flatten()
            if self.vocabulary_rows is None:
                sample = None
            else:
                sample = sampled_vocabulary.draw(self._full_head, compared, input_ids, self.vocabulary_rows)
            return Teacher(passage, carries[:-1], compared, targets, sample)

    def measure_block(
        self, teacher: Teacher, index: int, candidates: Sequence[Candidate], unfinished: Unfinished | None = None
    ) -> torch.Tensor:
        """Measure at most COMPARED_TOGETHER candidates, whose weights are first used in block ``index``."""
        windows, length = teacher.passage.input_ids.shape
        width = max(1, self.max_batch_tokens // (windows * length))
        finals = [] if unfinished is None else list(unfinished.finals)
        for part in chunks(candidates, width)[len(finals) // width :]:
            if unfinished is None:
                carry, start = (
                    Carry.stack([self._own_block(index, teacher.carries[index], teacher.passage, one) for one in part]),
                    index + 1,
                )
                self.pause(Unfinished(list(finals), carry, start))
            else:
                carry, start, unfinished = unfinished.carry, unfinished.block, None
            with self._timed("suffix"):
                hidden = self._run(teacher.passage, carry, start, finals, part)
            for candidate, final in zip(part, hidden.split(windows), strict=True):
                self._require_finite(candidate, final)
                finals.append(final)
        return self._compare(teacher, self._compared(torch.cat(finals), len(candidates)))

    def measure_head(
        self, teacher: Teacher, candidate: Candidate, tied: bool, unfinished: Unfinished | None = None
    ) -> torch.Tensor:
        """Measure the head under one spec. A tied embedding reads the quantized rows, which affects every block."""
        if candidate.inputs_of:
            return self._compare(teacher, rounded(teacher.hidden, candidate.spec).unsqueeze(0))
        with self._swapped(candidate):
            if tied:
                with self._timed("suffix"):
                    passage = self.chain.enter(teacher.passage.input_ids)
                    hidden = self._compared(self._run(passage, *_start(unfinished, passage.entry)))
                self._require_finite(candidate, hidden)
            else:
                hidden = teacher.hidden.unsqueeze(0)
            return self._diverge(teacher, hidden, self.chain.head.readout())

    def measure_noise(self, teacher: Teacher, seed: int, unfinished: Unfinished | None = None) -> torch.Tensor:
        """Measure the teacher against itself, each embedding moved by at most one ulp, so that all rounding differs."""
        entry = teacher.carries[0].hidden
        generator = torch.Generator().manual_seed(seed)
        ulps = (torch.rand(entry.shape, generator=generator) * 2 - 1).to(entry.device)
        nudged = (entry.float() * (1 + torch.finfo(entry.dtype).eps * ulps)).to(entry.dtype)
        with self._timed("suffix"):
            hidden = self._run(teacher.passage, *_start(unfinished, Carry(nudged, teacher.carries[0].extra)))
        return self._compare(teacher, self._compared(hidden))

    def _own_block(self, index: int, carry: Carry, passage: Passage, candidate: Candidate) -> Carry:
        with self._swapped(candidate), self._timed("own_block"):
            return self._step(index, carry, passage)

    def _run(
        self,
        passage: Passage,
        carry: Carry,
        start: int,
        finals: list[torch.Tensor],
        candidates: Sequence[Candidate] = (),
    ) -> torch.Tensor:
        """Run C passes from the input of block ``start``; return the head's input, [C * B, T, H].

        Each of the ``candidates`` changes its weight in one of the passes; without any, the weights stay as they are.
        ``finals`` are the results of the candidates before them, for ``pause``.
        """
        copies = len(carry.hidden) // len(passage.input_ids)
        together = self._repeated(passage, copies)
        for index in range(start, len(self.chain.blocks)):
            if any(index in candidate.blocks for candidate in candidates):
                carry = self._one_by_one(index, carry, passage, candidates)
            else:
                carry = self._step(index, carry, together)
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

    def _step(self, index: int, carry: Carry, passage: Passage) -> Carry:
        self.block_tokens += passage.input_ids.numel()
        with interruptible():
            return self.chain.step(index, carry, passage)

    @contextmanager
    def _swapped(self, candidate: Candidate) -> Iterator[None]:
        """Round the weight, or its input; restore its storage afterwards. A tied embedding shares the weight."""
        if candidate.inputs_of:
            with int8_inputs(candidate.inputs_of, candidate.matrix.attribute, candidate.spec):
                yield
            return
        tensor, weight = candidate.matrix.tensor, candidate.matrix.weight
        first, end = candidate.rows or (0, len(weight))
        with self._timed("quantize"):
            try:
                with interruptible():
                    rounded = fake_quantize(weight[first:end], candidate.spec, scale=self.scale).to(weight.dtype)
            except InvalidInputError as error:
                raise InvalidInputError(f"{candidate}: {error}") from error
            if candidate.rows:
                rounded = torch.cat((weight[:first], rounded, weight[end:]))
        original = tensor.data
        try:
            tensor.data = rounded.view_as(tensor)
            yield
        finally:
            tensor.data = original

    def _compare(self, teacher: Teacher, hidden: torch.Tensor) -> torch.Tensor:
        """Compare the head's input [C, B * (T - 1), H] with the teacher's under the full-precision head."""
        if teacher.sample is None:
            return self._diverge(teacher, hidden, self._full_head)
        with self._timed("divergence"), interruptible():
            found = sampled_vocabulary.estimate(teacher.sample, self._full_head, teacher.hidden, hidden)
        mean, error = found.kl.mean(-1), found.variance.sum(-1).sqrt() / found.variance.shape[-1]
        is_sure = (mean <= LARGE) & (error <= UNSURE * mean)  # not where they are NaN
        columns = [COLUMNS.index(name) for name in (*SAMPLED, "ce_teacher")]
        sums = torch.zeros(len(hidden), len(COLUMNS), len(teacher.passage.input_ids), dtype=torch.float64)
        for column, per_token in zip(columns, (found.kl, found.delta_ce, teacher.sample.ce), strict=True):
            sums[:, column] = self._by_window(teacher, per_token)
        if len(doubtful := (~is_sure).nonzero().flatten().cpu()):
            whole = self._diverge(teacher, hidden[doubtful.to(hidden.device)], self._full_head)
            sums[doubtful.unsqueeze(-1), columns] = whole[:, columns]
        return sums

    def _compared(self, hidden: torch.Tensor, candidates: int = 1) -> torch.Tensor:
        """Return [C * B, T, H] without each window's last token, in the head's dtype: [C, B * (T - 1), H]."""
        dtype = self.chain.head.dtype
        return hidden[:, :-1].to(dtype).reshape(candidates, -1, hidden.shape[-1])

    def _diverge(self, teacher: Teacher, hidden: torch.Tensor, head: Readout) -> torch.Tensor:
        with self._timed("divergence"):
            with interruptible():
                found = divergence(teacher.hidden, self._full_head, hidden, head, teacher.targets)
            assert found.ce_student is not None and found.ce_teacher is not None  # there are targets
            columns = {"delta_ce": found.ce_student - found.ce_teacher, "sqnr_db": found.sqnr_db.clamp(max=SQNR_CAP)}
            per_token = torch.stack([columns[name] if name in columns else getattr(found, name) for name in COLUMNS])
            self.in_full += len(hidden)
            return self._by_window(teacher, per_token.view(len(COLUMNS), len(hidden), -1)).transpose(0, 1)

    def _by_window(self, teacher: Teacher, per_token: torch.Tensor) -> torch.Tensor:
        """Sum [..., B * (T - 1)] over each window's tokens: float64 [..., B]."""
        windows = len(teacher.passage.input_ids)  # on the CPU, as some GPUs have no float64
        sums: torch.Tensor = per_token.cpu().double().view(*per_token.shape[:-1], windows, -1).sum(-1)
        return sums

    def _require_finite(self, candidate: Candidate, hidden: torch.Tensor) -> None:
        if not torch.isfinite(hidden).all():
            raise InvalidInputError(
                f"{candidate} makes the model's hidden states NaN or infinite; "
                "leave this layer out of `layers`, or sweep other specs"
            )

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

    @contextmanager
    def _timed(self, stage: str) -> Iterator[None]:
        """Add the time spent to a stage, without that of stages inside it."""
        start, counted = time.perf_counter(), sum(self.seconds.values())
        try:
            yield
        finally:
            inside = sum(self.seconds.values()) - counted
            self.seconds[stage] += time.perf_counter() - start - inside


def _start(unfinished: Unfinished | None, entry: Carry) -> tuple[Carry, int, list[torch.Tensor]]:
    return (entry, 0, []) if unfinished is None else (unfinished.carry, unfinished.block, [])


def chunks(items: Sequence[_T], size: int) -> list[Sequence[_T]]:
    """Split ``items`` into pieces of at most ``size``."""
    return [items[start : start + size] for start in range(0, len(items), size)]
