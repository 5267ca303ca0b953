"""A causal language model as a chain: embedding, consecutive blocks, final norm, head.

The model's own forward does everything outside the blocks (embedding, masks, rotary tables, final norm): it runs with
its blocks bypassed, which shows the input of the first block, the other arguments of each block, and the result for the
last block's output; where a single module makes that, as the final norm mostly does, it alone runs. The record of the
model's family (klfast.models.families) tells where the blocks are, and which tensors cross from one to the next beside
the hidden states.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from klfast.core.errors import InvalidInputError
from klfast.models.calling import last_hidden
from klfast.models.families import family_of
from klfast.models.head import Head, close, find_head, linear_head
from klfast.models.linears import refuse_moving_weights

# Takes the index of a block and its hidden states, other positional and keyword arguments; returns hidden states.
_StandIn = Callable[[int, torch.Tensor, tuple[object, ...], dict[str, object]], torch.Tensor]


@dataclass(frozen=True)
class Carry:
    """Tensors that cross a block boundary: the hidden states [B, T, H], and in some families others (batch first)."""

    hidden: torch.Tensor
    extra: tuple[torch.Tensor, ...] = ()

    @staticmethod
    def stack(carries: Sequence[Carry]) -> Carry:
        """Join several carries into one larger batch."""
        extra = zip(*(carry.extra for carry in carries), strict=True)
        return Carry(torch.cat([carry.hidden for carry in carries]), tuple(torch.cat(parts) for parts in extra))

    def split(self, rows: int) -> list[Carry]:
        """Return carries of ``rows`` rows each, which ``stack`` joined."""
        parts = zip(*(part.split(rows) for part in (self.hidden, *self.extra)), strict=True)
        return [Carry(hidden, tuple(extra)) for hidden, *extra in parts]

    def without(self, rows: int) -> Carry:
        """Return all but the first ``rows`` rows."""
        return Carry(self.hidden[rows:], tuple(part[rows:] for part in self.extra))


@dataclass(frozen=True)
class Passage:
    """A batch on its way through the chain.

    Attributes:
        input_ids: int64 [B, T].
        entry: input of the first block.
        calls: for each block, the other arguments that the model gives it (masks, rotary tables ...).
    """

    input_ids: torch.Tensor
    entry: Carry
    calls: tuple[tuple[tuple[object, ...], dict[str, object]], ...]


class Chain:
    """``model(ids).logits`` as ``head(run(enter(ids)))``, in steps that can be taken one by one.

    Attributes:
        model: the causal language model (transformers); left as it is.
        blocks: its blocks, in order.
        head: its output head, from the final hidden states to the logits.

    Raises:
        InvalidInputError: the blocks do not form a chain (the steps do not reproduce the model), the head makes logits
            in an unknown way, or the forward changes the model's weights.
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
        self._final: nn.Module | None = None  # makes the head's input of the last block's output, if one module does
        self.head = self._verify()

    def block_of(self, module_name: str) -> int | None:
        """Return the index of the block that contains a module of the model; None if there is none."""
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
        """Embed int64 [B, T] ids, and record the blocks' other arguments."""
        hidden: list[torch.Tensor] = []
        calls: list[tuple[tuple[object, ...], dict[str, object]]] = []

        def note(index: int, state: torch.Tensor, args: tuple[object, ...], kwargs: dict[str, object]) -> torch.Tensor:
            hidden.append(state)
            calls.append((args, kwargs))
            return state

        self._forward_around(input_ids, note)
        if len(calls) != len(self.blocks):
            raise self._no_chain(f"a forward pass calls {len(calls)} blocks of {len(self.blocks)}")
        return Passage(input_ids, Carry(hidden[0]), tuple(calls))

    @torch.no_grad()
    def step(self, index: int, carry: Carry, passage: Passage) -> Carry:
        """Run block ``index`` on its input. ``passage`` belongs to a batch of the same size."""
        args, kwargs = passage.calls[index]
        block, name = self.blocks[index], self._carry_argument
        if name is None:
            return Carry(_hidden_of(block(carry.hidden, *args, **kwargs)))
        hidden, extra = block(carry.hidden, *args, **{**kwargs, name: carry.extra or None})
        return Carry(hidden, tuple(extra or ()))

    @torch.no_grad()
    def finish(self, carry: Carry, passage: Passage) -> torch.Tensor:
        """Return the head's input, [B, T, H], from the last block's output."""
        if self._final is not None:
            found: torch.Tensor = self._final(carry.hidden)
            return found
        last = len(self.blocks) - 1
        output = self._forward_around(
            passage.input_ids, lambda index, state, args, kwargs: carry.hidden if index == last else state
        )
        return output[0]

    def run(self, carry: Carry, passage: Passage, start: int = 0) -> torch.Tensor:
        """Return the head's input, [B, T, H], from the input of block ``start``."""
        for index in range(start, len(self.blocks)):
            carry = self.step(index, carry, passage)
        return self.finish(carry, passage)

    def _forward_around(self, input_ids: torch.Tensor, stand_in: _StandIn) -> Sequence[torch.Tensor]:
        """Run the base model's forward with ``stand_in(index, hidden, args, kwargs) -> hidden`` for each block."""

        def substitute(index: int) -> Callable[..., object]:
            def forward(*args: Any, **kwargs: Any) -> object:
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

        with replaced_forwards(self.blocks, substitute):
            output: Sequence[torch.Tensor] = self._base(input_ids=input_ids, use_cache=False)
            return output

    @torch.no_grad()
    def _verify(self) -> Head:
        """Compare the chain with the model on a few tokens; return the head, which was compared as well."""
        projection = linear_head(self.model)
        ids = (torch.arange(14, device=projection.weight.device).view(2, 7) * 37 + 1) % projection.out_features

        def learn(index: int) -> Callable[[nn.Module, object, object], None]:
            def hook(module: nn.Module, args: object, output: object) -> None:
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
            self._final = self._find_final(passage)
            hidden = self.run(passage.entry, passage)
        except (TypeError, ValueError, AttributeError, IndexError, RuntimeError) as error:
            if isinstance(error, InvalidInputError):
                raise
            raise self._no_chain(f"{type(error).__name__}: {error}") from error
        if not close(hidden, final):
            raise self._no_chain("run one by one they do not reproduce the model")
        return head

    def _find_final(self, passage: Passage) -> nn.Module | None:
        """Return the module that the model calls with the last block's output alone, and whose result it returns."""
        marker, found = passage.entry.hidden.clone(), []

        def note(module: nn.Module, args: tuple[object, ...], output: object) -> None:
            if len(args) == 1 and args[0] is marker:
                found.append((module, output))

        hooks = [module.register_forward_hook(note) for module in self._base.children()]
        try:
            result = self._forward_around(passage.input_ids, lambda index, state, args, kwargs: marker)[0]
        finally:
            for hook in hooks:
                hook.remove()
        return next((module for module, output in found if output is result), None)

    def _no_chain(self, reason: str) -> InvalidInputError:
        reason = " ".join(reason.split())
        return InvalidInputError(f"{self._name}'s blocks do not form a chain ({reason}); klfast cannot sweep it")


def _find_blocks(base: nn.Module, name: str, path: str | None) -> list[nn.Module]:
    """Return the entries of the ModuleList at ``path``, or of the one with the most parameters if ``path`` is None."""
    modules = base.modules() if path is None else [base.get_submodule(path)]
    lists = [module for module in modules if isinstance(module, nn.ModuleList) and len(module)]
    if not lists:
        raise InvalidInputError(
            f"{name}'s blocks do not form a chain (it has no list of blocks); klfast cannot sweep it"
        )
    largest: nn.ModuleList = max(lists, key=lambda found: sum(p.numel() for p in found.parameters()))
    blocks = list(largest)
    if len(set(map(id, blocks))) < len(blocks):
        raise InvalidInputError(
            f"{name}'s blocks do not form a chain (one block is used several times); klfast cannot sweep it"
        )
    return blocks


@contextmanager
def replaced_forwards(
    blocks: Sequence[nn.Module], substitute: Callable[[int], Callable[..., object]]
) -> Iterator[None]:
    """Temporarily give each module another ``forward``."""
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


def _hidden_of(output: torch.Tensor | tuple[torch.Tensor, ...]) -> torch.Tensor:
    return output[0] if isinstance(output, tuple) else output
