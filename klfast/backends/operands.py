"""Arguments of ops, parsed for every backend: weights, heads, targets, outputs, layouts."""

from __future__ import annotations

from typing import NamedTuple

import torch

from klfast.core.errors import InvalidInputError
from klfast.dispatch import registry
from klfast.quant.layouts import Layout
from klfast.quant.spec import QuantSpec
from klfast.quant.tensor import QuantizedTensor, Stored, parse, stored

FEW_ROWS = 8  # up to this many, the kernels read a weight in place, at memory speed


class MatmulArgs(NamedTuple):
    """The arguments of dequant_matmul, checked: ``y = x W^T + bias``.

    Attributes:
        x: float [..., K].
        parts: the weight's tensors.
        bias: float [N], or None.
        weight: the meaning of ``parts``.
        activation: one of ``ACTIVATIONS``.
    """

    x: torch.Tensor
    parts: list[torch.Tensor]
    bias: torch.Tensor | None
    weight: Stored
    activation: str

    @classmethod
    def of(
        cls,
        x: torch.Tensor,
        parts: list[torch.Tensor],
        bias: torch.Tensor | None,
        n: int,
        k: int,
        format: str,
        layout: str,
        activation: str,
    ) -> MatmulArgs:
        """Parse the schema's arguments; InvalidInputError for an unknown format or layout."""
        weight = stored(n, k, format, layout)
        return tuple.__new__(cls, (x, parts, bias, weight, activation))  # half the time of cls()

    @property
    def quantized(self) -> QuantizedTensor:
        """The weight."""
        return QuantizedTensor(self.parts, self.weight.shape, self.weight.spec, self.weight.layout)

    def parts_in(self, layout: Layout) -> list[torch.Tensor]:
        """Return the weight's parts in another layout."""
        weight = self.weight
        return weight.spec.format.convert(self.parts, weight.shape, weight.spec, weight.layout, layout)


class GroupedMatmulArgs(NamedTuple):
    """The arguments of grouped_dequant_matmul, checked.

    Attributes:
        x: float [..., K].
        parts: the tensors of some matrices [N, K], one below the other.
        index: int64 [..., S], the matrices that a row of x meets.
        matrices: their number.
        weight: the meaning of ``parts``, for all matrices together.
        activation: one of ``ACTIVATIONS``.
    """

    x: torch.Tensor
    parts: list[torch.Tensor]
    index: torch.Tensor  # type: ignore[assignment]  # hides tuple.index, which nobody calls
    matrices: int
    weight: Stored
    activation: str

    @classmethod
    def of(
        cls,
        x: torch.Tensor,
        parts: list[torch.Tensor],
        index: torch.Tensor,
        count: int,
        n: int,
        k: int,
        format: str,
        layout: str,
        activation: str,
    ) -> GroupedMatmulArgs:
        """Parse the schema's arguments, of which ``n`` are the rows of all matrices, as ``MatmulArgs.of`` does."""
        return cls(x, parts, index, count, stored(n, k, format, layout), activation)

    @property
    def quantized(self) -> QuantizedTensor:
        """All matrices."""
        return QuantizedTensor(self.parts, self.weight.shape, self.weight.spec, self.weight.layout)

    @property
    def n(self) -> int:
        """Rows of a matrix."""
        return self.weight.shape[0] // self.matrices


class DivergenceArgs(NamedTuple):
    """The arguments of linear_divergence, checked.

    Attributes:
        teacher, student: hidden states, float [..., H].
        t_head, s_head: heads [V, H], float or quantized.
        targets: int64, or None.
    """

    teacher: torch.Tensor
    t_head: torch.Tensor | QuantizedTensor
    student: torch.Tensor
    s_head: torch.Tensor | QuantizedTensor
    targets: torch.Tensor | None

    @classmethod
    def of(
        cls,
        teacher: torch.Tensor,
        t_parts: list[torch.Tensor],
        student: torch.Tensor,
        s_parts: list[torch.Tensor],
        targets: torch.Tensor | None,
        t_rows: int,
        t_format: str,
        t_layout: str,
        s_rows: int,
        s_format: str,
        s_layout: str,
    ) -> DivergenceArgs:
        """Parse the schema's arguments; InvalidInputError for an unknown format or parts that do not fit."""
        t_head = head_of(teacher, t_parts, t_rows, t_format, t_layout)
        return cls(teacher, t_head, student, head_of(student, s_parts, s_rows, s_format, s_layout), targets)

    def formats(self) -> list[str]:
        """Return the formats of the quantized heads."""
        return [head.spec.format.name for head in (self.t_head, self.s_head) if isinstance(head, QuantizedTensor)]


def head_parts(head: torch.Tensor | QuantizedTensor) -> tuple[list[torch.Tensor], tuple[int, str, str]]:
    """Return a head's tensors and its rows, format and layout for linear_divergence; both texts are empty if float."""
    if isinstance(head, QuantizedTensor):
        return list(head.parts), (head.shape[0], head.spec.text, head.layout.value)
    return [head], (head.shape[0] if head.dim() else 0, "", "")


def head_of(
    hidden: torch.Tensor, parts: list[torch.Tensor], vocab: int, format: str, layout: str
) -> torch.Tensor | QuantizedTensor:
    """Invert ``head_parts``, for hidden states [..., H]; InvalidInputError if the parts do not form a [vocab, H]."""
    if format:
        return QuantizedTensor(parts, (vocab, hidden.shape[-1] if hidden.dim() else 0), *parse(format, layout))
    if len(parts) != 1:
        raise InvalidInputError(f"linear_divergence: a float head is one tensor, got {len(parts)}")
    return parts[0]


def flat_targets(targets: torch.Tensor, tokens: int) -> torch.Tensor:
    """Return the target of every student token, [S * T], from [S, ..., T] or the teacher's [..., T]."""
    return targets.reshape(-1).repeat(tokens // targets.numel()) if targets.numel() else targets.reshape(-1)


def preferred_layout(device: torch.device, spec: QuantSpec) -> Layout:
    """Return the layout that a device's kernels read fastest; plain if none of them takes the format."""
    tiled = device.type != "cpu" and spec.format.name in registry.kernel_formats("dequant_matmul", device.type.upper())
    return Layout.TILED if tiled else Layout.PLAIN
