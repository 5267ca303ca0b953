"""dequant_matmul at every tier: against float64; memory bounds, threads, compile, bad input."""

from concurrent.futures import ThreadPoolExecutor
from itertools import product

import pytest
import torch
from guarded_memory import guarded
from hypothesis import given, settings
from hypothesis import strategies as st

from klfast import QuantizedTensor, QuantSpec, dequant_matmul, quantize, reference, using
from klfast.backends.cpu.matmul import difference_matmul
from klfast.backends.operands import MatmulArgs
from klfast.core.dtypes import FLOAT_DTYPES
from klfast.core.errors import InvalidInputError
from klfast.dispatch import pins

EPS = torch.finfo(torch.float32).eps
SPECS = [
    QuantSpec(bits, group, symmetric)
    for bits in (4, 6, 8)
    for group in (-1, 7, 32, 64, 96, 128)
    for symmetric in (True, False)
]
TIERS = pins.available_tiers()


def operands(m, n, k, spec, *, x_dtype=torch.float32, scale_dtype=torch.float16, bias=True):
    """Return x, a quantized weight with varying zero points, and a bias."""
    weight = torch.randn(n, k) + torch.randn(n, 1)
    qt = quantize(weight, spec, scale_dtype=scale_dtype)
    return torch.randn(m, k).to(x_dtype), qt, torch.randn(n) if bias else None


def check_exact(x, qt, bias, got):
    """No further from float64 than eager float32, up to the last bit of the sum of magnitudes (and of x's dtype)."""
    weight = qt.dequantize(torch.float32)
    plus = 0 if bias is None else bias.double()
    truth = x.double() @ weight.double().T + plus
    eager = torch.nn.functional.linear(x.float(), weight, None if bias is None else bias.float())
    magnitude = x.double().abs() @ weight.double().abs().T + abs(plus)
    allowed = (eager - truth).abs().amax() + 2 * EPS * magnitude
    if x.dtype != torch.float32:
        allowed = allowed + torch.finfo(x.dtype).eps * truth.abs() + torch.finfo(x.dtype).smallest_normal
    assert got.dtype == x.dtype and got.shape == truth.shape
    assert ((got.double() - truth).abs() <= allowed).all()


def check_int8(x, qt, bias, got):
    rounded = reference.fake_quantize_rows(x.float(), qt.spec).double()
    weight = qt.dequantize(torch.float32).double()
    truth = rounded @ weight.T + (0 if bias is None else bias.double())
    # One unit of rounding of x moves a result by about magnitude / 127 / k, far more than the tolerance.
    magnitude = rounded.abs() @ weight.abs().T + truth.abs()
    allowed = 1e-6 * magnitude + (0 if x.dtype == torch.float32 else torch.finfo(x.dtype).eps * truth.abs())
    assert ((got.double() - truth).abs() <= allowed).all()


CHECKS = {"exact": check_exact, "int8": check_int8}


def with_signs(qt):
    """Return the weight with scales of either sign, as second-order rounding makes them."""
    packed, scale, *zero_point = qt.parts
    signs = torch.where(torch.rand(scale.shape) < 0.5, -1, 1).to(scale.dtype)
    return QuantizedTensor([packed, scale * signs, *zero_point], qt.shape, qt.spec)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_against_float64(tier, spec):
    for m, n, k in [
        (1, 48, 100),
        (1, 132, 1600),
        (2, 100, 63),
        (5, 1, 1600),
        (63, 132, 100),
        (63, 48, 1),
        (1, 1, 1),
        (9, 17, 515),
        (33, 200, 160),
    ]:
        x, qt, bias = operands(m, n, k, spec)
        for x_dtype, activation in product([torch.float32, torch.bfloat16], CHECKS):
            y = dequant_matmul(x.to(x_dtype), qt, bias, activation=activation)
            CHECKS[activation](x.to(x_dtype), qt, bias, y)


@pytest.mark.parametrize("spec", SPECS[::2], ids=str)
def test_differences_from_known_rows(tier, spec):
    for copies, known_rows, n, k in [(1, 1, 48, 100), (2, 2, 17, 515), (3, 7, 132, 160), (4, 9, 50, 603)]:
        x, qt, _ = operands(copies * known_rows, n, k, spec)
        known_x, known_y = torch.randn(known_rows, k), torch.randn(known_rows, n)
        difference = x.view(copies, known_rows, k) - known_x
        check_int8(difference, qt, known_y, difference_matmul(x.view(copies, known_rows, k), known_x, known_y, qt))
        strided = torch.stack((x, x), 1)[:, 0]
        check_int8(
            difference.flatten(0, 1), qt, known_y.repeat(copies, 1), difference_matmul(strided, known_x, known_y, qt)
        )
        assert torch.equal(difference_matmul(known_x, known_x, known_y, qt), known_y)


