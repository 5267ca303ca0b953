"""What int8 activations cost in groups that a sweep did not measure, from those that it did.

Second-order rounding has specs of its own (``second_order_costs``), and an input is rounded in the groups of the
weight. As there, a small error costs about a constant of the layer times its squared error in the layer's output.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from klfast.models.matrices import Matrix
from klfast.quant.spec import QuantSpec
from klfast.reference import fake_quantize_rows

_TOGETHER = 256  # tokens whose outputs are in memory at a time


def error_ratios(
    matrix: Matrix, x: torch.Tensor, specs: Iterable[QuantSpec], measured: Iterable[int]
) -> dict[int, float]:
    """Return the squared error of a layer's output by group length, of those of ``specs`` that were not measured.

    It is relative to that of the longest of the measured lengths; there is none where that has no error.

    Args:
        matrix: with the weight [N, K] in full precision.
        x: inputs [..., K] of the full-precision model.
        specs: of the weight; an input is rounded in their groups.
        measured: group lengths, at least one.
    """
    k, known = x.shape[-1], set(measured)
    wanted = {length for spec in specs if (length := spec.group_length(k)) not in known}
    unit = _squared_error(matrix, x, max(known)) if wanted else 0.0
    return {length: _squared_error(matrix, x, length) / unit for length in sorted(wanted)} if unit > 0 else {}


def _squared_error(matrix: Matrix, x: torch.Tensor, length: int) -> float:
    """Return the summed squares of what int8 activations in groups of ``length`` change in a layer's output."""
    weight, spec = matrix.weight.detach().float(), QuantSpec(8, length)
    found = 0.0
    for some in x.detach().reshape(-1, x.shape[-1]).float().split(_TOGETHER):
        found += ((fake_quantize_rows(some, spec) - some) @ weight.T).square().sum().item()
    return found
