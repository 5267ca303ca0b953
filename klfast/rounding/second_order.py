"""Second-order rounding of a weight matrix to a QuantizedTensor."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from klfast.core.dtypes import FLOAT_DTYPES, FLOAT_NAMES
from klfast.core.errors import InvalidInputError
from klfast.quant.spec import QuantSpec
from klfast.quant.tensor import QuantizedTensor
from klfast.rounding.descent import descend
from klfast.rounding.gptq import gptq
from klfast.rounding.grids import Grid, absmax, search
from klfast.rounding.objective import Objective

_TILE = 1 << 20  # weights whose rows are rounded together
_CLASSES = 16  # of rows with similar ridges


def second_order(
    weight: torch.Tensor,
    spec: QuantSpec | str,
    hessian: torch.Tensor,
    cross: torch.Tensor | None = None,
    *,
    ridge: torch.Tensor | None = None,
    scale_dtype: torch.dtype = torch.float16,
    rounds: int = 4,
) -> QuantizedTensor:
    """Quantize a weight matrix so that the layer's output changes least; see ``klfast.rounding.objective``.

    In each row the best of three starts is taken: nearest values with abs-max scales, nearest values with scales from a
    weighted search, and GPTQ with these. Coordinate descent makes it better still. So the objective is never larger
    than that of ``klfast.quantize``, apart from float32's rounding; the result is stored as its result is.

    Args:
        weight: float32, bfloat16 or float16 [N, K], finite.
        spec: format, group and symmetry; or its text. The format must be one of integers.
        hessian: float [K, K], y^T y of the layer's inputs y [T, K], which may be divided by T.
        cross: float [K, K], y^T x, divided alike, with the inputs x of the full-precision model, if its output is the
            target; by default it is what the layer makes of y in full precision.
        ridge: float [N], what is added to the damping in each row, on the scale of the Hessian: for a row that is not
            only multiplied by y. Rows with similar ridges share their mean.
        scale_dtype: of the stored scales.
        rounds: of coordinate descent.

    Raises:
        InvalidInputError: another dtype or shape, a format on no uniform grid, a weight that is not finite, scales
            beyond ``scale_dtype``'s range, a Hessian that is 0 or not finite.
    """
    spec = QuantSpec.of(spec)
    _check(weight, spec, hessian, cross, scale_dtype)
    n, k = weight.shape
    q = torch.empty(n, k, dtype=torch.int8, device=weight.device)
    scale = torch.empty(n, spec.n_groups(k), dtype=scale_dtype, device=weight.device)
    zero = None if spec.symmetric else torch.empty_like(scale, dtype=torch.int8)
    for members, objective in _classes(n, hessian, cross, ridge):
        for rows in members.split(max(1, _TILE // k)):
            matrix = weight.detach()[rows].float().T.contiguous()
            codes, grid = _rounded(matrix, objective, spec, scale_dtype, rounds)
            zeros = spec.q_min - grid.low
            q[rows] = (codes + grid.by_feature(zeros, k)).T.to(torch.int8)
            scale[rows] = grid.step.T.to(scale_dtype)
            if zero is not None:
                zero[rows] = zeros.T.to(torch.int8)
    return QuantizedTensor(spec.format.encode(q, scale, zero), (n, k), spec)


def _classes(
    n: int, hessian: torch.Tensor, cross: torch.Tensor | None, ridge: torch.Tensor | None
) -> Iterator[tuple[torch.Tensor, Objective]]:
    """Yield int64 [rows], the rows with one objective, and that."""
    if ridge is None:
        yield torch.arange(n, device=hessian.device), Objective.of(hessian, cross)
        return
    for rows in ridge.argsort().chunk(_CLASSES):
        shift = ridge[rows].mean() * torch.eye(len(hessian), device=hessian.device)
        yield rows, Objective.of(hessian + shift, None if cross is None else cross + shift)


def _rounded(
    matrix: torch.Tensor, objective: Objective, spec: QuantSpec, scale_dtype: torch.dtype, rounds: int
) -> tuple[torch.Tensor, Grid]:
    """Return codes and grid of W^T [K, N]."""
    target = objective.target(matrix)
    grid = absmax(matrix, spec, scale_dtype)
    if not grid.step.isfinite().all():
        raise InvalidInputError(f"a scale does not fit {scale_dtype}; pass scale_dtype=torch.bfloat16 or torch.float32")
    searched = search(target, objective.hessian.diagonal(), spec, scale_dtype)
    codes = grid.nearest(matrix)
    least = objective.errors(grid.values(codes), target)
    for other in (searched.nearest(target), gptq(target, objective, searched)):
        errors = objective.errors(searched.values(other), target)
        better = errors < least
        codes, grid = torch.where(better, other, codes), searched.where(better, grid)
        least = torch.where(better, errors, least)
    return descend(target, objective, codes, grid, rounds, scale_dtype)


def _check(
    weight: torch.Tensor, spec: QuantSpec, hessian: torch.Tensor, cross: torch.Tensor | None, scale_dtype: torch.dtype
) -> None:
    if weight.dim() != 2 or not weight.numel():
        raise InvalidInputError(f"the weight must be [N, K] with N and K at least 1, got {list(weight.shape)}")
    for what, dtype in (("weight", weight.dtype), ("scale_dtype", scale_dtype)):
        if dtype not in FLOAT_DTYPES:
            raise InvalidInputError(f"{what} must be {FLOAT_NAMES}, got {dtype}")
    k = weight.shape[1]
    for name, moment in (("hessian", hessian), ("cross", cross)):
        if moment is not None and moment.shape != (k, k):
            raise InvalidInputError(f"{name} must be [{k}, {k}] for this weight, got {list(moment.shape)}")
    if not on_uniform_grid(spec):
        raise InvalidInputError(f"second-order rounding is for integers on a uniform grid, not for {spec}")
    if not weight.isfinite().all():
        raise InvalidInputError("the weight holds a NaN or an infinity; repair the checkpoint before quantizing it")


def on_uniform_grid(spec: QuantSpec) -> bool:
    """Return True if a spec's weights are whole numbers times a scale."""
    return spec.kind == "int"
