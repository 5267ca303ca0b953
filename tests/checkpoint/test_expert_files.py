"""Folders with quantized experts: what they hold, what klfast and transformers read, damage."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from saved_models import refused, sign
from tiny_models import batch, tiny
from transformers import AutoModelForCausalLM

import klfast
from klfast import Plan, QuantSpec
from klfast.core.errors import CheckpointError, InvalidInputError
from klfast.dispatch import registry
from klfast.models.matrices import matrices

# Checkpoints with gate_proj, up_proj and down_proj; with w1, w3 and w2; without a gate; stacked.
SPLIT = ("qwen3_next", "lfm2_moe", "nemotron_h_moe")
STACKED = "granite_hybrid_moe"
pytestmark = pytest.mark.filterwarnings("ignore::klfast.SlowPathWarning")  # nemotron_h runs transformers' functions


def with_experts(family, *specs, others=None):
    """Return a tiny model with its stacks quantized, the specs in turn, and its other layers in ``others``."""
    model = tiny(family)
    stacks = [name for name, one in matrices(model).items() if one.is_stack]
    plan = {name: specs[i % len(specs)] for i, name in enumerate(stacks)}
    if others is not None:
        plan |= {name: others for name in matrices(model) if name not in plan and "out_proj" not in name}
    return klfast.quantize_model(model, Plan(plan, "uniform"))


@torch.no_grad()
@pytest.mark.parametrize("family", [*SPLIT, STACKED])
def test_round_trip(family, tmp_path):
    """Zero points of INT6 and INT4 begin within words where the rows of a single matrix do."""
    model, ids = with_experts(family, QuantSpec(4, 16, False), QuantSpec(6, 16, False), QuantSpec(8, 32)), batch()
    klfast.save_quantized(model, tmp_path / "model", max_shard_size=30_000)
    loaded = klfast.load_quantized(tmp_path / "model")
    state, original = loaded.state_dict(), model.state_dict()
    assert list(state) == list(original) and all(torch.equal(state[name], tensor) for name, tensor in original.items())
    assert torch.equal(loaded(ids).logits, klfast.accelerate(model)(ids).logits)
    assert torch.equal(klfast.generate(loaded, ids, 8), klfast.generate(model, ids, 8))
    klfast.save_quantized(loaded, tmp_path / "again", max_shard_size=30_000)
    assert (tmp_path / "again" / "klfast.json").read_text() == (tmp_path / "model" / "klfast.json").read_text()


def test_names_in_files(tmp_path):
    klfast.save_quantized(with_experts("lfm2_moe", QuantSpec(4, 32)), tmp_path / "model")
    stored = load_file(tmp_path / "model" / "model.safetensors")
    experts = {name for name in stored if ".experts." in name}
    assert {name for name in experts if ".1." in name.partition("feed_forward")[0]} == {
        f"model.layers.1.feed_forward.experts.{i}.{name}.weight_{part}"
        for i in range(4)
        for name in ("w1", "w2", "w3")
        for part in ("packed", "scale", "shape")
    }
    assert stored["model.layers.1.feed_forward.experts.2.w2.weight_shape"].tolist() == [64, 32]
    config = json.loads((tmp_path / "model" / "config.json").read_text())["quantization_config"]
    assert [group["targets"] for group in config["config_groups"].values()] == [
        [rf"re:model\.layers\.{layer}\.feed_forward\.experts\.\d+\.({names})$" for layer in (1, 2)]
        for names in ("w1|w3", "w2")  # whose 32 inputs are one group
    ]
    klfast.save_quantized(with_experts(STACKED, QuantSpec(4, 32)), tmp_path / "stacked")
    stored = load_file(tmp_path / "stacked" / "model.safetensors")
    assert stored["model.layers.1.block_sparse_moe.experts.down_proj.weight_shape"].tolist() == [256, 96]


@torch.no_grad()
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("family", SPLIT)
def test_transformers_reads_experts_of_one_symmetric_spec(family, bits, tmp_path):
    """Whatever the specs of the other layers are, and without klfast's quantizer."""
    model, ids = with_experts(family, QuantSpec(bits, 16), others=QuantSpec(12 - bits, 8)), batch()
    klfast.save_quantized(model, tmp_path / "model")
    klfast.unregister_quantizer()
    try:
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    finally:
        klfast.register_quantizer()
    stacks = [name for name, one in matrices(theirs).items() if one.is_stack]
    assert len(stacks) >= 2
    for name in stacks:
        decompressed = matrices(model)[name].holder.quantized.dequantize()
        assert torch.equal(matrices(theirs)[name].weight, decompressed.float()), name
    expected = model(ids).logits
    assert (theirs(ids).logits - expected).abs().max() <= 1e-2 * expected.abs().max(), "it decompresses to float16"


