"""The weight matrices of a model that can be quantized: of its linear layers, and of its experts.

The experts of a mixture hold one tensor [E, N, K] for a layer of all of them, a stack. Here, and in sweeps, plans and
files, it is one matrix [E * N, K], the experts' rows one after another; or each expert's [N, K] is a matrix by itself
(``with_experts``).
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from klfast.core.errors import UnknownLayerError
from klfast.models.expert_names import expert_in, expert_name
from klfast.nn import QuantExperts, QuantLinear
from klfast.nn.conv1d import is_conv1d
from klfast.nn.experts import stack_names
from klfast.nn.split_stack import SplitStack


@dataclass(frozen=True, eq=False)
class Matrix:
    """A matrix and where it is.

    Attributes:
        holder: an nn.Linear, perhaps a QuantLinear, or a Conv1D; or the experts that hold a stack in full precision; or
            a SplitStack.
        attribute: its name there.
        expert: for one expert's matrix of a stack, its number.
    """

    holder: nn.Module
    attribute: str = "weight"
    expert: int | None = None

    @property
    def held(self) -> torch.Tensor:
        """The tensor that the holder has: the weight, or the stack that one expert's is a part of."""
        tensor: torch.Tensor = getattr(self.holder, self.attribute)
        return tensor

    @property
    def tensor(self) -> torch.Tensor:
        """The weight as it is held, [N, K] or a stack [E, N, K]; a stand-in if it is quantized."""
        return self.held if self.expert is None else self.held[self.expert]

    @property
    def weight(self) -> torch.Tensor:
        """The weight as a matrix [N, K]: a view."""
        return self.tensor.T if is_conv1d(self.holder) else self.tensor.flatten(0, -2)

    @property
    def shape(self) -> tuple[int, int]:
        """N, K."""
        if isinstance(self.holder, SplitStack):
            return (self.holder.num_experts * self.holder.rows, self.holder.in_features)
        *rows, columns = self.tensor.shape
        first = torch.Size(rows).numel()
        return (columns, first) if is_conv1d(self.holder) else (first, columns)

    @property
    def bias(self) -> torch.Tensor | None:
        """The linear layer's; experts have none."""
        return getattr(self.holder, "bias", None)

    @property
    def nbytes(self) -> int:
        """The bytes of its values, with scales and zero points."""
        if isinstance(self.holder, QuantLinear):
            return self.holder.quantized.nbytes
        if isinstance(self.holder, SplitStack):
            return self.holder.nbytes
        return self.tensor.numel() * self.tensor.element_size()

    @property
    def is_quantized(self) -> bool:
        """True if it lies in a QuantLinear; of a SplitStack, some of its experts do."""
        return isinstance(self.holder, (QuantLinear, SplitStack))

    @property
    def quantized_layers(self) -> list[QuantLinear]:
        """The QuantLinears that it lies in; none in full precision, several for the parts of a SplitStack."""
        if isinstance(self.holder, SplitStack):
            return [part for part in self.holder.held if isinstance(part, QuantLinear)]
        return [self.holder] if isinstance(self.holder, QuantLinear) else []

    @property
    def is_stack(self) -> bool:
        """True for a stack in full precision."""
        return self.is_of_experts and self.expert is None

    @property
    def is_of_experts(self) -> bool:
        """True for a stack in full precision, and for one expert's matrix in it."""
        return not is_linear(self.holder) and not isinstance(self.holder, SplitStack)

    @property
    def key(self) -> tuple[int, int | None]:
        """What is the same for matrices that are one, as long as the holders live."""
        return id(self.held), self.expert


def is_linear(module: nn.Module) -> bool:
    """Return True for an nn.Linear and for a Conv1D."""
    return isinstance(module, nn.Linear) or is_conv1d(module)


def matrices(model: nn.Module) -> dict[str, Matrix]:
    """Return every matrix by name, in module order, including lm_head.

    A linear layer is an ``nn.Linear``, as klfast's ``QuantLinear`` is, or a Conv1D; convolutions, embeddings, norms and
    routers are never quantized, nor are the matrices that ``klfast.models.sizes.unquantizable`` lists. A matrix that
    several modules share counts once, under the first of its names (see ``sharers``).
    """
    found = named_matrices(model)
    return {names[0]: found[names[0]] for names in _grouped(found)}


