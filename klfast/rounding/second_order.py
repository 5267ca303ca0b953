"""Second-order rounding of a weight matrix to a QuantizedTensor."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from klfast.core.dtypes import FLOAT_DTYPES, FLOAT_NAMES
from klfast.core.errors import InvalidInputError
from klfast.quant.rounding import corrected_rows
from klfast.quant.spec import QuantSpec
from klfast.quant.tensor import QuantizedTensor
from klfast.rounding.descent import descend
from klfast.rounding.gptq import gptq
from klfast.rounding.grids import Grid, absmax, search
from klfast.rounding.objective import Objective

_TILE = 1 << 20  # weights whose rows are rounded together
_CLASSES = 64  # of rows with one Hessian and similar ridges


def second_order(
    weight: torch.Tensor,
    spec: QuantSpec | str,
    hessian: torch.Tensor,
    cross: torch.Tensor | None = None,
    *,
    cluster: torch.Tensor | None = None,
    ridge: torch.Tensor | None = None,
    cost: torch.Tensor | None = None,
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
        cluster: int64 [N], the Hessian of each row, if there are several: then ``hessian`` and ``cross`` are [C, K, K].
        ridge: float [N], what is added to the damping in each row, on the scale of the Hessian: for a row that is not
            only multiplied by y. Rows with similar ridges share their mean.
        cost: float [N], what each row's objective counts for where the spec corrects some rows: those of largest cost
            are corrected, unless the spec names the rows. All alike by default.
        scale_dtype: of the stored scales.
        rounds: of coordinate descent.

    Raises:
        InvalidInputError: another dtype or shape, a format on no uniform grid, a weight that is not finite, scales
            beyond ``scale_dtype``'s range, a Hessian that is 0 or not finite, fewer rows than the spec corrects.
    """
    _, found = plain_and_corrected(
        weight, spec, hessian, cross, cluster=cluster, ridge=ridge, cost=cost, scale_dtype=scale_dtype, rounds=rounds
    )
    return found


def plain_and_corrected(
    weight: torch.Tensor,
    spec: QuantSpec | str,
    hessian: torch.Tensor,
    cross: torch.Tensor | None = None,
    *,
    cluster: torch.Tensor | None = None,
    ridge: torch.Tensor | None = None,
    cost: torch.Tensor | None = None,
    scale_dtype: torch.dtype = torch.float16,
    rounds: int = 4,
) -> tuple[QuantizedTensor, QuantizedTensor]:
    """Return what ``second_order`` makes of a spec without its corrected rows, and of the spec; one if it has none.

    Corrected rows are not those of the first with something added, so the two have other errors there.
    """
    spec = QuantSpec.of(spec)
    if cluster is None:
        cluster = torch.zeros(len(weight), dtype=torch.int64, device=hessian.device)
        hessian, cross = hessian[None], None if cross is None else cross[None]
    _check(weight, spec, hessian, cross, scale_dtype)
    options = spec.base, scale_dtype, rounds
    whole = _round(weight.detach(), hessian, cross, cluster, ridge, *options)
    plain = whole.encoded()
    if not spec.corrected:
        return plain, plain
    rows = corrected_rows(whole.errors if cost is None else whole.errors * cost, spec)
    # Nearest values on the whole range: those of GPTQ, and clipped ones, are further away and leave more to correct.
    target = whole.target[rows].T.contiguous()  # that of both matrices together, so what is left is the correction's
    grid = absmax(target, spec.base, scale_dtype)
    codes = grid.nearest(target)
    whole.put(rows, codes, grid)
    left = (target - grid.values(codes)).T
    correction = _round(left, hessian, None, cluster[rows], None if ridge is None else ridge[rows], *options)
    return plain, QuantizedTensor.corrected(whole.encoded(), rows, correction.encoded())


