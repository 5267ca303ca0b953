"""Group sizes of saved weights: those that compressed-tensors takes."""

import pytest
import torch

from klfast.quant.rounding import quantize
from klfast.quant.spec import QuantSpec, storable_spec


@pytest.mark.parametrize(
    ("asked", "in_features", "stored"),
    [
        (128, 1600, 100),
        (64, 1600, 64),
        (64, 100, 50),
        (128, 100, -1),
        (100, 100, -1),
        (32, 53, 1),
        (-1, 53, -1),
        (32, 0, 32),
    ],
)
def test_storable_group(asked, in_features, stored):
    assert storable_spec(QuantSpec(4, asked, False), in_features) == QuantSpec(4, stored, False)


@pytest.mark.parametrize("in_features", [1, 48, 53, 100])
@pytest.mark.parametrize("group", [1, 20, 32, 64])
@pytest.mark.parametrize("symmetric", [True, False])
def test_compressed_tensors_takes_storable_groups_and_no_others(in_features, group, symmetric):
    from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    def decompress(spec):
        stored = quantize(torch.randn(7, in_features), spec)
        grouping = (
            {"strategy": "channel"} if spec.group_size == -1 else {"strategy": "group", "group_size": spec.group_size}
        )
        args = QuantizationArgs(num_bits=spec.bits, symmetric=spec.symmetric, **grouping)
        state = {
            "weight_packed": stored.packed,
            "weight_scale": stored.scale,
            "weight_shape": torch.tensor(stored.shape),
        }
        if stored.zero_point is not None:
            state["weight_zero_point"] = stored.zero_point
        weight = PackedQuantizationCompressor.decompress(state, QuantizationScheme(targets=["Linear"], weights=args))[
            "weight"
        ]
        assert torch.equal(weight, stored.dequantize())

    asked = QuantSpec(4, group, symmetric)
    decompress(storable_spec(asked, in_features))
    if in_features % group:
        # compressed-tensors 0.20 and 0.19 (the last for Python 3.10)
        with pytest.raises((ValueError, RuntimeError), match=r"must be divis|sizes .* don't multiply up"):
            decompress(asked)