def named_matrices(model: nn.Module) -> dict[str, Matrix]:
    """Return the matrices under each of their names: a layer that several blocks share has several."""
    found: dict[str, Matrix] = {}
    parts: set[nn.Module] = set()
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, SplitStack):
            parts.update(module.parts)
        if is_linear(module) and module not in parts:
            found.setdefault(name, Matrix(module))
        for stack in stack_names(module):
            held = getattr(module, stack)
            found[f"{name}.{stack}".lstrip(".")] = (
                Matrix(held) if isinstance(held, (nn.Linear, SplitStack)) else Matrix(module, stack)
            )
    return found


def with_experts(found: Mapping[str, Matrix]) -> dict[str, Matrix]:
    """Return matrices with those of single experts, one by one, in the places of stacks in full precision."""
    each: dict[str, Matrix] = {}
    for name, one in found.items():
        if one.is_stack:
            each |= {expert_name(name, i): Matrix(one.holder, one.attribute, i) for i in range(len(one.held))}
        else:
            each[name] = one
    return each


def split_stacks(model: nn.Module) -> dict[str, SplitStack]:
    """Return the stacks whose experts have different precisions, under each of their names."""
    found = ((name, one.holder) for name, one in named_matrices(model).items())
    return {name: holder for name, holder in found if isinstance(holder, SplitStack)}


def sharers(model: nn.Module) -> list[list[str]]:
    """Return the names of the matrices, in module order, grouped by matrix."""
    return _grouped(named_matrices(model))


def matrix(model: nn.Module, name: str) -> Matrix:
    """Return the matrix of that name; one expert's has that of ``klfast.models.expert_names``.

    Raises:
        UnknownLayerError: there is none; the message names the closest.
    """
    found = named_matrices(model)
    if name in found:
        return found[name]
    if (each := with_experts(found)).get(name) is not None:
        return each[name]
    close = difflib.get_close_matches(name, [*found, *each] if expert_in(name) else found, 1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    raise UnknownLayerError(f"the model has no linear layer {name!r}{hint}")


def replacements(model: nn.Module, quantized: Mapping[str, QuantLinear]) -> dict[str, nn.Module]:
    """Return the modules to put into a model, by name, so that its matrices are these, by name.

    For linear layers they are the QuantLinears themselves, for stacks QuantExperts that hold them, and for single
    experts QuantExperts that hold SplitStacks.
    """
    known = named_matrices(model)
    found: dict[str, nn.Module] = {}
    stacks: dict[nn.Module, dict[str, QuantLinear | SplitStack]] = {}
    split: dict[str, dict[int, QuantLinear]] = {}
    for name, layer in quantized.items():
        if name not in known and (of := expert_in(name)):
            split.setdefault(of[0], {})[of[1]] = layer
        elif (one := known[name]).is_stack:
            stacks.setdefault(one.holder, {})[one.attribute] = layer
        else:
            found[name] = layer
    for stack, experts_of in split.items():
        one = known[stack]
        stacks.setdefault(one.holder, {})[one.attribute] = SplitStack(experts_of, one.held)
    experts = {holder: QuantExperts(holder, layers) for holder, layers in stacks.items()}
    named = model.named_modules(remove_duplicate=False)
    return found | {name: experts[module] for name, module in named if module in experts}


def _grouped(found: dict[str, Matrix]) -> list[list[str]]:
    groups: dict[int, list[str]] = {}
    for name, one in found.items():
        groups.setdefault(_identity(one), []).append(name)
    return list(groups.values())


def _identity(of: Matrix) -> int:
    """Return the same number for matrices that are one."""
    holder: Any = of.holder
    if isinstance(holder, QuantLinear):
        held = holder._buffers.get(holder.part_names[0])
    else:
        held = holder._parameters.get(of.attribute)
    return id(holder if held is None else held)
