"""Triton's dequant_matmul against float64, as the CPU kernels are tested."""

import pytest
import torch
from klfast.kernels import dequant_matmul as kernel
from klfast.kernels import launch
from test_dequant_matmul import CHECKS, SPECS, operands, with_signs

from klfast import Layout, QuantLinear, QuantSpec, dequant_matmul, quantize
from klfast.backends import operands as backend_operands
from klfast.core.dtypes import FLOAT_DTYPES
from klfast.core.errors import SlowPathWarning
from klfast.quant import layouts

SOME_SPECS = [spec for spec in SPECS if spec.bits != 6 or spec.group_size in (-1, 64)]  # the interpreter is slow
EXACT_INT8 = pytest.mark.parametrize("activation", CHECKS)


def run(device, x, qt, bias, activation):
    """Run on the device, with the weight in its layout; return the result on the CPU."""
    tiled = qt.to(device).to_layout(Layout.TILED)
    return dequant_matmul(x.to(device), tiled, None if bias is None else bias.to(device), activation=activation).cpu()


def check(device, m, n, k, spec, activation, **options):
    x, qt, bias = operands(m, n, k, spec, **options)
    CHECKS[activation](x, qt, bias, run(device, x, qt, bias, activation))


@EXACT_INT8
@pytest.mark.parametrize("spec", [*SOME_SPECS, QuantSpec(4, 100, False)], ids=str)
def test_against_float64(device, spec, activation):
    for m, n, k in [(1, 70, 63), (9, 17, 515) if activation == "exact" else (2, 33, 160)]:
        check(device, m, n, k, spec, activation)


@EXACT_INT8
def test_other_sizes(device, activation):
    for spec in (QuantSpec(4, 32), QuantSpec(6, 64, False), QuantSpec(8, -1, False)):
        for m, n, k in [(1, 48, 100), (17, 20, 64), (1, 1, 1)]:
            check(device, m, n, k, spec, activation)


@EXACT_INT8
@pytest.mark.parametrize("bits", [4, 6, 8])
def test_scales_of_either_sign(device, bits, activation):
    for m in (1, 5, 17):
        x, qt, bias = operands(m, 40, 130, QuantSpec(bits, 32))
        signed = with_signs(qt)
        CHECKS[activation](x, signed, bias, run(device, x, signed, bias, activation))


@EXACT_INT8
@pytest.mark.parametrize(
    ("x_dtype", "scale_dtype"),
    [*((dtype, torch.float16) for dtype in FLOAT_DTYPES), *((torch.float32, dtype) for dtype in FLOAT_DTYPES[:-1])],
)
def test_dtypes(device, x_dtype, scale_dtype, activation):
    for spec in (
        QuantSpec(4, 32),
        QuantSpec(4, 128, False),
        QuantSpec(6, 64, False),
        QuantSpec(8, -1),
        QuantSpec(8, 64, False),
    ):
        for m in (1, 3):
            check(device, m, 40, 130, spec, activation, x_dtype=x_dtype, scale_dtype=scale_dtype)
    x, qt, bias = operands(2, 40, 130, QuantSpec(4, 32), x_dtype=x_dtype)
    for b in (None, bias.bfloat16(), bias.half()):
        CHECKS[activation](x, qt, b, run(device, x, qt, b, activation))


@EXACT_INT8
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.float16])
def test_every_configuration(device, family, x_dtype, activation, monkeypatch):
    """Each at sizes that leave its last tiles ragged, on more than one tile in each direction."""
    dtype = torch.int8 if activation == "int8" else x_dtype
    for config in (kernel.GEMV[family], *kernel.GEMM[family, dtype]):
        m, shared = min(config.rows, config.BM + 3), config.shared
        monkeypatch.setattr(launch, "shared_memory", lambda _, shared=shared: shared)
        assert config is kernel.GEMV[family] or kernel.pick(kernel.GEMM[family, dtype], m, shared) is config
        for spec in (QuantSpec(4, 32, False), QuantSpec(6, 32), QuantSpec(8, 64)):
            check(device, m, config.BN + 5, 160, spec, activation, x_dtype=x_dtype)


@EXACT_INT8
@pytest.mark.parametrize(
    "spec", [QuantSpec(4, 32, False), QuantSpec(4, -1), QuantSpec(6, 128), QuantSpec(8, 128)], ids=str
)
def test_split_over_k(device, spec, activation, monkeypatch):
    monkeypatch.setattr(launch, "cores", lambda _: 100)
    for m, n, k in [(1, 40, 1600), (3, 33, 600)]:
        x, qt, bias = operands(m, n, k, spec)
        assert kernel.parts_of(2, layouts.Tiling.of(k, spec.bits, spec.group_size).turns, 100)[0] > 1
        CHECKS[activation](x, qt, bias, run(device, x, qt, bias, activation))


def test_parts_cover_all_tiles_once():
    for programs in (1, 7, 4000):
        for n_tiles in (0, 1, 3, 8, 41, 64):
            parts, tiles = kernel.parts_of(programs, n_tiles, 132)
            assert parts >= 1 and parts * tiles >= n_tiles and (parts - 1) * tiles < max(n_tiles, 1)


