"""Mixtures of experts in from_pretrained: packed matrices become klfast's stacks."""

import json

import compressed_folders
import pytest
import torch
from compressed_folders import weights
from safetensors.torch import load_file, save_file
from saved_models import quantized, sign
from tiny_models import CONFIGS, assert_no_further, batch, in_float64
from transformers import AutoModelForCausalLM

import klfast
from klfast import QuantLinear, errors
from klfast.models.matrices import matrices
from klfast.nn import QuantExperts

load = AutoModelForCausalLM.from_pretrained
MIXTURES = (
    *("granite_hybrid_moe", "qwen3_5_moe", "lfm2_moe", "nemotron_h_moe"),
    *("jamba_moe", "qwen3_next", "kimi_linear"),
)
PUBLISHED = {  # names of an expert's matrices, and those of other modules, in the makers' checkpoints
    "qwen3_next": dict(gate="gate_proj", up="up_proj", down="down_proj"),
    "lfm2_moe": dict(gate="w1", up="w3", down="w2"),
    "kimi_linear": dict(
        **dict(gate="w1", up="w3", down="w2"), rename=lambda name: name.replace(".1.mlp.", ".1.block_sparse_moe.")
    ),
    "nemotron_h_moe": dict(
        **dict(gate=None, up="up_proj", down="down_proj"), rename=lambda name: name.replace("model.", "backbone.")
    ),
}
pytestmark = pytest.mark.filterwarnings("ignore::klfast.SlowPathWarning")  # nemotron_h runs transformers' functions


def packed_stacks(model):
    experts = [module for module in model.modules() if isinstance(module, QuantExperts)]
    return sum(isinstance(getattr(one, name), QuantLinear) for one in experts for name in one.stack_names)


def one_line(error):
    assert "\n" not in str(error.value)


@torch.no_grad()
@pytest.mark.parametrize("family", MIXTURES)
def test_klfasts_folder_gives_the_bits_of_load_quantized(family, tmp_path):
    """Specs of 4, 6 and 8 bits, with and without zero points, in shards that separate an expert's tensors."""
    klfast.save_quantized(quantized(family), tmp_path / "model", max_shard_size=30_000)
    expected = klfast.load_quantized(tmp_path / "model")
    model, report = load(tmp_path / "model", output_loading_info=True)
    assert not any(report.values()) and packed_stacks(model) == packed_stacks(expected) >= 2
    state, ids = expected.state_dict(), batch()
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in state.items())
    assert torch.equal(klfast.accelerate(model)(ids).logits, expected(ids).logits)
    assert torch.equal(klfast.generate(model, ids, 6), klfast.generate(expected, ids, 6))


@torch.no_grad()
def test_zero_points_that_begin_within_words(tmp_path):
    """36 rows of an expert's gate fill four and a half words of INT4 zero points."""
    config = CONFIGS["qwen3_next"]()
    config.moe_intermediate_size = 36
    config.eos_token_id = config.bos_token_id = config.pad_token_id = None
    model = AutoModelForCausalLM.from_config(config).eval()
    plan = {name: klfast.QuantSpec(4, -1, False) for name, one in matrices(model).items() if one.is_stack}
    klfast.quantize_model(model, klfast.Plan(plan, "uniform"))
    klfast.save_quantized(model, tmp_path / "model")
    found = matrices(load(tmp_path / "model"))
    for name in plan:
        weight = matrices(model)[name].holder.quantized.dequantize()
        assert torch.equal(found[name].holder.quantized.dequantize(), weight), name


@torch.no_grad()
def test_experts_in_full_precision_beside_packed_ones(tmp_path):
    model = quantized("qwen3_next", experts=False)
    stack = next(name for name, one in matrices(model).items() if one.is_stack)
    klfast.quantize_model(model, klfast.Plan({stack: klfast.QuantSpec(4, 16)}, "uniform"))
    klfast.save_quantized(model, tmp_path / "model")
    found = load(tmp_path / "model")
    assert packed_stacks(found) == 1
    assert torch.equal(klfast.accelerate(found)(batch()).logits, model(batch()).logits)


@torch.no_grad()
@pytest.mark.parametrize(("bits", "symmetric", "group_size"), [(4, True, 4), (4, False, None), (8, False, 4)])
@pytest.mark.parametrize("family", PUBLISHED)
def test_others_folder_gives_what_it_decompresses_to(family, bits, symmetric, group_size, tmp_path):
    group = weights(bits, symmetric, group_size)
    dense = compressed_folders.save_mixture(tmp_path, family, **PUBLISHED[family], weights=group)
    model = klfast.load_model(tmp_path)
    stacks = [name for name, one in matrices(dense).items() if one.is_stack]
    assert packed_stacks(model) == len(stacks) >= 2
    for name, one in matrices(model).items():
        if one.is_quantized:
            assert torch.equal(one.holder.quantized.dequantize(), matrices(dense)[name].weight), name
    ids = batch()
    found, own, truth = (each(ids).logits for each in (model, dense, in_float64(dense)))
    assert_no_further(found, own, truth)
    assert torch.equal(klfast.generate(model, ids, 8), klfast.generate(dense, ids, 8))


@pytest.fixture
def mixture(tmp_path):
    compressed_folders.save_mixture(tmp_path, "lfm2_moe", **PUBLISHED["lfm2_moe"], weights=weights(4, True, 16))
    return tmp_path


EXPERTS = "model.layers.1.feed_forward.experts"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({f"{EXPERTS}.2.w3.weight_scale": None}, rf"lacks the tensor {EXPERTS}\.2\.w3\.weight_scale; fetch or save"),
        ({f"{EXPERTS}.3.w1.weight_packed": None}, rf"lacks the tensor {EXPERTS}\.3\.w1\.weight_packed; fetch or save"),
        ({f"{EXPERTS}.1.w2.weight_scale": torch.ones(64, 1)}, rf"{EXPERTS}\.1\.w2 do not fit: scale must have shape"),
        (
            {f"{EXPERTS}.1.w2.weight_zero_point": torch.zeros(8, 2, dtype=torch.int32)},
            rf"does not know experts with the matrix {EXPERTS}\.1\.w2, or its spec",
        ),
    ],
    ids=["scale", "packed", "shape", "zero point"],
)
def test_damage_is_told_in_one_line(change, message, mixture):
    tensors = load_file(mixture / "model.safetensors") | change
    kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    save_file(kept, mixture / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(errors.CheckpointError, match=message) as caught:
        klfast.load_model(mixture)
    one_line(caught)


def test_a_damaged_expert_in_klfasts_folder(tmp_path):
    klfast.save_quantized(quantized("qwen3_next"), tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.0.mlp.experts.2.up_proj.weight_scale"]
    save_file(tensors, file, metadata={"format": "pt"})
    sign(tmp_path / "model")
    with pytest.raises(errors.CheckpointError, match=r"lacks the tensor .*experts\.2\.up_proj\.weight_scale") as caught:
        load(tmp_path / "model")
    one_line(caught)


def test_several_specs_in_a_stack_are_refused(mixture):
    config = json.loads((mixture / "config.json").read_text())
    groups = config["quantization_config"]["config_groups"]
    groups["group_1"] = json.loads(json.dumps(groups["group_0"])) | {"targets": [r"re:.*experts\.\d+\.w3$"]}
    groups["group_1"]["weights"]["num_bits"] = 8
    (mixture / "config.json").write_text(json.dumps(config))
    with pytest.raises(errors.CheckpointError, match=r"the matrices of .*gate_up_proj have several specs") as caught:
        klfast.load_model(mixture)
    one_line(caught)
