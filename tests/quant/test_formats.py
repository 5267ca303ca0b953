"""Formats: what each says of itself; INT6 goes through sweep, plan, quantize, save and load like the others."""

import copy

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from tiny_models import batch, tiny

import klfast
from klfast import Layout, Plan, QuantSpec, nn, quantize
from klfast.core.errors import InvalidInputError, KernelUnavailableError, SlowPathWarning
from klfast.dispatch import registry
from klfast.models.linears import linears
from klfast.quant import packing
from klfast.quant.formats import FORMATS
from klfast.quant.spec import storable_spec

SPECS = [
    QuantSpec(bits, group, symmetric) for bits in (4, 6, 8) for group in (-1, 32, 64) for symmetric in (True, False)
]


def test_names():
    assert list(FORMATS) == ["int4", "int6", "int8"]
    for name, each in FORMATS.items():
        assert each.name == name == f"{each.kind}{each.bits}"
        assert QuantSpec.of(name).format is each
        assert each.range == (-(2 ** (each.bits - 1)), 2 ** (each.bits - 1) - 1)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_a_spec_and_its_text(spec):
    assert QuantSpec.parse(str(spec)) == spec and hash(QuantSpec.parse(str(spec))) == hash(spec)


def test_specs_are_ordered_by_bits():
    assert sorted(map(QuantSpec.of, ("int8-g64", "int4-g64", "int6-g64"))) == [QuantSpec(4), QuantSpec(6), QuantSpec(8)]


@pytest.mark.parametrize("text", ["int5", "int6-g0", "nf4-g64", "int6-sym-g64", "6", "", "INT6"])
def test_what_is_no_spec(text):
    with pytest.raises(InvalidInputError, match="is not a quantization spec") as error:
        QuantSpec.parse(text)
    assert "int6" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(("arguments", "match"), [((5,), "4, 6 or 8"), ((4, 64, True, "nf"), "kind 'nf'")])
def test_a_spec_of_no_format(arguments, match):
    with pytest.raises(InvalidInputError, match=match):
        QuantSpec(*arguments)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_rows_are_taken_apart_and_joined(spec):
    """At any row: zero points of 4 and 6 bits may begin within a word."""
    qt = quantize(torch.randn(37, 65) + torch.randn(37, 1), spec)
    whole = qt.dequantize(torch.float32)
    for layout in Layout:
        for first, end in ((0, 37), (5, 6), (3, 37), (32, 37)):
            block = qt.to_layout(layout).block(first, end)
            assert torch.equal(block.dequantize(torch.float32), whole[first:end])
    joined = klfast.QuantizedTensor.joined([qt.block(0, 5), qt.block(5, 11), qt.block(11, 37)])
    assert joined.shape == qt.shape and all(map(torch.equal, joined.parts, qt.parts))
    with pytest.raises(InvalidInputError, match="other inputs or specs"):
        klfast.QuantizedTensor.joined([qt, quantize(torch.randn(37, 64), spec)])


@pytest.mark.parametrize("layout", Layout)
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_parts_and_bytes(spec, layout):
    """As a quantized tensor has them, and as a file does."""
    qt = quantize(torch.randn(37, 100), spec)
    tiled = qt.to_layout(layout)
    parts = spec.format.parts((37, 100), spec, layout)
    assert [part.name for part in parts] == ["packed", "scale", *([] if spec.symmetric else ["zero_point"])]
    for part, tensor in zip(parts, tiled.parts, strict=True):
        assert (part.shape, part.dtypes[0]) == (tuple(tensor.shape), tensor.dtype)
    assert spec.nbytes((37, 100)) == qt.nbytes and spec.saved_bytes((37, 100)) == qt.nbytes + 16
    assert spec.format.nbytes((0, 0), spec) == 0