class _Matrix:
    """A matrix that is rounded row by row.

    Attributes:
        target: U, float32 [N, K].
        errors: the objective of each row, float32 [N].
    """

    def __init__(self, shape: torch.Size, spec: QuantSpec, scale_dtype: torch.dtype, device: torch.device) -> None:
        n, k = shape
        self.spec, self.target, self.errors = spec, torch.empty(n, k, device=device), torch.empty(n, device=device)
        self._codes = torch.empty(n, k, dtype=torch.int8, device=device)
        self._scale = torch.empty(n, spec.n_groups(k), dtype=scale_dtype, device=device)
        self._zero = None if spec.symmetric else torch.empty_like(self._scale, dtype=torch.int8)

    def put(self, rows: torch.Tensor, codes: torch.Tensor, grid: Grid) -> None:
        """Set rows, int64 [R], to codes, float32 [K, R], of a grid."""
        zeros = self.spec.q_min - grid.low
        self._codes[rows] = (codes + grid.by_feature(zeros, len(codes))).T.to(torch.int8)
        self._scale[rows] = grid.step.T.to(self._scale.dtype)
        if self._zero is not None:
            self._zero[rows] = zeros.T.to(torch.int8)

    def encoded(self) -> QuantizedTensor:
        """Return it as it is now."""
        n, k = self.target.shape
        return QuantizedTensor(self.spec.format.encode(self._codes, self._scale.clone(), self._zero), (n, k), self.spec)


def _round(
    weight: torch.Tensor,
    hessian: torch.Tensor,
    cross: torch.Tensor | None,
    cluster: torch.Tensor,
    ridge: torch.Tensor | None,
    spec: QuantSpec,
    scale_dtype: torch.dtype,
    rounds: int,
) -> _Matrix:
    k = weight.shape[1]
    found = _Matrix(weight.shape, spec, scale_dtype, weight.device)
    for members, objective in _classes(hessian, cross, cluster, ridge):
        for rows in members.split(max(1, _TILE // k)):
            matrix = weight[rows].float().T.contiguous()
            target, codes, grid = _rounded_rows(matrix, objective, spec, scale_dtype, rounds)
            found.put(rows, codes, grid)
            found.target[rows], found.errors[rows] = target.T, objective.errors(grid.values(codes), target)
    return found


def _classes(
    hessian: torch.Tensor, cross: torch.Tensor | None, cluster: torch.Tensor, ridge: torch.Tensor | None
) -> Iterator[tuple[torch.Tensor, Objective]]:
    """Yield int64 [rows], the rows with one objective, and that."""
    for each, own in enumerate(hessian):
        rows, own_cross = (cluster == each).nonzero().squeeze(1), None if cross is None else cross[each]
        if not len(rows):
            continue
        if ridge is None:
            yield rows, Objective.of(own, own_cross)
            continue
        for some in rows[ridge[rows].argsort()].chunk(max(1, _CLASSES // len(hessian))):
            shift = ridge[some].mean() * torch.eye(len(own), device=own.device)
            yield some, Objective.of(own + shift, None if own_cross is None else own_cross + shift)


def _rounded_rows(
    matrix: torch.Tensor, objective: Objective, spec: QuantSpec, scale_dtype: torch.dtype, rounds: int
) -> tuple[torch.Tensor, torch.Tensor, Grid]:
    """Return target, codes and grid of W^T [K, N]."""
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
    return target, *descend(target, objective, codes, grid, rounds, scale_dtype)


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
        if moment is not None and moment.shape[1:] != (k, k):
            raise InvalidInputError(f"{name} must be [{k}, {k}] for this weight, got {list(moment.shape[1:])}")
    if not on_uniform_grid(spec):
        raise InvalidInputError(f"second-order rounding is for integers on a uniform grid, not for {spec}")
    if not weight.isfinite().all():
        raise InvalidInputError("the weight holds a NaN or an infinity; repair the checkpoint before quantizing it")


def on_uniform_grid(spec: QuantSpec) -> bool:
    """Return True if a spec's weights are whole numbers times a scale."""
    return spec.kind == "int"
