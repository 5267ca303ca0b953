"""Watching what enters the matrices of a model while it runs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from klfast.models.matrices import Matrix


class Routed(NamedTuple):
    """The input of a mixture's experts: hidden states [T, H], and int64 [T, S], the experts that each token meets."""

    hidden: torch.Tensor
    experts: torch.Tensor


class Watched(TorchFunctionMode):
    """Notes the inputs of products with some weights.

    Forwards need not call the layer: Mamba's multiplies by dt_proj's weight itself, from the left.

    Attributes:
        inputs: the input [..., K] of each linear layer that was used, by name, in the order of first use.
        uses: how often each of them was used.
        routed: the input of experts, by the module.
    """

    def __init__(self, linear: Mapping[str, Matrix], last: Mapping[str, int]) -> None:
        super().__init__()
        self._names = {id(one.tensor): name for name, one in linear.items()}
        self._last = Counter(last)
        self.inputs: dict[str, torch.Tensor] = {}
        self.uses: Counter[str] = Counter()
        self.routed: dict[nn.Module, Routed] = {}

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if len(args) > 1:
            first, second = args[:2]
            if (name := self._names.get(id(second))) is not None:  # linear(x, weight)
                self._note(name, first)
            elif (name := self._names.get(id(first))) is not None and func.__name__.strip("_") == "matmul":
                self._note(name, second.transpose(-1, -2))
        return func(*args, **(kwargs or {}))

    def _note(self, name: str, x: torch.Tensor) -> None:
        before = self.inputs.get(name)
        self.inputs[name] = x if before is None else torch.cat([each.flatten(0, -2) for each in (before, x)])
        self.uses[name] += 1
        if self._last and self.uses >= self._last:
            raise _EnoughError

    def note_routed(self, experts: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        """Note the arguments of the forward of experts, as a hook that runs before it."""
        self.routed[experts] = Routed(*args[:2])


class _EnoughError(Exception):
    """What ends a forward that has shown all that was asked for."""


@contextmanager
def watched(
    linear: Mapping[str, Matrix], experts: Collection[nn.Module] = (), last: Mapping[str, int] | None = None
) -> Iterator[Watched]:
    """Note what enters linear layers and experts in this block, in which each module of experts runs at most once.

    The block is left as soon as layers were used as often as ``last`` says, if that is given.
    """
    seen = Watched(linear, last or {})
    with suppress(_EnoughError), ExitStack() as stack:
        for module in experts:
            stack.enter_context(module.register_forward_pre_hook(seen.note_routed))
        stack.enter_context(seen)
        yield seen
