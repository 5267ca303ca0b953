"""Products of rows with the matrices of a stack that they are routed to."""

from __future__ import annotations

import torch

from klfast.core.dtypes import FLOAT_DTYPES
from klfast.nn.dense_product import dense_product
from klfast.nn.linear import QuantLinear
from klfast.ops.matmul import grouped_dequant_matmul_op
from klfast.reference import by_group


def stack_product(stack: QuantLinear | torch.Tensor, count: int, x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Multiply each row of x [M, K] by the matrices of a stack that index [M, S] names: [M, S, N].

    Args:
        stack: a tensor [E, N, K], or a layer with the rows of all its matrices, one matrix after another.
        count: E.
        x: [M, K].
        index: int64 [M, S].

    Raises:
        InvalidInputError: there is no such matrix.
    """
    if isinstance(stack, torch.Tensor):
        return by_group(lambda i, rows: dense_product(rows, stack[i]), x, index, count, stack.shape[1])
    n = stack.out_features // count
    if x.dtype not in FLOAT_DTYPES or (torch.is_grad_enabled() and x.requires_grad):
        qt = stack.quantized

        def product(i: int, rows: torch.Tensor) -> torch.Tensor:
            matrix = qt.block(i * n, (i + 1) * n)
            y: torch.Tensor = QuantLinear(matrix, activation=stack.activation, dtype=stack.dtype)(rows)
            return y

        return by_group(product, x, index, count, n)
    return grouped_dequant_matmul_op(
        x,
        stack.parts(),
        index,
        count,
        stack.out_features,
        stack.in_features,
        stack.spec.text,
        stack.layout.value,
        stack.activation,
    )
