"""Blocks of GGUF in klfast's formats: each number is the one that the gguf package reads, bit for bit."""

import gguf
import numpy as np
import pytest
import torch
from gguf_files import encode

from klfast.checkpoint.gguf.blocks import codes_and_scale, exact_spec
from klfast.checkpoint.gguf.file import GgufFile
from klfast.quant.tensor import QuantizedTensor

EXACT = {"Q4_0": "int4-g32-sym", "Q5_0": "int6-g32-sym", "Q8_0": "int8-g32-sym", "IQ4_NL": "int8-g32-sym"}
EXACT["Q6_K"] = "int6-g16-sym"


def opened(tmp_path, kind, data):
    writer = gguf.GGUFWriter(tmp_path / "one.gguf", "llama")
    writer.add_tensor("w", data, raw_dtype=gguf.GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return GgufFile(tmp_path / "one.gguf")


@pytest.mark.parametrize(("kind", "spec"), EXACT.items())
def test_exact_types(tmp_path, kind, spec):
    values = np.random.default_rng(1).normal(size=(7, 768)).astype(np.float32)
    values[2] = 0  # scales of zero
    data = encode(values, gguf.GGMLQuantizationType[kind])
    codes, scale = codes_and_scale(opened(tmp_path, kind, data), "w")
    found = exact_spec(kind)
    assert str(found) == spec
    assert scale.dtype == (torch.float32 if kind == "Q6_K" else torch.float16)
    assert scale.min() < 0 or kind in ("Q8_0",)  # signs are kept
    weight = QuantizedTensor(found.format.encode(codes, scale, None), (7, 768), found)
    want = gguf.quants.dequantize(data, gguf.GGMLQuantizationType[kind])
    assert torch.equal(weight.dequantize(torch.float32), torch.from_numpy(want))
    assert np.abs(want).max() > 0.02


def test_scales_are_the_stored_bits(tmp_path):
    """Also where float16 has few bits left: subnormal numbers, and the largest ones."""
    blocks = np.zeros((3, 2, 34), np.uint8)
    blocks[..., 2:] = np.arange(32)
    bits = np.array([[0x0001, 0x83FF], [0x7BFF, 0xFBFF], [0x8000, 0x3C01]], np.uint16)
    blocks[..., :2] = bits[..., None].view(np.uint8).reshape(3, 2, 2)
    codes, scale = codes_and_scale(opened(tmp_path, "Q8_0", blocks.reshape(3, -1)), "w")
    assert np.array_equal(scale.view(torch.int16).numpy().view(np.uint16), bits)
    assert torch.equal(codes[0], torch.arange(32, dtype=torch.int8).repeat(2))


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q4_1", "Q5_1", "Q4_K", "Q2_K", "IQ4_XS"])
def test_other_types(kind):
    assert exact_spec(kind) is None