@EXACT_INT8
@pytest.mark.parametrize("m", [1, 5])
def test_writes_all_of_y_and_no_more(device, m, activation):
    n, k, spec, guard = 37, 200, QuantSpec(4, 64), 64
    x, qt, bias = operands(m, n, k, spec)
    tiled = qt.to(device).to_layout(Layout.TILED)
    for cores in (1, 100):
        buffer = torch.full((2 * guard + m * n,), torch.nan, device=device)
        y = buffer[guard : guard + m * n].view(m, n)
        rows = layouts.fill_blocks(x.to(device), spec.bits, spec.group_size)
        for one in kernel.plan(
            rows,
            kernel.Weight(*tiled.parts, k=k, spec=spec),
            bias.to(device),
            y,
            int8=activation == "int8",
            family="nvidia",
            cores=cores,
        ):
            one.run()
        CHECKS[activation](x, qt, bias, y.cpu())
        assert buffer[:guard].isnan().all() and buffer[-guard:].isnan().all()


@EXACT_INT8
@pytest.mark.parametrize("m", [1, 4])
def test_not_finite_x_stays_in_its_row(device, activation, m):
    x, qt, _ = operands(m, 40, 192, QuantSpec(4, 64, False))  # an odd number of blocks
    want = run(device, x, qt, None, activation)
    for column in (70, 191):
        for value in (torch.nan, torch.inf, 1e-42, -torch.inf):
            bad = x.clone()
            bad[0, column] = value
            got = run(device, bad, qt, None, activation)
            assert torch.isfinite(got[0]).any() == (value == 1e-42)
            # The last of an odd number of blocks meets weights of 0, too: infinities there become NaN.
            if activation == "exact" and column == 70 and value in (torch.inf, -torch.inf):
                expected = bad[0] @ qt.dequantize(torch.float32).T
                torch.testing.assert_close(got[0].cpu(), expected, equal_nan=True)
            assert torch.equal(got[1:], want[1:])


@EXACT_INT8
def test_x_of_tiny_or_zero_magnitude(device, activation):
    _, qt, bias = operands(1, 40, 200, QuantSpec(4, 64))
    for value in (0.0, 1e-38, 1e-43):
        x = torch.full((2, 200), value).index_fill(1, torch.tensor(3), 0)
        torch.testing.assert_close(run(device, x, qt, bias, activation), bias.expand(2, -1), rtol=0, atol=1e-35)


def test_ties_of_x_round_to_even(device):
    x = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, 126.5, -126.5]])  # scale 1
    got = run(device, x, quantize(torch.eye(8), QuantSpec(8, -1), scale_dtype=torch.float32), None, "int8")
    torch.testing.assert_close(got, torch.tensor([[127.0, 0, 2, 2, 0, -2, 126, -126]]), rtol=1e-6, atol=0)


@EXACT_INT8
def test_strides_dimensions_and_empty_operands(device, activation):
    spec = QuantSpec(4, 32, False)
    x, qt, bias = operands(6, 20, 128, spec)
    want = run(device, x, qt, bias, activation)
    for other in (
        x.view(2, 3, 128),
        x.T.contiguous().T,
        torch.cat([x, x], 1)[:, :128],
        x.view(3, 2, 128),
        x[:1].expand(6, 128),
    ):
        rows = want if other.stride(0) else want[:1].expand(6, 20)
        torch.testing.assert_close(
            run(device, other, qt, bias, activation), rows.reshape(*other.shape[:-1], 20), rtol=1e-5, atol=1e-4
        )
    torch.testing.assert_close(run(device, x[0], qt, bias, activation), want[0], rtol=1e-5, atol=1e-4)
    assert run(device, x[:0], qt, bias, activation).shape == (0, 20)
    narrow = quantize(torch.randn(20, 4), QuantSpec(8, -1)).to_layout(Layout.TILED)
    empty = [narrow.packed[:0].new_zeros(0, 20, 32), narrow.scale[:0]]
    narrow = type(narrow)(empty, (20, 0), narrow.spec, Layout.TILED)
    assert torch.equal(run(device, x[:, :0], narrow, bias, activation), bias.expand(6, -1))


def test_a_plain_weight_is_converted_with_a_warning(device):
    x, qt, bias = operands(3, 20, 100, QuantSpec(4, 32, False))
    with pytest.warns(SlowPathWarning, match=r"dequant_matmul \[3, 100\].*to_layout"):
        got = dequant_matmul(x.to(device), qt.to(device), bias.to(device))
    CHECKS["exact"](x, qt, bias, got.cpu())


def test_opcheck(device):
    x, qt, bias = operands(3, 20, 100, QuantSpec(4, 32, False))
    qt = qt.to(device).to_layout(Layout.TILED)
    args = (x.to(device), list(qt.parts), bias.to(device), 20, 100, "int4-g32-asym", "tiled", "exact")
    torch.library.opcheck(torch.ops.klfast.dequant_matmul.default, args)


def test_a_layer_comes_to_its_layout_by_itself(device, monkeypatch):
    if device.type == "cpu":
        monkeypatch.setattr(backend_operands, "preferred_layout", lambda *_: Layout.TILED)
    linear = torch.nn.Linear(100, 37)
    layer = QuantLinear.from_linear(linear, QuantSpec(4, 64, False)).to(device)
    assert layer.layout is Layout.TILED
    x = torch.randn(5, 100)
    qt = quantize(linear.weight.detach(), layer.spec)
    CHECKS["exact"](x, qt, linear.bias.detach(), layer(x.to(device)).cpu())