@pytest.mark.parametrize("spec", SPECS[::2], ids=str)
def test_scales_of_either_sign(tier, spec):
    for m in (1, 3, 20, 63):
        x, qt, bias = operands(m, 50, 130, spec, x_dtype=torch.bfloat16)
        signed = with_signs(qt)
        for activation, check in CHECKS.items():
            check(x, signed, bias, dequant_matmul(x, signed, bias, activation=activation))


@pytest.mark.parametrize("m", range(2, 19))
def test_every_number_of_rows_up_to_two_tiles(tier, m):
    """Several panels and blocks of K with a ragged end; groups shorter and longer than a block."""
    for spec in (
        QuantSpec(4, 32),
        QuantSpec(4, 128, False),
        QuantSpec(6, 32, False),
        QuantSpec(6, -1),
        QuantSpec(8, -1),
        QuantSpec(8, 64, False),
    ):
        x, qt, bias = operands(m, 75, 603, spec)
        check_exact(x, qt, bias, dequant_matmul(x, qt, bias))


@pytest.mark.parametrize("group", [32, 64, 128])
def test_outliers_of_one_row_that_meet_zero_weights(tier, group):
    """What is rounded in proportion to an outlier would be wrong for all values beside it."""
    columns = [3, 130, 699]
    weight = torch.randn(50, 700)
    weight[:, columns] = 0
    qt = quantize(weight, QuantSpec(4, group), scale_dtype=torch.float32)
    for outlier in (30.0, 3e3, 3e8):
        x = torch.randn(1, 700)
        x[:, columns] = outlier
        check_exact(x, qt, None, dequant_matmul(x, qt))


def test_largest_sums_of_one_row(tier):
    """Products of the largest integers, all of one sign: nothing saturates or wraps around."""
    signs = torch.tensor([1.0, -1.0, 0.96875]).repeat_interleave(64)
    for value in (1.0, 4177919.0, 4177920.0, 2.0**22 - 1):
        x = (value * 2.0**-10 * signs)[None]
        for q in (0, 15):
            packed = torch.full((20, 24), q * 0x11111111 - (1 << 32 if q > 7 else 0)).int()
            qt = QuantizedTensor([packed, torch.ones(20, 3)], (20, 192), QuantSpec(4, 64))
            check_exact(x, qt, None, dequant_matmul(x, qt))


@pytest.mark.parametrize("x_dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("scale_dtype", FLOAT_DTYPES)
def test_dtypes(tier, x_dtype, scale_dtype):
    for i, spec in enumerate((QuantSpec(4, 32), QuantSpec(6, 64), QuantSpec(6, 32, False), QuantSpec(8, 64, False))):
        activations = 2 * [*CHECKS][:: (-1) ** i]  # in turns, so that each meets every bias
        for m in (1, 3, 20):
            x, qt, bias = operands(m, 50, 130, spec, x_dtype=x_dtype, scale_dtype=scale_dtype)
            for activation, b in zip(activations, (None, bias, bias.bfloat16(), bias.half()), strict=True):
                CHECKS[activation](x, qt, b, dequant_matmul(x, qt, b, activation=activation))


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_int8_is_the_same_at_every_tier(spec):
    for m, n, k in [(1, 48, 100), (14, 33, 700), (40, 200, 300)]:
        x, qt, bias = operands(m, n, k, spec)
        results = []
        for tier in TIERS:
            with using(tier):
                results.append(dequant_matmul(x, qt, bias, activation="int8"))
        assert all(torch.equal(results[0], other) for other in results[1:])


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(TIERS),
    st.sampled_from(FLOAT_DTYPES),
    st.integers(1, 40),
    st.integers(1, 70),
    st.integers(1, 600),
    st.sampled_from([4, 6, 8]),
    st.one_of(st.just(-1), st.integers(1, 300)),
    st.booleans(),
    st.sampled_from(list(CHECKS)),
)
def test_any_shape(tier, x_dtype, m, n, k, bits, group, symmetric, activation):
    x, qt, bias = operands(m, n, k, QuantSpec(bits, group, symmetric), x_dtype=x_dtype)
    with using(tier):
        CHECKS[activation](x, qt, bias, dequant_matmul(x, qt, bias, activation=activation))


@pytest.mark.parametrize("activation", CHECKS)
def test_ties_of_x_round_to_even(tier, activation):
    x = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, 126.5, -126.5]])  # scale 1
    weight = torch.eye(8)
    got = dequant_matmul(x, quantize(weight, QuantSpec(8, -1), scale_dtype=torch.float32), activation=activation)
    want = x if activation == "exact" else torch.tensor([[127.0, 0, 2, 2, 0, -2, 126, -126]])
    torch.testing.assert_close(got, want, rtol=1e-6, atol=0)


