"""quantize and fake_quantize: grids, clipping search, storage as in compressed-tensors, bad input."""

from itertools import product

import pytest
import torch
from compressed_tensors.compressors import PackedQuantizationCompressor
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from hypothesis import given, settings
from hypothesis import strategies as st

from klfast import QuantizedTensor, QuantSpec, quantize
from klfast.core.dtypes import FLOAT_DTYPES
from klfast.core.errors import InvalidInputError
from klfast.quant import packing, rounding
from klfast.quant.rounding import fake_quantize
from klfast.quant.spec import storable_spec

SPECS = [
    QuantSpec(bits, group, symmetric) for bits in (4, 6, 8) for group in (-1, 7, 64, 128) for symmetric in (True, False)
]


def naive(weight, spec, scale_dtype):
    """Round to nearest by abs-max, one group at a time in float64; only the stored scale is rounded."""
    out = torch.empty(weight.shape, dtype=torch.float64)
    length = spec.group_length(weight.shape[1])
    for row in range(weight.shape[0]):
        for start in range(0, weight.shape[1], length):
            group = weight[row, start : start + length].double()
            low = group.min().clamp(max=0)
            span = group.abs().max() if spec.symmetric else group.max().clamp(min=0) - low
            s = (span / (spec.q_max if spec.symmetric else spec.q_max - spec.q_min)).float().to(scale_dtype).double()
            z = 0 if spec.symmetric else (spec.q_min - low / s).round().clamp(spec.q_min, spec.q_max)
            out[row, start : start + length] = ((group / s + z).round().clamp(spec.q_min, spec.q_max) - z) * s
    return out


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("scale_dtype", FLOAT_DTYPES)
def test_absmax_against_one_group_at_a_time(spec, scale_dtype):
    weight = torch.randn(5, 100)
    weight[1] = weight[1].abs()  # the range includes 0 on the side without values
    weight[2] = -weight[2].abs()
    got = quantize(weight, spec, scale_dtype=scale_dtype).dequantize(torch.float32)
    step = (weight.amax(1) - weight.amin(1)).max() / 15
    differing = (got.double() - naive(weight, spec, scale_dtype)).abs() > 1e-6
    assert differing.float().mean() < 0.01  # a tie may round either way in float32
    assert (got - weight).abs().max() < 0.6 * step + 0.02 * weight.abs().max()


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("scale", ["absmax", "mse"])
def test_fake_quantize_is_the_round_trip(spec, scale, monkeypatch):
    monkeypatch.setattr(rounding, "_TILE", 400)  # several tiles, the last one shorter
    for shape, scale_dtype in product([(1, 1), (9, 100)], FLOAT_DTYPES):
        weight = torch.randn(shape)
        want = quantize(weight, spec, scale=scale, scale_dtype=scale_dtype).dequantize(torch.float32)
        assert torch.equal(fake_quantize(weight, spec, scale=scale, scale_dtype=scale_dtype), want)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_mse_beats_absmax_in_every_group(spec):
    weight = torch.distributions.StudentT(3.0).sample((16, 100))
    length = spec.group_length(100)

    def errors(scale):
        error = (fake_quantize(weight, spec, scale=scale) - weight).square()
        return torch.stack([part.sum(1) for part in error.split(length, 1)])

    assert (errors("mse") <= errors("absmax") * (1 + 1e-5)).all()
    if spec.bits == 4 and length > 7:
        assert errors("mse").sum() < 0.95 * errors("absmax").sum()


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("weight", [torch.zeros(3, 70), torch.full((3, 70), 1e-12)], ids=["zero", "tiny"])
def test_groups_without_magnitude_round_to_zero(spec, weight):
    assert torch.equal(quantize(weight, spec).dequantize(torch.float32), torch.zeros(3, 70))


TINY = [*(10.0**-n for n in range(2, 10)), 7e-3, 3e-8, 2e-6, 6e-6]


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_no_weight_of_a_tiny_group_is_off_by_more_than_half_a_step(spec):
    """Even with float16's coarse subnormal scales; asymmetric grids with normal scales lose 1/8 step more."""
    for largest in TINY:
        weight = torch.randn(64, 100) * torch.linspace(0.2, 1, 64)[:, None]
        weight *= largest / weight.abs().max()
        qt = quantize(weight, spec)
        step = qt.scale.double().repeat_interleave(spec.group_length(100), 1)[:, :100]
        errors = (qt.dequantize(torch.float32).double() - weight.double()).abs() / step
        normal = step >= torch.finfo(torch.float16).smallest_normal
        assert qt.scale.dtype == torch.float16 and errors[~normal].numel() + errors[normal].numel() == weight.numel()
        assert not (~normal).any() or errors[~normal].max() <= 0.5 + 1e-4, largest
        assert not normal.any() or errors[normal].max() <= (0.5 if spec.symmetric else 0.63) + 1e-4, largest
        assert torch.equal(fake_quantize(weight, spec), qt.dequantize(torch.float32)), largest


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_mse_is_no_worse_than_absmax_in_tiny_groups(spec):
    for largest in TINY:
        weight = torch.distributions.StudentT(3.0).sample((16, 100))
        weight *= largest / weight.abs().max()
        absmax, mse = (
            (fake_quantize(weight, spec, scale=scale) - weight).double().square().sum() for scale in ("absmax", "mse")
        )
        assert mse <= absmax * (1 + 1e-5), largest


