"""linear at every tier: against float64 and torch; memory bounds, threads, bad input."""

import pytest
import torch
import torch.nn.functional as F
from guarded_memory import guarded

from klfast import ops, using
from klfast.backends.cpu.matmul import why_torch_multiplies
from klfast.core.dtypes import FLOAT_DTYPES
from klfast.core.errors import InvalidInputError
from klfast.dispatch import pins

SHAPES = [
    (1, 48, 100),
    (2, 100, 63),
    (3, 9, 31),
    (4, 7, 200),
    (5, 1, 1600),
    (6, 33, 64),
    (8, 18, 95),
    (63, 132, 100),
    (63, 48, 1),
    (1, 1, 1),
    (9, 17, 515),
    (100, 80, 64),
    (7, 200, 258),
]


def operands(m, n, k, dtype):
    return torch.randn(m, k).to(dtype), torch.randn(n, k).to(dtype), torch.randn(n)


def check(x, weight, bias, got, dtype):
    """Within the last bit of x's dtype and of a float32 sum; a wider result holds values of x's dtype."""
    truth = x.double() @ weight.double().T + (0 if bias is None else bias.double())
    magnitude = x.double().abs() @ weight.double().abs().T + abs(truth)
    eps = torch.finfo(x.dtype).eps if x.dtype != torch.float32 else 0
    allowed = (
        eps * truth.abs()
        + torch.finfo(torch.float32).eps * (2 + x.shape[-1] ** 0.5) * magnitude
        + torch.finfo(x.dtype).smallest_normal
    )
    assert got.dtype == dtype and got.shape == truth.shape
    assert ((got.double() - truth).abs() <= allowed).all()
    assert torch.equal(got, got.to(x.dtype).to(dtype))


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_against_float64(tier, dtype):
    for m, n, k in SHAPES:
        x, weight, bias = operands(m, n, k, dtype)
        for b in (None, bias, bias.to(dtype)):
            for out in (dtype, torch.float32):
                check(x, weight, b, ops.linear(x, weight, b, dtype=out), out)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_unpinned_equals_torch(dtype):
    """For every product that the kernel may choose."""
    for m in (1, 3, 8, 30):
        x, weight, _ = operands(m, 50, 130, dtype)
        for out in (None, torch.float32):
            got = ops.linear(x.view(1, m, 130), weight, dtype=out)
            want = F.linear(x.view(1, m, 130), weight).to(out or dtype)
            assert got.dtype == want.dtype
            torch.testing.assert_close(got.float(), want.float(), rtol=2 * torch.finfo(dtype).eps, atol=1e-3)


def test_strides_and_empty(tier):
    for dtype in FLOAT_DTYPES:
        x, weight, bias = operands(20, 50, 130, dtype)
        want = ops.linear(x, weight, bias)
        wide = torch.cat([weight, weight], 1)
        for a, w in (
            (x.T.contiguous().T, weight),
            (torch.cat([x, x], 1)[:, :130], wide[:, 130:]),
            (x, weight.T.contiguous().T),
        ):
            assert torch.equal(ops.linear(a, w, bias), want)
        assert torch.equal(ops.linear(x.view(2, 2, 5, 130), weight, bias), want.view(2, 2, 5, 50))
        assert ops.linear(x[:0], weight).shape == (0, 50) and ops.linear(x, weight[:0]).shape == (20, 0)
        assert torch.equal(ops.linear(x[:, :0], weight[:, :0], bias), bias.to(dtype).expand(20, -1))


@pytest.mark.parametrize("isa", pins.available_tiers())
def test_touches_nothing_outside(isa):
    for m, n, k in [(1, 48, 100), (5, 33, 63), (20, 9, 321)]:
        for dtype in FLOAT_DTYPES:
            x, weight, bias = operands(m, n, k, dtype)
            with using(isa):
                check(x, weight, bias, ops.linear(guarded(x), guarded(weight), guarded(bias)), dtype)


@pytest.mark.parametrize("isa", pins.available_tiers())
def test_any_number_of_threads_gives_the_same_bits(isa):
    before = torch.get_num_threads()
    try:
        for m, n, k in [(30, 70, 600), (600, 40, 130), (9, 500, 64)]:
            for dtype in FLOAT_DTYPES:
                x, weight, bias = operands(m, n, k, dtype)
                results = []
                for threads in (1, 2, 5):
                    torch.set_num_threads(threads)
                    with using(isa):
                        results.append(ops.linear(x, weight, bias))
                assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("rows", [1, 9, 40])
def test_equal_terms_of_long_sums(rows, tier):
    x, weight = torch.full((rows, 16400), 0.7), torch.full((20, 16400), 1.3)  # terms that round the same way
    allowed = 1e-3 if tier in ("reference", "scalar") else 1e-5  # those add up one after another
    torch.testing.assert_close(ops.linear(x, weight).double(), x.double() @ weight.double().T, rtol=allowed, atol=0)


def test_torch_does_not_round_a_bias_of_another_dtype(monkeypatch):
    monkeypatch.setattr(pins, "why_not", lambda tier: "")
    x, weight, bias = operands(9, 5, 64, torch.bfloat16)
    assert why_torch_multiplies(x, weight, bias.bfloat16()) and not why_torch_multiplies(x, weight, bias)


def test_not_finite_x_stays_in_its_row(tier):
    for dtype in FLOAT_DTYPES:
        x, weight, _ = operands(30, 40, 201, dtype)
        bad = x.clone()
        bad[0, 70] = torch.nan
        bad[1, 200] = torch.inf
        got = ops.linear(bad, weight)
        assert got[0].isnan().all() and got[1].isinf().all()
        assert torch.equal(got[2:], ops.linear(x, weight)[2:])


def test_opcheck():
    x, weight, bias = operands(5, 20, 64, torch.bfloat16)
    for dtype in (None, torch.float32):
        torch.library.opcheck(torch.ops.klfast.linear.default, (x, weight, bias, dtype))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.ones(3, 9)}, "weight must be"),
        ({"x": torch.ones(3, 8, dtype=torch.int32)}, "x must be float32"),
        ({"x": torch.tensor(1.0)}, "x must be"),
        ({"weight": torch.ones(4, 8, dtype=torch.float16)}, "weight must be torch.float32"),
        ({"weight": torch.ones(8)}, "weight must be"),
        ({"bias": torch.ones(5)}, r"\[4\]"),
        ({"dtype": torch.int8}, "dtype must be"),
        ({"x": torch.ones(3, 8, device="meta")}, "one device"),
    ],
)
def test_bad_input(tier, change, message):
    arguments = {"x": torch.ones(3, 8), "weight": torch.ones(4, 8), "bias": None, "dtype": None} | change
    with pytest.raises(InvalidInputError, match=message):
        ops.linear(arguments["x"], arguments["weight"], arguments["bias"], dtype=arguments["dtype"])
