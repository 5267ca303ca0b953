"""GPTQ against the published algorithm, coordinate descent against brute force, both never worse than nearest."""

import pytest
import torch
from rounding_truth import DAMPING, gptq_by_elimination, inputs, objectives

from klfast import QuantSpec, dequant_matmul, quantize
from klfast.core.dtypes import FLOAT_DTYPES
from klfast.core.errors import InvalidInputError
from klfast.rounding import second_order as module
from klfast.rounding.descent import descend
from klfast.rounding.gptq import gptq
from klfast.rounding.grids import search
from klfast.rounding.objective import Objective
from klfast.rounding.second_order import plain_and_corrected, second_order

SPECS = [QuantSpec(4, 64), QuantSpec(4, 7, False), QuantSpec(4, -1), QuantSpec(6, 32, False), QuantSpec(8, 48)]
SHAPES = [(1, 1), (9, 63), (33, 130), (5, 200)]


def moments(y, x=None):
    return (y.T @ y).float() / len(y), None if x is None else (y.T @ x).float() / len(y)


def rounded(weight, spec, y, x=None, **options):
    return second_order(weight, spec, *moments(y, x), **options).dequantize(torch.float32)


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("k", [1, 63, 64, 130])
def test_gptq_equals_the_published_algorithm(spec, k):
    y, target = inputs(400, k), torch.randn(k, 40)
    objective = Objective.of(y.T @ y / 400)
    grid = search(target, objective.hessian.diagonal(), spec, torch.float16)
    each = [grid.by_feature(one, k).T for one in (grid.step, grid.low, grid.high)]
    truth = gptq_by_elimination(target.T, y.T @ y / 400, *each)
    same = (truth == gptq(target, objective, grid).T).all(1)
    assert same.float().mean() >= 0.95, "a value within float32's rounding of a tie changes its row"


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_gptq_with_a_diagonal_hessian_rounds_to_nearest(spec):
    target, hessian = torch.randn(100, 12), torch.rand(100).diag()
    grid = search(target, hessian.diagonal(), spec, torch.float16)
    assert torch.equal(gptq(target, Objective.of(hessian), grid), grid.nearest(target))


@pytest.mark.parametrize("spec", [QuantSpec(4, 16), QuantSpec(4, -1), QuantSpec(4, 9, False)], ids=str)
def test_no_single_code_or_scale_improves_after_the_descent(spec):
    y, target = inputs(300, 100), torch.randn(100, 6)  # more than a panel
    objective = Objective.of(y.T @ y / 300)
    start = search(target, objective.hessian.diagonal(), spec, torch.float16)
    codes, grid = descend(target, objective, start.nearest(target), start, 40, torch.float16)
    hessian = objective.hessian.double()

    def errors(codes, grid):
        error = grid.values(codes).double() - target.double()
        return (error * (hessian @ error)).sum(0)

    least = errors(codes, grid) * (1 - 1e-5)
    assert (least < errors(start.nearest(target), start)).all()
    for k in range(100):
        for change in (-1, 1):
            other = codes.clone()
            other[k] += change
            allowed = (other >= grid.by_feature(grid.low, 100)) & (other <= grid.by_feature(grid.high, 100))
            assert ((errors(other, grid) >= least) | ~allowed[k]).all()
    for group in range(len(grid.step)):
        for change in (-1, 1):
            step = grid.step.clone()
            step[group] = (step[group].half().view(torch.int16) + change).view(torch.float16).float()
            assert (errors(codes, type(grid)(step, grid.low, grid.high, grid.length)) >= least).all()


@pytest.mark.slow
@pytest.mark.parametrize("asymmetric", [False, True], ids=["own output", "teacher's output"])
@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_never_worse_than_nearest(spec, dtype, asymmetric):
    for n, k in SHAPES:
        y, weight = inputs(300, k), torch.randn(n, k).to(dtype)
        x = y + 0.3 * inputs(300, k, 1) if asymmetric else None
        nearest = quantize(weight, spec).dequantize(torch.float32)
        found = objectives(weight, rounded(weight, spec, y, x), y, x)
        assert (found <= objectives(weight, nearest, y, x) * (1 + 1e-4)).all()


@pytest.mark.parametrize("spec", [QuantSpec(4, 64), QuantSpec(4, -1), QuantSpec(4, 64, False)], ids=str)
def test_the_error_of_new_text_falls_far_below_that_of_nearest(spec):
    y, new, weight = inputs(1000, 192), inputs(1500, 192)[1000:], torch.randn(64, 192)
    nearest = quantize(weight, spec).dequantize(torch.float32)
    errors = [
        (new @ (found.double() - weight.double()).T).square().sum() for found in (rounded(weight, spec, y), nearest)
    ]
    assert errors[0] < 0.4 * errors[1]


def test_the_teachers_output_is_the_target():
    """A student whose inputs are all twice the teacher's needs half the weights."""
    x, weight, spec = torch.randn(500, 96).double(), torch.randn(20, 96), QuantSpec(8, 32)
    found = rounded(weight, spec, 2 * x, x)
    assert (found - weight / 2).abs().max() < 0.05 * weight.abs().max()


def test_inputs_that_are_always_zero_are_rounded_to_nearest():
    y, weight = inputs(300, 64), torch.randn(20, 64)
    y[:, 10:20] = 0
    found = second_order(weight, QuantSpec(4, 64), *moments(y))
    step = found.scale.float().abs()
    off = (found.dequantize(torch.float32) - weight)[:, 10:20].abs() / step
    assert (off[weight[:, 10:20].abs() < 7 * step] <= 0.5 + 1e-3).all()