@pytest.mark.parametrize("activation", CHECKS)
@pytest.mark.parametrize("m", [1, 30])
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16])
def test_not_finite_x_stays_in_its_row(tier, activation, m, x_dtype):
    x, qt, _ = operands(m, 40, 200, QuantSpec(4, 64, False), x_dtype=x_dtype)
    for value in (torch.nan, torch.inf, 1e-42, -torch.inf):
        bad = x.clone()
        bad[0, 70] = value
        got = dequant_matmul(bad, qt, activation=activation)
        assert torch.isfinite(got[0]).any() == (value == 1e-42)
        assert torch.equal(got[1:], dequant_matmul(x, qt, activation=activation)[1:])


@pytest.mark.parametrize("rows", [1, 2, 9, 40])
@pytest.mark.parametrize("bits", [4, 6, 8])
def test_equal_terms_of_long_sums(bits, rows, tier):
    x, weight = torch.full((rows, 16384), 0.7), quantize(torch.full((20, 16384), 1.3), QuantSpec(bits, 64))
    truth = x.double() @ weight.dequantize(torch.float32).double().T
    allowed = 1e-3 if tier in ("reference", "scalar") else 1e-5  # those add up one after another
    torch.testing.assert_close(dequant_matmul(x, weight).double(), truth, rtol=allowed, atol=0)


@pytest.mark.parametrize("activation", CHECKS)
def test_x_of_tiny_or_zero_magnitude(tier, activation):
    _, qt, bias = operands(1, 40, 200, QuantSpec(4, 64))
    for value in (0.0, 1e-38, 1e-43):
        got = dequant_matmul(
            torch.full((2, 200), value).index_fill(1, torch.tensor(3), 0), qt, bias, activation=activation
        )
        torch.testing.assert_close(got, bias.expand(2, -1), rtol=0, atol=1e-35)


@pytest.mark.parametrize("activation", CHECKS)
def test_strides_and_dimensions(tier, activation):
    spec = QuantSpec(4, 32, False)
    x, qt, bias = operands(24, 50, 130, spec)
    want = dequant_matmul(x, qt, bias, activation=activation)

    def expect(x, want, qt=qt):
        torch.testing.assert_close(dequant_matmul(x, qt, bias, activation=activation), want, rtol=1e-5, atol=1e-4)

    expect(x.view(2, 3, 4, 130), want.view(2, 3, 4, 50))
    expect(x.T.contiguous().T, want)
    expect(torch.cat([x, x], 1)[:, :130], want)
    expect(
        torch.cat([x, x], 1)[:2, 65:195],
        dequant_matmul(torch.cat([x[:2, 65:], x[:2, :65]], 1), qt, bias, activation=activation),
    )
    expect(x.view(4, 6, 130).transpose(0, 1), want.view(4, 6, 50).transpose(0, 1))
    expect(x[0], want[0])
    expect(x[:1].expand(9, 130), want[:1].expand(9, 50))
    expect(x[:0], want[:0])
    expect(x.view(2, 12, 130)[:, :0], want.view(2, 12, 50)[:, :0])
    parts = [torch.empty(2 * t.shape[0], 2 * t.shape[1], dtype=t.dtype)[::2, ::2].copy_(t) for t in qt.parts]
    expect(x, want, QuantizedTensor(parts, qt.shape, spec))


@pytest.mark.parametrize("activation", CHECKS)
def test_empty_weights(tier, activation):
    none = QuantizedTensor([torch.zeros(0, 8, dtype=torch.int32), torch.ones(0, 1)], (0, 64), QuantSpec())
    assert dequant_matmul(torch.randn(3, 64), none, activation=activation).shape == (3, 0)
    narrow = QuantizedTensor([torch.zeros(20, 0, dtype=torch.int32), torch.ones(20, 0)], (20, 0), QuantSpec())
    for m in (3, 20):
        bias = torch.randn(20)
        assert torch.equal(dequant_matmul(torch.randn(m, 0), narrow, bias, activation=activation), bias.expand(m, -1))


@pytest.mark.parametrize("isa", TIERS)
@pytest.mark.parametrize("activation", CHECKS)
def test_touches_nothing_outside(isa, activation):
    """Each operand ends at the end of a page; the next page cannot be read or written."""
    for spec in (*SPECS[::3], QuantSpec(6, -1), QuantSpec(6, 32), QuantSpec(6, 64, False)):
        for m, n, k in [(1, 48, 100), (5, 33, 63), (20, 9, 321)]:
            for x_dtype in FLOAT_DTYPES:
                x, qt, bias = operands(m, n, k, spec, x_dtype=x_dtype)
                inside = QuantizedTensor([guarded(part) for part in qt.parts], qt.shape, spec)
                with using(isa):
                    got = dequant_matmul(guarded(x), inside, guarded(bias), activation=activation)
                CHECKS[activation](x, qt, bias, got)