@torch.no_grad()
def test_the_same_tokens_as_the_dequantized_model():
    model = tiny("qwen3_next")
    quantized = with_experts("qwen3_next", QuantSpec(4, 32))
    for name, one in matrices(quantized).items():
        if one.is_quantized:
            weight = one.holder.quantized.dequantize(torch.float32)
            matrices(model)[name].tensor.copy_(weight.view_as(matrices(model)[name].tensor))
    ids = batch(3, 9)
    expected, found = model(ids).logits, quantized(ids).logits
    assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()
    assert torch.equal(klfast.generate(quantized, ids, 16), klfast.generate(model, ids, 16))
    assert klfast.evaluate(quantized, ids, model).kl < 1e-9


@pytest.mark.parametrize(
    ("family", "specs"),
    [
        ("qwen3_next", ("int4-g16-sym", "int8-g16-sym")),
        ("nemotron_h_moe", ("int4-g16-asym",)),
        (STACKED, ("int4-g16-sym",)),
    ],
)
def test_what_transformers_would_misread_is_refused_where_klfast_has_no_kernels(family, specs, tmp_path, monkeypatch):
    klfast.save_quantized(with_experts(family, *map(QuantSpec.of, specs)), tmp_path / "model")
    monkeypatch.setattr(registry, "has_kernel", lambda *_: False)
    with pytest.raises(CheckpointError, match="several precisions, stacked, or with zero points") as caught:
        AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert "\n" not in str(caught.value)


def test_transformers_own_save_is_refused(tmp_path):
    model = with_experts("qwen3_next", QuantSpec(4, 32))
    with pytest.raises(InvalidInputError, match=r"0\.mlp\.experts holds quantized experts; use klfast\.save_quantized"):
        model.save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_damage(tmp_path):
    klfast.save_quantized(with_experts("lfm2_moe", QuantSpec(4, 32, False)), tmp_path / "model")
    file, manifest = tmp_path / "model" / "model.safetensors", tmp_path / "model" / "klfast.json"
    tensors, facts = load_file(file), json.loads(manifest.read_text())
    expert = "model.layers.1.feed_forward.experts"
    for change, message in (
        ({f"{expert}.2.w3.weight_scale": None}, rf"lacks the tensor {expert}\.2\.w3\.weight_scale"),
        ({f"{expert}.2.w1.weight_shape": None}, rf"{expert}\.gate_up_proj\.weight_shape is not \[256, 64\]"),
        (
            {f"{expert}.1.w2.weight_packed": torch.zeros(3, 4, dtype=torch.int32)},
            rf"{expert}\.1\.w2 do not fit: packed",
        ),
        ({f"{expert}.4.w1.weight_shape": torch.tensor([32, 64])}, rf"lacks the tensor {expert}\.4\.w1\.weight_packed"),
        ({f"{expert}.5.w1.weight_shape": torch.tensor([32, 64])}, "1 tensors that the model does not have"),
    ):
        changed = {name: tensor for name, tensor in (tensors | change).items() if tensor is not None}
        save_file(changed, file, metadata={"format": "pt"})
        sign(tmp_path / "model")
        refused(tmp_path / "model", message)
    save_file(tensors, file, metadata={"format": "pt"})
    for experts, message in (
        ([], "its experts have no names"),
        ({f"{expert}.down_proj": "w2"}, "its experts have no names"),
        ({f"{expert}.down_proj": ["w4"]}, rf"config\.json does not quantize {expert}\.down_proj"),
        ({}, "config.json quantizes re:.*which the model does not have"),
    ):
        manifest.write_text(json.dumps(facts | {"experts": experts}))
        sign(tmp_path / "model")
        refused(tmp_path / "model", message)
