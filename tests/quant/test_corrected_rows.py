"""Corrected rows: a second matrix in the same format makes some rows of a weight finer."""

import pytest
import torch

import klfast
from klfast.core.errors import InvalidInputError
from klfast.quant.layouts import Layout
from klfast.quant.rounding import fake_quantize

SPECS = ("int4-g32-sym+7", "int4-g64-asym+7", "int6-channel-sym+7", "int8-g32-asym+7")


def weight(n=45, k=96):
    return torch.randn(n, k, generator=torch.Generator().manual_seed(1)) * torch.linspace(0.5, 2, n)[:, None]


def test_specs_as_text():
    spec = klfast.QuantSpec.parse("int4-g64-sym+512")
    assert (spec.corrected, spec.bits, spec.group_size, str(spec)) == (512, 4, 64, "int4-g64-sym+512")
    assert spec.base == klfast.QuantSpec(4, 64) == spec.base.base
    assert klfast.QuantSpec.parse("int4+3") == klfast.QuantSpec(corrected=3)
    for text in ("int4+0", "int4+", "int4-sym-g64+3", "int4+3-sym", "int4+-3", "int4+3:3", "int4+5:3", "int4+:3"):
        with pytest.raises(InvalidInputError, match="not a quantization spec"):
            klfast.QuantSpec.parse(text)
    with pytest.raises(InvalidInputError, match="corrected must be a number of rows"):
        klfast.QuantSpec(corrected=-1)
    named = klfast.QuantSpec.parse("int4-g64-sym+0:3")
    assert named == klfast.QuantSpec(4, 64, corrected=3, first_corrected=0) and named.base == klfast.QuantSpec(4, 64)
    assert str(named) == "int4-g64-sym+0:3" and str(klfast.QuantSpec.parse("int4+9:12")) == "int4-g64-sym+9:12"
    for first, rows in ((-2, 3), (0, 0), (True, 3), (1.0, 3)):
        with pytest.raises(InvalidInputError, match="first_corrected must be a corrected row, or -1, got"):
            klfast.QuantSpec(corrected=rows, first_corrected=first)


@pytest.mark.parametrize("text", SPECS)
def test_the_rows_with_the_largest_error_become_finer(text):
    spec, w = klfast.QuantSpec.parse(text), weight()
    qt, plain = klfast.quantize(w, spec), klfast.quantize(w, spec.base).dequantize(torch.float32)
    found = qt.dequantize(torch.float32)
    errors = (plain - w).norm(dim=1)
    rows = errors.topk(7).indices.sort().values
    assert torch.equal(qt.halves[1].long(), rows)
    finer = (found - w).norm(dim=1)[rows] / errors[rows]
    assert finer.max() < 2.5 / 2**spec.bits
    others = torch.ones(len(w), dtype=torch.bool).index_fill(0, rows, False)
    assert torch.equal(found[others], plain[others])
    assert qt.nbytes == spec.nbytes((45, 96)) == spec.base.nbytes((45, 96)) + spec.base.nbytes((7, 96)) + 4 * 7


@pytest.mark.parametrize("first", [0, 3, 38])
def test_named_rows_become_finer(first):
    w, rows = weight(), slice(first, first + 7)
    qt, plain = klfast.quantize(w, f"int4-g32-sym+{first}:{first + 7}"), klfast.quantize(w, "int4-g32-sym")
    found, expected = qt.dequantize(torch.float32), plain.dequantize(torch.float32)
    assert qt.halves[1].tolist() == list(range(first, first + 7)) and str(qt.spec) == "int4-g32-sym+7"
    assert ((found - w).norm(dim=1) / (expected - w).norm(dim=1))[rows].max() < 2.5 / 2**4
    expected[rows] = found[rows]
    assert torch.equal(found, expected)
    assert torch.equal(fake_quantize(w, f"int4-g32-sym+{first}:{first + 7}"), found)


@pytest.mark.parametrize("text", SPECS)
@pytest.mark.parametrize("layout", list(Layout))
def test_rows_blocks_and_layouts_agree_with_the_whole(text, layout):
    qt = klfast.quantize(weight(), text)
    whole = qt.dequantize(torch.float32)
    qt = qt.to_layout(layout)
    assert torch.equal(qt.dequantize(torch.float32), whole)
    index = torch.tensor([[44, 0, 3], [17, 17, 44]])
    torch.testing.assert_close(qt.rows(index), whole[index], rtol=0, atol=0)
    for first, end in ((0, 45), (32, 45), (0, 3), (0, 20)):
        assert torch.equal(qt.block(first, end).dequantize(torch.float32), whole[first:end])


@pytest.mark.parametrize("text", SPECS)
@pytest.mark.parametrize("activation", ["exact", "int8"])
def test_products_are_of_both_matrices(text, activation):
    qt, x, bias = klfast.quantize(weight(), text), torch.randn(2, 3, 96), torch.randn(45)
    with klfast.using("reference"):
        truth = klfast.dequant_matmul(x, qt, bias, activation=activation)
    assert truth.shape == (2, 3, 45)
    layer = klfast.QuantLinear(qt, bias, activation)
    torch.testing.assert_close(layer(x), truth, rtol=1e-5, atol=1e-4)
    if activation == "exact":
        expected = x.double() @ qt.dequantize(torch.float64).T + bias.double()
        torch.testing.assert_close(layer(x).double(), expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close((layer.weight @ x.mT).double(), (expected - bias).mT, rtol=1e-5, atol=1e-5)


def test_gradients_reach_x():
    x = torch.randn(2, 96, requires_grad=True)
    layer = klfast.QuantLinear(klfast.quantize(weight(), SPECS[0]))
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, layer.quantized.dequantize(torch.float32).sum(0).expand(2, -1))


def test_more_rows_than_there_are():
    with pytest.raises(InvalidInputError, match="46 rows cannot be corrected in a matrix of 45"):
        klfast.quantize(weight(), "int4-g32-sym+46")
    with pytest.raises(InvalidInputError, match="7 rows from 39 on cannot be corrected in a matrix of 45"):
        klfast.quantize(weight(), "int4-g32-sym+39:46")


def test_experts_cannot_be_joined():
    qt = klfast.quantize(weight(), SPECS[0])
    with pytest.raises(InvalidInputError, match="cannot be joined"):
        klfast.QuantizedTensor.joined([qt, qt])
