"""A causal language model seen as a chain: embedding, blocks in a row, final norm, head.

The model's own forward stays in charge of all that lies outside the blocks (embedding, masks, rotary tables, final
norm): it runs with its blocks bypassed, to learn what the first block would get, what else the model hands to each
block, and what it makes of the last one's output. The record of the model's family (klfast.models.families) says where the
blocks are, and what crosses from one to the next beside the hidden states.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from klfast.core.errors import InvalidInputError
from klfast.models.calling import last_hidden
from klfast.models.families import family_of
from klfast.models.head import Head, close, find_head, linear_head
from klfast.models.linears import refuse_moving_weights


@dataclass(frozen=True)
class Carry:
    """What crosses a block boundary: the hidden states [B, T, H], and in some families more (batch first)."""

    hidden: torch.Tensor
    extra: tuple[torch.Tensor, ...] = ()

    @staticmethod
    def stack(carries: Sequence[Carry]) -> Carry:
        """Several carries as one larger batch."""
        extra = zip(*(carry.extra for carry in carries), strict=True)
        return Carry(torch.cat([carry.hidden for carry in carries]), tuple(torch.cat(parts) for parts in extra))


@dataclass(frozen=True)
class Passage:
    """A batch on its way through the chain.

    Attributes:
        input_ids: int64 [B, T].
        entry: what enters the first block.
        calls: for each block, the other arguments that the model gives it (masks, rotary tables ...).
    """

    input_ids: torch.Tensor
    entry: Carry
    calls: tuple[tuple[tuple, dict[str, object]], ...]


class Chain:
    """``head(run(enter(ids)))`` is ``model(ids).logits``, in steps that can be taken one by one.

    Attributes:
        model: the causal language model (transformers); left as it is.
        blocks: its blocks, in order.
        head: its output head, from the final hidden states to the logits.

    Raises:
        InvalidInputError: the blocks do not form a chain (the steps do not add up to the model), the logits are not what
            the head is known to make of the final hidden states, or the forward changes the model's weights.
    """

    def __init__(self, model: nn.Module) -> None:
        refuse_moving_weights(model)
        self.model = model
        self._name = type(model).__name__
        linear_head(model)
        self._base = getattr(model, "base_model", model)
        place = family_of(model).blocks
        self._carry_argument = place.carry
        self.blocks = _find_blocks(self._base, self._name, place.path)
        self._tuples: list[int] = [0] * len(self.blocks)  # per block: the length of the tuple it returns; 0: a tensor
        self.head = self._verify()

    def block_of(self, module_name: str) -> int | None:
        """Index of the block that holds a module of the model; None if none does."""
        parts = module_name.split(".")
        parents = {".".join(parts[:i]) for i in range(1, len(parts) + 1)}
        places = {id(block): i for i, block in enumerate(self.blocks)}
        return next(
            (
                places[id(module)]
                for name, module in self.model.named_modules()
                if name in parents and id(module) in places
            ),
            None,
        )

    @torch.no_grad()
    def enter(self, input_ids: torch.Tensor) -> Passage:
        """Embed int64 [B, T] ids, and learn what the blocks get beside the hidden states."""
        hidden, calls = [], []

        def note(index, state, args, kwargs):
            hidden.append(state)
            calls.append((args, kwargs))
            return state

        self._forward_around(input_ids, note)
        if len(calls) != len(self.blocks):
            raise self._no_chain(f"a forward pass calls {len(calls)} blocks of {len(self.blocks)}")
        return Passage(input_ids, Carry(hidden[0]), tuple(calls))

    @torch.no_grad()
    def step(self, index: int, carry: Carry, passage: Passage) -> Carry:
        """Block ``index`` of the carry that enters it. ``passage`` is that of a batch of the same size."""
        args, kwargs = passage.calls[index]
        block, name = self.blocks[index], self._carry_argument
        if name is None:
            return Carry(_hidden_of(block(carry.hidden, *args, **kwargs)))
        hidden, extra = block(carry.hidden, *args, **{**kwargs, name: carry.extra or None})
        return Carry(hidden, tuple(extra or ()))

    @torch.no_grad()
    def finish(self, carry: Carry, passage: Passage) -> torch.Tensor:
        """What enters the head, [B, T, H], from the carry that leaves the last block."""
        last = len(self.blocks) - 1
        output = self._forward_around(
            passage.input_ids, lambda index, state, args, kwargs: carry.hidden if index == last else state
        )
        return output[0]

    def run(self, carry: Carry, passage: Passage, start: int = 0) -> torch.Tensor:
        """What enters the head, [B, T, H], from the carry that enters block ``start``."""
        for index in range(start, len(self.blocks)):
            carry = self.step(index, carry, passage)
        return self.finish(carry, passage)

    def _forward_around(self, input_ids: torch.Tensor, stand_in: Callable) -> Sequence[torch.Tensor]:
        """The base model's forward with ``stand_in(index, hidden, args, kwargs) -> hidden`` in place of each block."""

        def substitute(index: int) -> Callable:
            def forward(*args, **kwargs):
                if args:
                    state, args = args[0], args[1:]
                elif "hidden_states" in kwargs:
                    state = kwargs.pop("hidden_states")
                else:
                    raise self._no_chain("a block is called without hidden states")
                state = stand_in(index, state, args, kwargs)
                length = self._tuples[index]
                return (state, *[None] * (length - 1)) if length else state

            return forward

        with _replaced_forwards(self.blocks, substitute):
            return self._base(input_ids=input_ids, use_cache=False)

    @torch.no_grad()
    def _verify(self) -> Head:
        """Compare the chain with the model on a few tokens; returns the head, compared as well."""
        projection = linear_head(self.model)
        ids = (torch.arange(14, device=projection.weight.device).view(2, 7) * 37 + 1) % projection.out_features

        def learn(index):
            def hook(module, args, output):
                self._tuples[index] = len(output) if isinstance(output, tuple) else 0

            return hook

        hooks = [block.register_forward_hook(learn(i)) for i, block in enumerate(self.blocks)]
        try:
            head, _ = find_head(self.model, ids)
        finally:
            for hook in hooks:
                hook.remove()
        final = last_hidden(self.model, ids)
        try:
            passage = self.enter(ids)
            hidden = self.run(passage.entry, passage)
        except (TypeError, ValueError, AttributeError, IndexError, RuntimeError) as error:
            if isinstance(error, InvalidInputError):
                raise
            raise self._no_chain(f"{type(error).__name__}: {error}") from error
        if not close(hidden, final):
            raise self._no_chain("run one by one they do not reproduce the model")
        return head

    def _no_chain(self, reason: str) -> InvalidInputError:
        reason = " ".join(reason.split())
        return InvalidInputError(f"{self._name}'s blocks do not form a chain ({reason}); klfast cannot sweep it")