def test_fewer_tokens_than_inputs_do_not_break_it():
    y, weight, spec = inputs(20, 128, rank=5), torch.randn(30, 128), QuantSpec(4, 64)
    found, nearest = rounded(weight, spec, y), quantize(weight, spec).dequantize(torch.float32)
    assert (objectives(weight, found, y) < objectives(weight, nearest, y)).all()


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_the_result_is_stored_and_multiplied_as_that_of_quantize(spec):
    y, weight = inputs(300, 130), torch.randn(33, 130)
    found, plain = second_order(weight, spec, *moments(y), scale_dtype=torch.bfloat16), quantize(weight, spec)
    assert (found.spec, found.shape, found.layout) == (plain.spec, plain.shape, plain.layout)
    assert [part.shape for part in found.parts] == [part.shape for part in plain.parts]
    assert found.scale.dtype == torch.bfloat16
    x = torch.randn(3, 130)
    torch.testing.assert_close(dequant_matmul(x, found), x @ found.dequantize(torch.float32).T, rtol=1e-4, atol=1e-4)


def test_rows_do_not_depend_on_each_other(monkeypatch):
    y, weight = inputs(300, 64), torch.randn(50, 64)
    whole = rounded(weight, QuantSpec(4, 32), y)
    monkeypatch.setattr(module, "_TILE", 64 * 7)
    differing = (rounded(weight, QuantSpec(4, 32), y) != whole).any(1)
    assert differing.float().mean() <= 0.1, "products of other sizes round differently, which may decide a tie"


def test_bad_input():
    weight, hessian = torch.randn(4, 8), torch.eye(8)

    def refused(match, *arguments, **options):
        with pytest.raises(InvalidInputError, match=match) as raised:
            second_order(*arguments, **options)
        assert "\n" not in str(raised.value)

    refused(r"hessian must be \[8, 8\]", weight, "int4", torch.eye(7))
    refused(r"cross must be \[8, 8\]", weight, "int4", hessian, torch.eye(7))
    refused("Hessian must be finite", weight, "int4", hessian * torch.nan)
    refused("Hessian must be finite", weight, "int4", hessian * 0)
    refused("NaN or an infinity", weight.fill_diagonal_(torch.inf), "int4", hessian)
    refused("weight must be .*got torch.int64", torch.ones(4, 8, dtype=torch.int64), "int4", hessian)
    refused(r"\[N, K\]", torch.ones(8), "int4", hessian)
    refused("does not fit torch.float16", torch.full((4, 8), 1e30), "int4", hessian)


def test_a_ridge_keeps_rows_near_the_weight():
    y, weight, spec = inputs(300, 96), torch.randn(48, 96), QuantSpec(4, 32)
    ridge = torch.zeros(48)
    ridge[::2] = 1e6
    found, plain = (
        second_order(weight, spec, *moments(y), ridge=each).dequantize(torch.float32) for each in (ridge, None)
    )
    assert (found[1::2] == plain[1::2]).float().mean() > 0.98
    off = (found - weight).square().sum(1)
    assert (off[::2] <= (quantize(weight, spec).dequantize(torch.float32) - weight).square().sum(1)[::2]).all()
    assert off[::2].sum() < 0.5 * (plain - weight).square().sum(1)[::2].sum()


def test_an_equal_ridge_is_part_of_the_hessian():
    y, weight, spec = inputs(300, 64), torch.randn(48, 64), QuantSpec(4, 32)
    hessian, _ = moments(y)
    found = second_order(weight, spec, hessian, ridge=torch.full((48,), 3.0)).dequantize(torch.float32)
    truth = second_order(weight, spec, hessian + 3 * torch.eye(64)).dequantize(torch.float32)
    assert (found == truth).float().mean() > 0.98


def test_corrected_rows_are_those_that_cost_most():
    y, weight, spec = inputs(300, 64), torch.randn(40, 64), QuantSpec(4, 32)
    cost = torch.rand(40) ** 4
    base = rounded(weight, spec, y)
    errors = objectives(base, weight, y)
    qt = second_order(weight, QuantSpec(4, 32, corrected=6), *moments(y), cost=cost)
    assert set(qt.halves[1].tolist()) == set((errors * cost).topk(6).indices.tolist())
    rows, found = qt.halves[1].long(), qt.dequantize(torch.float32)
    assert (objectives(found, weight, y)[rows] < 0.01 * errors[rows]).all()
    others = torch.ones(40, dtype=torch.bool).index_fill(0, rows, False)
    assert torch.equal(found[others], base[others])


def test_a_plain_matrix_beside_the_corrected_one():
    y, weight = inputs(300, 64), torch.randn(40, 64)
    plain, corrected = plain_and_corrected(weight, "int4-g32-asym+6", *moments(y))
    for found, spec in ((plain, "int4-g32-asym"), (corrected, "int4-g32-asym+6")):
        truth = second_order(weight, spec, *moments(y))
        assert found.spec == truth.spec and all(map(torch.equal, found.parts, truth.parts))


def test_a_correction_aims_at_the_full_output_too():
    """The rows' target is that of both matrices together: what full precision makes of x, not of y."""
    x = inputs(300, 64)
    y = x + 0.3 * torch.randn(300, 64)
    weight = torch.randn(12, 64)
    spec = QuantSpec(4, 32, corrected=12)
    found = rounded(weight, spec, y, x)
    base = rounded(weight, spec.base, y, x)

    hessian = y.T @ y / 300
    damping = DAMPING * hessian.diagonal().mean() * torch.eye(64)
    best = torch.linalg.solve(hessian + damping, (y.T @ x / 300 + damping) @ weight.double().T).T
    least, after, before = (objectives(weight, each, y, x).sum() for each in (best, found, base))
    assert after - least < 0.02 * (before - least)