@pytest.mark.parametrize("isa", TIERS)
@pytest.mark.parametrize("m", [1, 6, 20])
def test_writes_all_of_y_and_no_more(isa, m, monkeypatch):
    from klfast.backends.cpu import matmul as cpu

    n, guard, buffers = 37, 64, []

    class NaNs(torch.Tensor):
        """An x whose new_empty lies inside a larger buffer of NaN."""

        @staticmethod
        def new_empty(*shape):
            buffers.append(torch.full((2 * guard + m * n,), torch.nan))
            return buffers[-1][guard : guard + m * n].view(shape)

    for activation in CHECKS:
        x, qt, bias = operands(m, n, 200, QuantSpec(4, 64))
        with using(isa):
            y = cpu.dequant_matmul(MatmulArgs(x.as_subclass(NaNs), list(qt.parts), bias, qt.stored, activation))
        assert torch.isfinite(y).all()
        assert buffers[-1][:guard].isnan().all() and buffers[-1][-guard:].isnan().all()


@pytest.mark.parametrize("isa", TIERS)
@pytest.mark.parametrize("activation", CHECKS)
def test_any_number_of_threads_gives_the_same_bits(isa, activation):
    before = torch.get_num_threads()
    try:
        for m, n, k, x_dtype in [
            (1, 500, 700, torch.float32),
            (30, 70, 600, torch.float32),
            (600, 40, 130, torch.float32),
            (600, 40, 130, torch.bfloat16),
        ]:
            x, qt, bias = operands(m, n, k, QuantSpec(4, 64, False), x_dtype=x_dtype)
            results = []
            for threads in (1, 2, 5):
                torch.set_num_threads(threads)
                with using(isa):
                    results.append(dequant_matmul(x, qt, bias, activation=activation))
            assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
    finally:
        torch.set_num_threads(before)


def test_calls_from_several_python_threads():
    cases = [operands(m, 200, 600, spec) for m in (1, 12) for spec in SPECS[:4]]
    want = [dequant_matmul(*case) for case in cases]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            got = list(pool.map(lambda case: dequant_matmul(*case), cases))
            assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("spec", [QuantSpec(4, 32), QuantSpec(6, 64, False), QuantSpec(8, -1, False)], ids=str)
def test_opcheck(spec):
    x, qt, bias = operands(3, 20, 100, spec)
    for b in (bias, None):
        args = (x, list(qt.parts), b, 20, 100, str(spec), "plain", "exact")
        torch.library.opcheck(torch.ops.klfast.dequant_matmul.default, args)


def test_bad_input(tier):
    x, qt, bias = operands(3, 20, 100, QuantSpec(4, 32, False))
    for message, call in {
        "float32, bfloat16 or float16": lambda: dequant_matmul(x.double(), qt),
        r"\[..., 100\]": lambda: dequant_matmul(x[:, :99], qt),
        r"got \[\]": lambda: dequant_matmul(torch.tensor(1.0), qt),
        r"\[20\], got torch.float32 \[19\]": lambda: dequant_matmul(x, qt, bias[:19]),
        r"\[20\], got torch.float64": lambda: dequant_matmul(x, qt, bias.double()),
        '"exact" or "int8"': lambda: dequant_matmul(x, qt, activation="int4"),
        "one device": lambda: dequant_matmul(x.to("meta"), qt),
    }.items():
        with pytest.raises(InvalidInputError, match=message) as error:
            call()
        assert "\n" not in str(error.value)


def test_the_op_itself_checks_its_parts(tier):
    x, qt, _ = operands(3, 20, 100, QuantSpec(4, 32, False))
    packed, scale, zero_point = qt.parts
    good = dict(
        x=x,
        parts=[packed, scale, zero_point],
        bias=None,
        n=20,
        k=100,
        format="int4-g32-asym",
        layout="plain",
        activation="exact",
    )
    torch.ops.klfast.dequant_matmul(**good)
    for change in (
        {"parts": [packed[:, 1:], scale, zero_point]},
        {"parts": [packed.long(), scale, zero_point]},
        {"parts": [packed, scale[:19], zero_point]},
        {"parts": [packed, scale.double(), zero_point]},
        {"parts": [packed, scale, zero_point[1:]]},
        {"parts": [packed, scale]},
        {"parts": []},
        {"format": "int3-g32-asym"},
        {"format": "int4-g0-asym"},
        {"format": "int4-g16-asym"},
        {"format": "int8-g32-asym"},
        {"format": "int4-g32-sym"},
        {"format": ""},
        {"layout": "other"},
        {"n": 21},
    ):
        with pytest.raises(InvalidInputError):
            torch.ops.klfast.dequant_matmul(**good | change)
