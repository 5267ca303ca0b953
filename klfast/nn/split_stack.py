"""SplitStack: a stack of experts' matrices, each of which may have a precision of its own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import nn

from klfast.core.errors import InvalidInputError
from klfast.nn.linear import QuantLinear
from klfast.nn.stack_product import stack_product
from klfast.quant.layouts import Layout
from klfast.quant.tensor import QuantizedTensor
from klfast.reference import out_of_range


class SplitStack(nn.Module):
    """The matrices [N, K] of a mixture's experts, some in one format, some in another, some in full precision.

    Each format is a part: a QuantLinear with the rows of its experts, one expert after another, in ``parts``. Matrices
    in full precision are the parameter ``dense`` [D, N, K], or None.

    Args:
        quantized: experts' matrices in other formats, by the number of the expert; at least one.
        full: all experts' matrices in full precision, [E, N, K]; only those of the other experts are kept.

    Attributes:
        places: by expert, the number of its part (that of ``dense`` comes after all others) and its place in it.
        roundings: by quantized expert, "nearest" or "gptq" (see ``QuantLinear``).
    """

    dense: torch.Tensor | None

    def __init__(self, quantized: Mapping[int, QuantLinear], full: torch.Tensor) -> None:
        super().__init__()
        self.num_experts, self.rows, self.in_features = full.shape
        self.roundings = {expert: quantized[expert].rounding for expert in sorted(quantized)}
        members: dict[object, list[int]] = {}
        for expert in self.roundings:
            layer = quantized[expert]
            members.setdefault((layer.spec, layer.activation, layer.dtype), []).append(expert)
        others = [expert for expert in range(self.num_experts) if expert not in quantized]
        self.parts = nn.ModuleList(_joined([quantized[expert] for expert in some]) for some in members.values())
        kept = nn.Parameter(full.detach()[others], requires_grad=full.requires_grad) if others else None
        self.register_parameter("dense", kept)
        places = {
            expert: (part, place)
            for part, some in enumerate((*members.values(), others))
            for place, expert in enumerate(some)
        }
        self.places = tuple(places[expert] for expert in range(self.num_experts))
        self.train(any(layer.training for layer in quantized.values()))

    @property
    def held(self) -> list[QuantLinear | torch.Tensor]:
        """All parts, ``dense`` the last if there is one; InvalidInputError if adapters have wrapped one."""
        found: list[QuantLinear | torch.Tensor] = []
        for part in self.parts:
            if not isinstance(part, QuantLinear):
                raise InvalidInputError(
                    f"a part of quantized experts has become a {type(part).__name__}, which knows no experts; "
                    "leave them out of the modules that adapters wrap (target_modules of peft)"
                )
            found.append(part)
        return found if self.dense is None else [*found, self.dense]

    @property
    def dtype(self) -> torch.dtype:
        """The apparent dtype of the weights, as of a QuantLinear."""
        return self.held[0].dtype

    @property
    def full(self) -> list[int]:
        """The experts in full precision, rising: those of ``dense``."""
        return [expert for expert, (part, _) in enumerate(self.places) if part == len(self.parts)]

    @property
    def weight(self) -> torch.Tensor:
        """All matrices, [E, N, K], dequantized."""
        held = [
            part if isinstance(part, torch.Tensor) else part.weight.view(-1, self.rows, self.in_features)
            for part in self.held
        ]
        return torch.stack([held[part][place].to(self.dtype) for part, place in self.places])

    @property
    def nbytes(self) -> int:
        """The bytes of all values, with scales and zero points."""
        dense = 0 if self.dense is None else self.dense.numel() * self.dense.element_size()
        return dense + sum(part.quantized.nbytes for part in self.held if isinstance(part, QuantLinear))

    def slots(self, part: int) -> list[int]:
        """Return the place that each expert has in a part; -1 for experts of other parts."""
        return [place if of == part else -1 for of, place in self.places]

    def layers(self) -> Iterator[tuple[int, QuantLinear]]:
        """Yield each quantized expert's number and its matrix as a layer of its own, views where rows allow it."""
        for expert, rounding in self.roundings.items():
            number, place = self.places[expert]
            part = self.held[number]
            assert isinstance(part, QuantLinear)
            matrix = part.quantized.block(place * self.rows, (place + 1) * self.rows)
            layer = QuantLinear(matrix, activation=part.activation, dtype=part.dtype)
            layer.rounding = rounding
            yield expert, layer

    def product(self, x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        """Multiply each row of x [M, K] by the matrices that index, int64 [M, S], names: [M, S, N].

        A part's product computes only the pairs that are routed to its experts.

        Raises:
            InvalidInputError: there is no such expert.
        """
        if index.numel() and not (index.min() >= 0 and index.max() < self.num_experts):
            raise out_of_range(index, self.num_experts)
        y = x.new_empty(*index.shape, self.rows)
        for number, part in enumerate(self.held):
            slots = torch.tensor(self.slots(number), device=index.device)
            place = slots[index]
            row, choice = (place >= 0).nonzero(as_tuple=True)
            if len(row):
                count = len(part) if isinstance(part, torch.Tensor) else part.out_features // self.rows
                found = stack_product(part, count, x[row], place[row, choice].unsqueeze(1))
                y[row, choice] = found.squeeze(1)
        return y

    def extra_repr(self) -> str:
        """Return the number of experts, the size of a matrix, and how many experts keep full precision."""
        return f"{self.num_experts} experts, rows={self.rows}, in_features={self.in_features}, full={len(self.full)}"


def _joined(layers: list[QuantLinear]) -> QuantLinear:
    """Return one layer with the rows of several that have a spec, an activation and a dtype in common."""
    matrix = QuantizedTensor.joined([layer.quantized.to_layout(Layout.PLAIN) for layer in layers])
    first = layers[0]
    return QuantLinear(matrix, activation=first.activation, dtype=first.dtype)