@pytest.mark.parametrize("symmetric", [True, False])
def test_scales_below_float16s_smallest_become_that_or_bfloat16(symmetric):
    weight = torch.randn(4, 64)
    weight *= 1e-8 / weight.abs().max()
    spec = QuantSpec(8, 64, symmetric)
    assert torch.equal(quantize(weight, spec).scale, torch.full((4, 1), 2.0**-24).half())
    assert torch.equal(fake_quantize(weight, spec), torch.zeros(4, 64)), "at most half a step, 3e-8, off"
    error = (fake_quantize(weight, spec, scale_dtype=torch.bfloat16) - weight).abs().max()
    assert error < 0.01 * weight.abs().max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_and_strided_weights(dtype):
    weight = torch.randn(100, 48).to(dtype)
    want = fake_quantize(weight.float().T.contiguous(), QuantSpec())
    assert torch.equal(fake_quantize(weight.T, QuantSpec()), want)
    assert torch.equal(quantize(torch.nn.Parameter(weight.T), QuantSpec()).dequantize(torch.float32), want)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ((4.0, 64), "bits"),
        ((True, 64), "bits"),
        ((3, 64), "bits"),
        ((4, True), "group_size"),
        ((4, 64.0), "group_size"),
        ((4, 0), "group_size"),
        ((4, 64, 1), "symmetric"),
    ],
)
def test_spec_takes_no_other_types(fields, message):
    with pytest.raises(InvalidInputError, match=f"{message} must be"):
        QuantSpec(*fields)


@pytest.mark.parametrize("function", [quantize, fake_quantize])
@pytest.mark.parametrize(
    ("weight", "options", "message"),
    [
        (torch.zeros(4), {}, r"matrix \[N, K\]"),
        (torch.zeros(0, 4), {}, "at least 1"),
        (torch.zeros(4, 0), {}, "at least 1"),
        (torch.zeros(4, 4, dtype=torch.float64), {}, "float64"),
        (torch.zeros(4, 4), {"scale": "max"}, "absmax"),
        (torch.zeros(4, 4), {"scale_dtype": torch.int8}, "scale_dtype"),
        (torch.tensor([[1.0, torch.nan]]), {}, "NaN"),
        (torch.tensor([[1.0, -torch.inf]]), {"scale": "mse"}, "infinity"),
        (torch.tensor([[1.0, 1e6]]), {}, "bfloat16"),
    ],
)
def test_bad_input(function, weight, options, message):
    for spec in (QuantSpec(4, 32), QuantSpec(8, -1, False)):
        if message == "bfloat16" and spec.bits == 8:
            continue  # 1e6 / 255 fits
        with pytest.raises(InvalidInputError, match=message) as error:
            function(weight, spec, **options)
        assert "\n" not in str(error.value)


@settings(deadline=None)
@given(st.sampled_from([4, 6, 8]), st.integers(1, 20), st.integers(1, 70), st.randoms())
def test_pack_and_unpack_are_inverse_and_compressed_tensors_own(bits, rows, count, random):
    stored = torch.tensor([[random.randrange(1 << bits) for _ in range(count)] for _ in range(rows)], dtype=torch.uint8)
    values = (stored.to(torch.int16) - (1 << (bits - 1))).to(torch.int8)
    words = packing.pack(stored, bits)
    assert torch.equal(packing.unpack(words, bits, count), stored)
    assert torch.equal(words, pack_to_int32(values, bits))
    assert torch.equal(unpack_from_int32(words, bits, values.shape), values)
    along_rows = packing.pack(stored.T.contiguous(), bits).T.contiguous()
    assert torch.equal(along_rows, pack_to_int32(values, bits, packed_dim=0))
    index = torch.tensor([[0, rows - 1], [rows // 2, 0]])
    assert torch.equal(packing.unpack_rows(along_rows, bits, index).long(), stored[index].long())


@pytest.mark.parametrize("bits", [4, 6, 8])
@pytest.mark.parametrize("group", [-1, 5, 32, 50])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(
    ("shape", "scale_dtype"), [*zip([(1, 100), (13, 50), (48, 160)], FLOAT_DTYPES, strict=True)], ids=str
)
def test_compressed_tensors_decompresses_the_same_bits(bits, group, symmetric, shape, scale_dtype):
    spec = storable_spec(QuantSpec(bits, group, symmetric), shape[1])
    qt = quantize(torch.randn(shape) + torch.randn(shape[0], 1), spec, scale_dtype=scale_dtype)
    grouping = (
        {"strategy": "channel"} if spec.group_size == -1 else {"strategy": "group", "group_size": spec.group_size}
    )
    scheme = QuantizationScheme(
        targets=["Linear"], weights=QuantizationArgs(num_bits=bits, symmetric=symmetric, **grouping)
    )
    for scale in (qt.scale, -qt.scale):  # of either sign, as second-order rounding makes them
        signed = QuantizedTensor([qt.packed, scale, *qt.parts[2:]], shape, spec)
        state = {"weight_packed": qt.packed, "weight_scale": scale, "weight_shape": torch.tensor(shape)}
        if not symmetric:
            state["weight_zero_point"] = qt.zero_point
        weight = PackedQuantizationCompressor.decompress(state, scheme)["weight"]
        assert weight.dtype == scale_dtype and torch.equal(weight, signed.dequantize())
