"""What every backend and the ops make of an op's arguments: weights, heads, targets, outputs, layouts."""

from __future__ import annotations

from typing import NamedTuple

import torch

from klfast.core.errors import InvalidInputError
from klfast.dispatch import registry
from klfast.quant.layouts import Layout
from klfast.quant.spec import QuantSpec
from klfast.quant.tensor import QuantizedTensor, Stored, parse, stored

FEW_ROWS = 8  # for these the kernels read a weight as it lies, at the speed of memory


class MatmulArgs(NamedTuple):
    """The arguments of dequant_matmul, checked: ``y = x W^T + bias``.

    Attributes:
        x: float [..., K].
        parts: the weight's tensors.
        bias: float [N], or None.
        weight: what ``parts`` mean.
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
        """The arguments as the op's schema has them; InvalidInputError for an unknown format or layout."""
        return cls(x, parts, bias, stored(n, k, format, layout), activation)

    def formats(self) -> tuple[str]:
        return self.weight.formats

    @property
    def quantized(self) -> QuantizedTensor:
        return QuantizedTensor(self.parts, self.weight.shape, self.weight.spec, self.weight.layout)

    def parts_in(self, layout: Layout) -> list[torch.Tensor]:
        """The weight's parts in another layout."""
        weight = self.weight
        return weight.spec.format.convert(self.parts, weight.shape, weight.spec, weight.layout, layout)


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
        *heads: int | str,
    ) -> DivergenceArgs:
        """The arguments as the op's schema has them; InvalidInputError for an unknown format or parts that do not fit."""
        t_head = head_of(teacher, t_parts, *heads[:3])
        return cls(teacher, t_head, student, head_of(student, s_parts, *heads[3:]), targets)

    def formats(self) -> list[str]:
        return [head.spec.format.name for head in (self.t_head, self.s_head) if isinstance(head, QuantizedTensor)]


def head_parts(head: torch.Tensor | QuantizedTensor) -> tuple[list[torch.Tensor], tuple[int, str, str]]:
    """A head as linear_divergence's schema has it: its tensors; rows, format and layout, without texts for a float one."""
    if isinstance(head, QuantizedTensor):
        return list(head.parts), (head.shape[0], head.spec.text, head.layout.value)
    return [head], (head.shape[0] if head.dim() else 0, "", "")


def head_of(
    hidden: torch.Tensor, parts: list[torch.Tensor], vocab: int, format: str, layout: str
) -> torch.Tensor | QuantizedTensor:
    """The inverse of ``head_parts``, for hidden states [..., H]; InvalidInputError for parts that make no [vocab, H]."""
    if format:
        return QuantizedTensor(parts, (vocab, hidden.shape[-1] if hidden.dim() else 0), *parse(format, layout))
    if len(parts) != 1:
        raise InvalidInputError(f"linear_divergence: a float head is one tensor, got {len(parts)}")
    return parts[0]


def flat_targets(targets: torch.Tensor, tokens: int) -> torch.Tensor:
    """Targets of every student token, [S * T], from [S, ..., T] or the teacher's [..., T]."""
    return targets.reshape(-1).repeat(tokens // targets.numel()) if targets.numel() else targets.reshape(-1)


def empty_channel_last(x):
    """[B, D, L] uninitialised, in memory [B, L, D]: what follows (transposed) is a linear layer."""
    batch, channels, length = x.shape
    return x.new_empty(batch, length, channels).transpose(1, 2)


def preferred_layout(device: torch.device, spec: QuantSpec) -> Layout:
    """What the kernels for a device read fastest; the plain layout where there is none for the format."""
    tiled = device.type != "cpu" and spec.format.name in registry.kernel_formats("dequant_matmul", device.type.upper())
    return Layout.TILED if tiled else Layout.PLAIN
