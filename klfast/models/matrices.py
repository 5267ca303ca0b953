"""The weight matrices of a model that can be quantized: of its linear layers, and of its experts.

The experts of a mixture hold one tensor [E, N, K] for a layer of all of them, a stack. Here, and in sweeps, plans and
files, it is one matrix [E * N, K], the experts' rows one after another.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from klfast.core.errors import UnknownLayerError
from klfast.nn import QuantExperts, QuantLinear
from klfast.nn.conv1d import is_conv1d
from klfast.nn.experts import stack_names


@dataclass(frozen=True, eq=False)
class Matrix:
    """A matrix and where it is.

    Attributes:
        holder: an nn.Linear, perhaps a QuantLinear, or a Conv1D; or the experts that hold a stack in full precision.
        attribute: its name there.
    """

    holder: nn.Module
    attribute: str = "weight"

    @property
    def tensor(self) -> torch.Tensor:
        """The weight as it is held, [N, K] or a stack [E, N, K]; a stand-in if it is quantized."""
        tensor: torch.Tensor = getattr(self.holder, self.attribute)
        return tensor

    @property
    def weight(self) -> torch.Tensor:
        """The weight as a matrix [N, K]: a view."""
        return self.tensor.T if is_conv1d(self.holder) else self.tensor.flatten(0, -2)

    @property
    def shape(self) -> tuple[int, int]:
        """N, K."""
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
        return self.tensor.numel() * self.tensor.element_size()

    @property
    def is_quantized(self) -> bool:
        """True if it lies in a QuantLinear."""
        return isinstance(self.holder, QuantLinear)

    @property
    def is_stack(self) -> bool:
        """True for a stack in full precision."""
        return not is_linear(self.holder)


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
    for name, module in model.named_modules(remove_duplicate=False):
        if is_linear(module):
            found.setdefault(name, Matrix(module))
        for stack in stack_names(module):
            held = getattr(module, stack)
            found[f"{name}.{stack}".lstrip(".")] = (
                Matrix(held) if isinstance(held, nn.Linear) else Matrix(module, stack)
            )
    return found


def sharers(model: nn.Module) -> list[list[str]]:
    """Return the names of the matrices, in module order, grouped by matrix."""
    return _grouped(named_matrices(model))


def matrix(model: nn.Module, name: str) -> Matrix:
    """Return the matrix of that name.

    Raises:
        UnknownLayerError: there is none; the message names the closest.
    """
    found = named_matrices(model)
    if name not in found:
        close = difflib.get_close_matches(name, found, 1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise UnknownLayerError(f"the model has no linear layer {name!r}{hint}")
    return found[name]


def replacements(model: nn.Module, quantized: Mapping[str, QuantLinear]) -> dict[str, nn.Module]:
    """Return the modules to put into a model, by name, so that its matrices are these, by name.

    For linear layers they are the QuantLinears themselves, for stacks QuantExperts that hold them.
    """
    known = named_matrices(model)
    found: dict[str, nn.Module] = {}
    stacks: dict[nn.Module, dict[str, QuantLinear]] = {}
    for name, layer in quantized.items():
        one = known[name]
        if one.is_stack:
            stacks.setdefault(one.holder, {})[one.attribute] = layer
        else:
            found[name] = layer
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
    held = holder._buffers.get(holder.part_names[0]) if of.is_quantized else holder._parameters.get(of.attribute)
    return id(holder if held is None else held)