def _find_blocks(base: nn.Module, name: str, path: str | None) -> list[nn.Module]:
    """The entries of the ModuleList at ``path``; without one of the ModuleList that holds the most parameters."""
    modules = base.modules() if path is None else [base.get_submodule(path)]
    lists = [module for module in modules if isinstance(module, nn.ModuleList) and len(module)]
    if not lists:
        raise InvalidInputError(
            f"{name}'s blocks do not form a chain (it has no list of blocks); klfast cannot sweep it"
        )
    blocks = list(max(lists, key=lambda found: sum(p.numel() for p in found.parameters())))
    if len(set(map(id, blocks))) < len(blocks):
        raise InvalidInputError(
            f"{name}'s blocks do not form a chain (one block is used several times); klfast cannot sweep it"
        )
    return blocks


@contextmanager
def _replaced_forwards(blocks: Sequence[nn.Module], substitute: Callable[[int], Callable]) -> Iterator[None]:
    """Give each block another ``forward`` for a while."""
    before = [vars(block).get("forward") for block in blocks]  # other libraries (accelerate) set it, too
    try:
        for index, block in enumerate(blocks):
            block.forward = substitute(index)
        yield
    finally:
        for block, forward in zip(blocks, before, strict=True):
            if forward is None:
                vars(block).pop("forward", None)
            else:
                block.forward = forward


def _hidden_of(output: torch.Tensor | tuple) -> torch.Tensor:
    return output[0] if isinstance(output, tuple) else output
