"""Layouts of quantized tensors, and layers kept in a layout other than the saved one."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from klfast import Layout, QuantizedTensor, QuantLinear, QuantSpec, dequant_matmul, quantize
from klfast.backends import operands
from klfast.core.errors import InvalidInputError, SlowPathWarning
from klfast.nn import QuantEmbedding
from klfast.quant import layouts
from klfast.quant.formats import packed_integers


def quantized(n, k, spec):
    return quantize(torch.randn(n, k) + torch.randn(n, 1), spec)


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.parts, b.parts, strict=True))


@settings(max_examples=150, deadline=None)
@given(
    st.integers(1, 40),
    st.integers(1, 400),
    st.sampled_from([4, 6, 8]),
    st.one_of(st.just(-1), st.integers(1, 300)),
    st.booleans(),
)
def test_to_tiled_and_back(n, k, bits, group, symmetric):
    qt = quantized(n, k, QuantSpec(bits, group, symmetric))
    tiled = qt.to_layout(Layout.TILED)
    assert tiled.layout is Layout.TILED and tiled.to_layout(Layout.TILED) is tiled and qt.to_layout(Layout.PLAIN) is qt
    assert same(tiled.to_layout(Layout.PLAIN), qt)
    assert torch.equal(tiled.dequantize(), qt.dequantize())
    index = torch.randint(n, (7,))
    assert torch.equal(tiled.rows(index), qt.dequantize(torch.float32)[index])
    assert torch.equal(qt.rows(index), qt.dequantize(torch.float32)[index])


@pytest.mark.parametrize("spec", ["int4-g64-asym", "int6-g32-sym", "int8-channel-asym"])
@pytest.mark.parametrize("rows_at_once", [1, 7, 29, 30])
def test_large_matrices_are_converted_in_pieces(spec, rows_at_once, monkeypatch):
    qt = quantized(29, 150, QuantSpec.parse(spec))
    tiled = qt.to_layout(Layout.TILED)
    monkeypatch.setattr(packed_integers, "_AT_ONCE", 150 * rows_at_once + 149)
    assert same(qt.to_layout(Layout.TILED), tiled) and same(tiled.to_layout(Layout.PLAIN), qt)


@pytest.mark.parametrize(
    ("k", "bits", "group", "packed"),
    [
        (1600, 4, 64, (13, 64)),
        (1600, 4, 128, (13, 64)),
        (1600, 8, -1, (25, 64)),
        (256, 4, 32, (4, 32)),
        (192, 8, 96, (6, 32)),
        (100, 4, -1, (1, 64)),
        (14, 8, 7, (2, 32)),
        (256, 6, 64, (3, 64)),
        (1600, 6, -1, (20, 64)),
        (100, 6, -1, (2, 64)),
    ],
)
def test_tiles(k, bits, group, packed):
    tiles, block = packed
    assert quantized(5, k, QuantSpec(bits, group)).to_layout(Layout.TILED).packed.shape == (tiles, 5, block)


def test_where_a_value_lies():
    """INT4, row n: input feature k of block b is in tile b // 2, the high bits if b is odd."""
    spec = QuantSpec(4, 64, False)
    qt = quantized(3, 300, spec)
    tiled = qt.to_layout(Layout.TILED)
    n, k = 2, 64 + 17
    value = (tiled.packed[0, n, 17].item() >> 4) - tiled.zero_point[1, n].item()
    assert value * tiled.scale[1, n].float().item() == pytest.approx(qt.dequantize(torch.float32)[n, k].item())


def test_what_fills_a_block_stands_for_zero():
    qt = quantized(3, 100, QuantSpec(4, 50, False)).to_layout(Layout.TILED)
    low, high = qt.packed[0] & 15, qt.packed[0] >> 4
    assert (low[:, 50:] == qt.zero_point[0, :, None]).all() and (high[:, 50:] == qt.zero_point[1, :, None]).all()


def test_fill_blocks():
    x = torch.arange(1.0, 15).view(2, 7)
    filled = layouts.fill_blocks(x, 8, 4)
    assert filled.shape == (2, 64) and torch.equal(filled[:, [0, 1, 2, 3, 32, 33, 34]], x) and filled.sum() == x.sum()
    aligned = torch.randn(3, 128)
    assert layouts.fill_blocks(aligned, 4, 64) is aligned


def test_wrong_parts():
    tiled = quantized(5, 100, QuantSpec(4, 32, False)).to_layout(Layout.TILED)
    for change in (
        {"packed": tiled.packed[1:]},
        {"packed": tiled.packed.int()},
        {"scale": tiled.scale.T},
        {"zero_point": tiled.zero_point.int()},
    ):
        parts = dict(packed=tiled.packed, scale=tiled.scale, zero_point=tiled.zero_point) | change
        with pytest.raises(InvalidInputError, match=next(iter(change))) as error:
            QuantizedTensor(list(parts.values()), tiled.shape, tiled.spec, Layout.TILED)
        assert "\n" not in str(error.value)


def test_a_cpu_kernel_converts_with_a_warning():
    qt = quantized(5, 100, QuantSpec(4, 32, False))
    x = torch.randn(3, 100)
    with pytest.warns(SlowPathWarning, match="to_layout"):
        got = dequant_matmul(x, qt.to_layout(Layout.TILED))
    assert torch.equal(got, dequant_matmul(x, qt))


@pytest.mark.parametrize("spec", [QuantSpec(4, 32), QuantSpec(6, 64, False), QuantSpec(8, -1, False)], ids=str)
def test_a_layer_in_another_layout(spec, monkeypatch):
    """As on a GPU: tiled in memory, plain in its state dict."""
    linear = torch.nn.Linear(100, 37, bias=False)
    plain = QuantLinear.from_linear(linear, spec)
    monkeypatch.setattr(operands, "preferred_layout", lambda *_: Layout.TILED)
    layer = QuantLinear.from_linear(linear, spec)
    assert layer.layout is Layout.TILED and layer.weight_packed.dim() == 3
    state = layer.state_dict()
    assert list(state) == list(plain.state_dict()) and all(
        torch.equal(state[name], t) for name, t in plain.state_dict().items()
    )
    other = QuantLinear.from_linear(torch.nn.Linear(100, 37, bias=False), spec)
    other.load_state_dict(plain.state_dict())
    assert other.layout is Layout.TILED and torch.equal(other.weight_packed, layer.weight_packed)
    assert torch.equal(layer.weight + 0, plain.weight + 0)
    ids = torch.tensor([[3, 0], [36, 3]])
    assert torch.equal(QuantEmbedding(layer)(ids), QuantEmbedding(plain)(ids))
    monkeypatch.undo()
    assert same(layer.to("cpu").quantized, plain.quantized)
