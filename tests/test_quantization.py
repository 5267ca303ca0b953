"""quantize and fake_quantize: grids, clipping search, storage, bad input."""

import pytest
import torch

from klfast import QuantSpec, quantization, quantize
from klfast.errors import InvalidInputError
from klfast.quantization import fake_quantize
from klfast.types import FLOAT_DTYPES

SPECS = [QuantSpec(bits, group, symmetric) for bits in (4, 8) for group in (-1, 7, 64, 128) for symmetric in (True, False)]


def naive(weight, spec, scale_dtype):
    """Round to nearest by abs-max, one group at a time in float64; the stored scale is the one place that rounds."""
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
    weight[1] = weight[1].abs()  # the range takes in 0 on the side that has no values
    weight[2] = -weight[2].abs()
    got = quantize(weight, spec, scale_dtype=scale_dtype).dequantize(torch.float32)
    step = (weight.amax(1) - weight.amin(1)).max() / 15
    differing = (got.double() - naive(weight, spec, scale_dtype)).abs() > 1e-6
    assert differing.float().mean() < 0.01  # a tie may round either way in float32
    assert (got - weight).abs().max() < 0.6 * step + 0.02 * weight.abs().max()


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("scale", ["absmax", "mse"])
@pytest.mark.parametrize("scale_dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (9, 100)])
def test_fake_quantize_is_the_round_trip(spec, scale, scale_dtype, shape, monkeypatch):
    monkeypatch.setattr(quantization, "_TILE", 400)  # several tiles, the last one shorter
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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_and_strided_weights(dtype):
    weight = torch.randn(100, 48).to(dtype)
    want = fake_quantize(weight.float().T.contiguous(), QuantSpec())
    assert torch.equal(fake_quantize(weight.T, QuantSpec()), want)
    assert torch.equal(quantize(torch.nn.Parameter(weight.T), QuantSpec()).dequantize(torch.float32), want)


@pytest.mark.parametrize("function", [quantize, fake_quantize])
@pytest.mark.parametrize("weight, options, message", [
    (torch.zeros(4), {}, r"matrix \[N, K\]"),
    (torch.zeros(0, 4), {}, "at least 1"),
    (torch.zeros(4, 0), {}, "at least 1"),
    (torch.zeros(4, 4, dtype=torch.float64), {}, "float64"),
    (torch.zeros(4, 4), {"scale": "max"}, "absmax"),
    (torch.zeros(4, 4), {"scale_dtype": torch.int8}, "scale_dtype"),
    (torch.tensor([[1.0, torch.nan]]), {}, "NaN"),
    (torch.tensor([[1.0, -torch.inf]]), {"scale": "mse"}, "infinity"),
    (torch.tensor([[1.0, 1e6]]), {}, "bfloat16"),
])
def test_bad_input(function, weight, options, message):
    for spec in (QuantSpec(4, 32), QuantSpec(8, -1, False)):
        if message == "bfloat16" and spec.bits == 8:
            continue  # 1e6 / 255 fits
        with pytest.raises(InvalidInputError, match=message) as error:
            function(weight, spec, **options)
        assert "\n" not in str(error.value)