def test_six_bits_cost_six_bits():
    assert QuantSpec(6, -1).nbytes((64, 1024)) == 64 * 1024 * 6 // 8 + 64 * 2


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 9), st.integers(1, 130), st.randoms())
def test_int6_is_packed_as_compressed_tensors_packs_it(rows, count, random):
    """Densely: values cross from one word into the next, and an odd count leaves part of a word."""
    stored = torch.tensor([[random.randrange(64) for _ in range(count)] for _ in range(rows)], dtype=torch.uint8)
    signed = (stored.to(torch.int16) - 32).to(torch.int8)
    words = packing.pack(stored, 6)
    assert words.shape[1] == -(-count * 6 // 32) and torch.equal(words, pack_to_int32(signed, 6))
    assert torch.equal(unpack_from_int32(words, 6, signed.shape), signed)
    assert torch.equal(packing.unpack(pack_to_int32(signed, 6), 6, count), stored)


@pytest.mark.parametrize(
    ("size", "stride"), [((1, 1), (6, 6)), ((2, 1), (6, 1)), ((1, 2), (1, 7)), ((2, 3), (1, 2)), ((3, 2), (0, 1))]
)
def test_words_of_any_strides_are_unpacked(size, stride):
    words = torch.arange(40, dtype=torch.int32).as_strided(size, stride)
    for bits in (4, 6, 8):
        count = size[1] * 32 // bits
        expected = packing.unpack(torch.tensor(words.tolist(), dtype=torch.int32), bits, count)
        assert torch.equal(packing.unpack(words, bits, count), expected)


def test_where_a_value_lies():
    words = packing.pack(torch.arange(16, dtype=torch.uint8)[None] + 40, 6)[0]
    number = sum((int(word) & 0xFFFFFFFF) << (32 * i) for i, word in enumerate(words))
    assert [number >> (6 * k) & 63 for k in range(16)] == list(range(40, 56))


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_rows_and_blocks(spec):
    qt = quantize(torch.randn(70, 100), spec)
    want = qt.dequantize(torch.float32)
    for layout in Layout:
        each, index = qt.to_layout(layout), torch.tensor([[69, 0, 5], [31, 33, 5]])
        assert torch.equal(each.rows(index), want[index])
        assert torch.equal(each.block(32, 70).dequantize(torch.float32), want[32:])


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("scale", ["absmax", "mse"])
def test_int6_lies_between_int4_and_int8(symmetric, scale):
    weight = torch.randn(64, 256)
    errors = [
        (quantize(weight, QuantSpec(bits, 64, symmetric), scale=scale).dequantize(torch.float32) - weight)
        .square()
        .sum()
        for bits in (4, 6, 8)
    ]
    assert errors[0] > 10 * errors[1] > 100 * errors[2]


def test_a_config_group_of_no_known_format():
    group = copy.deepcopy(QuantSpec(6, 64).format.to_compressed_tensors(QuantSpec(6, 64)))
    assert QuantSpec.from_compressed_tensors(group) == QuantSpec(6, 64)
    group["weights"]["num_bits"] = 5
    with pytest.raises(InvalidInputError, match="none of the formats int4, int6, int8"):
        QuantSpec.from_compressed_tensors(group)


# A device without a kernel of a format ------------------------------------------------------------------------------


@pytest.fixture
def without_int6():
    with registry.only_formats("dequant_matmul", "CPU", {"int4", "int8"}):
        yield


def test_the_reference_runs_without_a_kernel_of_the_format(without_int6, monkeypatch):
    x, weight = torch.randn(3, 64), torch.randn(9, 64)
    qt = quantize(weight, "int6-g32-asym")
    with pytest.warns(SlowPathWarning, match=r"dequant_matmul \[3, 64\].*does not take int6 weights"):
        found = klfast.dequant_matmul(x, qt)
    torch.testing.assert_close(found, klfast.reference.dequant_matmul(x, qt), rtol=0, atol=0)
    layer = nn.QuantLinear(qt)
    torch.testing.assert_close(layer(x), found, rtol=0, atol=0)
    explained = klfast.explain("dequant_matmul", x, qt)
    assert explained.chosen == "reference" and "int6" in explained.rejected["scalar"]
    assert klfast.explain("dequant_matmul", x, quantize(weight, "int4-g32-asym")).chosen != "reference"
    monkeypatch.setenv("KLFAST_STRICT", "1")
    with pytest.raises(KernelUnavailableError, match="int6"):
        klfast.dequant_matmul(x, qt)


def test_linear_divergence_takes_heads_whose_products_have_no_kernel(without_int6):
    hidden, head = torch.randn(5, 64).bfloat16(), torch.randn(300, 64).bfloat16()
    qt = quantize(head, "int6-g32-asym")
    found = klfast.linear_divergence(hidden, head, hidden, qt).kl_teacher_student
    want = klfast.linear_divergence(hidden, head, hidden.float(), qt.dequantize(torch.float32)).kl_teacher_student
    torch.testing.assert_close(found, want, rtol=1e-3, atol=1e-7)


# From sweep to file -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_int6_from_sweep_to_file(tied, tmp_path):
    model, ids = tiny("mamba", tied=tied).eval(), batch()
    sensitivities = klfast.sweep(model, [ids], specs=["int4-g16-sym", "int6-g16-asym", "int8-g16-sym"])
    kl = {
        spec: sensitivities.measurements["lm_head", spec].mean["kl_teacher_student"]
        for spec in map(QuantSpec.of, ("int4-g16-sym", "int6-g16-asym", "int8-g16-sym"))
    }
    assert list(kl.values()) == sorted(kl.values(), reverse=True)
    plan = klfast.plan(sensitivities, mean_bits=7.5)
    assert {spec.bits for spec in plan.specs.values()} >= {6}
    again = Plan.from_json(plan.to_json())
    assert again.specs == plan.specs
    specs = {name: storable_spec(QuantSpec(6, 16, False), layer.in_features) for name, layer in linears(model).items()}
    quantized = klfast.quantize_model(model, Plan(specs, "uniform"))
    with torch.no_grad():
        want = quantized(ids).logits
    klfast.save_quantized(quantized, tmp_path / "model")
    loaded = klfast.load_quantized(tmp_path / "model")
    assert {str(m.spec) for m in loaded.modules() if isinstance(m, nn.QuantLinear)} == set(map(str, specs.values()))
    assert isinstance(loaded.get_input_embeddings(), nn.QuantEmbedding) == tied
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, want, rtol=1e-4, atol=1e-5)
    with safe_open(tmp_path / "model" / "model.safetensors", "pt") as file:
        for name, spec in specs.items():
            layer = quantized.get_submodule(name)
            shape = (layer.out_features, layer.in_features)
            signed = unpack_from_int32(file.get_tensor(f"{name}.weight_packed"), 6, torch.Size(shape)).float()
            zero = unpack_from_int32(
                file.get_tensor(f"{name}.weight_zero_point"), 6, torch.Size((shape[0], spec.n_groups(shape[1]))), 0
            ).float()
            length = spec.group_length(shape[1])
            scale = file.get_tensor(f"{name}.weight_scale").float().repeat_interleave(length, 1)
            found = (signed - zero.repeat_interleave(length, 1)) * scale
            assert torch.equal(found, layer.quantized.dequantize(torch.float32))


@pytest.mark.parametrize("spec", [QuantSpec(6, 64), QuantSpec(6, 32, False)], ids=str)
def test_linear_divergence_with_an_int6_student(tier, spec):
    hidden, head = torch.randn(21, 96), torch.randn(300, 96) / 3
    qt, targets = quantize(head, spec), torch.randint(300, (21,))
    found = klfast.linear_divergence(hidden, head, hidden, qt, targets)
    want = klfast.logit_divergence(hidden @ head.T, hidden @ qt.dequantize(torch.float32).T, targets)
    torch.testing.assert_close(found.kl_teacher_student, want.kl_teacher_student, rtol=2e-3, atol=1e-7)
    torch.testing.assert_close(found.ce_student, want.ce_student, rtol=1e-4, atol=1e-5)
