"""Folders with experts of different precisions: what they hold, what klfast and transformers read, damage."""

import copy
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from saved_models import refused, sign
from split_experts import float64_of, mixed_plan
from tiny_models import batch, tiny
from transformers import AutoModelForCausalLM

import klfast
from klfast import Plan, QuantSpec
from klfast.core.errors import CheckpointError, InvalidInputError, UnknownLayerError
from klfast.models.expert_names import expert_name
from klfast.models.matrices import matrices, split_stacks
from klfast.models.sizes import total_bytes
from klfast.nn import QuantLinear

# Checkpoints with gate_proj, up_proj and down_proj; with w1, w3 and w2; without a gate; stacked.
FAMILIES = ("qwen3_next", "lfm2_moe", "nemotron_h_moe", "granite_hybrid_moe")
pytestmark = pytest.mark.filterwarnings("ignore::klfast.SlowPathWarning")  # nemotron_h runs transformers' functions


def mixed(family, dtype=torch.float32, **options):
    model = tiny(family, dtype=dtype)
    return klfast.quantize_model(model, mixed_plan(model, **options))


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_round_trip(family, dtype, tmp_path):
    model, ids = mixed(family, dtype, others="int8-g16-sym"), batch()
    stack = next(iter(split_stacks(model).values()))
    stack.roundings[0] = "gptq"
    klfast.save_quantized(model, tmp_path / "model", max_shard_size=30_000)
    loaded = klfast.load_quantized(tmp_path / "model")
    state, original = loaded.state_dict(), model.state_dict()
    assert list(state) == list(original) and all(torch.equal(state[name], tensor) for name, tensor in original.items())
    assert next(iter(split_stacks(loaded).values())).roundings == stack.roundings
    assert torch.equal(loaded(ids).logits, klfast.accelerate(model)(ids).logits)
    assert torch.equal(klfast.generate(loaded, ids, 8), klfast.generate(model, ids, 8))
    klfast.save_quantized(loaded, tmp_path / "again", max_shard_size=30_000)
    assert (tmp_path / "again" / "klfast.json").read_text() == (tmp_path / "model" / "klfast.json").read_text()
    assert total_bytes(loaded) == total_bytes(model)


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_computes_as_planned(family):
    model, ids = tiny(family), batch(3, 9)
    plan = mixed_plan(model)
    expected = float64_of(model, plan)(ids).logits
    found = klfast.quantize_model(model, plan)(ids).logits.double()
    assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_names_in_files(tmp_path):
    klfast.save_quantized(mixed("lfm2_moe"), tmp_path / "model")
    stored = load_file(tmp_path / "model" / "model.safetensors")
    of_layer = {name for name in stored if name.startswith("model.layers.1.feed_forward.experts.")}
    packed = {(0, "scale"), (0, "packed"), (0, "shape"), (3, "scale"), (3, "packed"), (3, "shape")}
    packed |= {(2, "scale"), (2, "packed"), (2, "shape"), (2, "zero_point")}
    assert of_layer == {
        f"model.layers.1.feed_forward.experts.{i}.{name}.weight{part}"
        for i, part in [(1, ""), *((i, f"_{part}") for i, part in packed)]
        for name in ("w1", "w2", "w3")
    }
    assert stored["model.layers.1.feed_forward.experts.2.w2.weight_shape"].tolist() == [64, 32]
    config = json.loads((tmp_path / "model" / "config.json").read_text())["quantization_config"]
    prefix = r"re:model\.layers\.1\.feed_forward\.experts"
    targets = [text for group in config["config_groups"].values() for text in group["targets"] if prefix in text]
    assert set(targets) == {
        rf"{prefix}\.({experts})\.({names})$" for experts in ("0|3", "2") for names in ("w1|w3", "w2")
    }
    assert rf"{prefix}\.(1)\.(w1|w3)$" in config["ignore"]
    klfast.save_quantized(mixed("granite_hybrid_moe"), tmp_path / "stacked")
    stored = load_file(tmp_path / "stacked" / "model.safetensors")
    experts = "model.layers.1.block_sparse_moe.experts"
    assert stored[f"{experts}.0.down_proj.weight_shape"].tolist() == [64, 96]
    assert f"{experts}.1.down_proj.weight" in stored and f"{experts}.down_proj.weight_packed" not in stored


@torch.no_grad()
def test_experts_with_one_spec_are_a_stack(tmp_path):
    one, other = tiny("lfm2_moe"), tiny("lfm2_moe")
    stacks = {name: one for name, one in matrices(one).items() if one.is_stack}
    klfast.quantize_model(one, mixed_plan(one, ["int4-g32-sym"]))
    klfast.quantize_model(other, Plan(dict.fromkeys(stacks, "int4-g32-sym"), "uniform"))
    for model, folder in ((one, "one"), (other, "other")):
        assert all(isinstance(matrices(model)[name].holder, QuantLinear) for name in stacks)
        klfast.save_quantized(model, tmp_path / folder)
    assert (tmp_path / "one" / "klfast.json").read_text() == (tmp_path / "other" / "klfast.json").read_text()


def test_plans_that_contradict_themselves():
    model = tiny("lfm2_moe")
    stack = next(name for name, one in matrices(model).items() if one.is_stack)
    expert = expert_name(stack, 2)
    before = copy.deepcopy(model.state_dict())
    for specs, activations, message in (
        ({stack: "int4-g32-sym", expert: "int8-g32-sym"}, {}, "int4-g32-sym for all of .* but int8-g32-sym for .*2;"),
        ({stack: "int4-g32-sym", expert: "int4-g32-sym"}, {expert: "int8"}, "int4-g32-sym with int8 activations for"),
        ({expert: QuantSpec(4, 32, corrected=8)}, {}, r"2 holds experts, whose rows cannot be corrected"),
    ):
        with pytest.raises(InvalidInputError, match=message) as caught:
            klfast.quantize_model(model, Plan(specs, "uniform", activations=activations))
        assert "\n" not in str(caught.value)
    for name in (expert_name(stack, 4), "model.layers.0.experts.down_proj.0"):
        with pytest.raises(UnknownLayerError, match="the model has no linear layer"):
            klfast.quantize_model(model, Plan({name: "int4-g32-sym"}, "uniform"))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    klfast.quantize_model(model, Plan({stack: "int4-g32-sym", expert: "int4-g32-sym"}, "uniform"))
    assert matrices(model)[stack].is_quantized
    with pytest.raises(InvalidInputError, match="is quantized already"):
        klfast.quantize_model(model, Plan({expert: "int4-g32-sym"}, "uniform"))


def test_damage(tmp_path):
    klfast.save_quantized(mixed("lfm2_moe"), tmp_path / "model")
    file, config = tmp_path / "model" / "model.safetensors", tmp_path / "model" / "config.json"
    tensors, described = load_file(file), json.loads(config.read_text())
    expert = "model.layers.1.feed_forward.experts"
    for change, message in (
        ({f"{expert}.2.w3.weight_scale": None}, rf"lacks the tensor {expert}\.2\.w3\.weight_scale"),
        ({f"{expert}.1.w3.weight": None}, rf"lacks the tensor {expert}\.1\.w3\.weight"),
        ({f"{expert}.1.w3.weight": torch.zeros(3, 64)}, rf"{expert}\.1\.w3\.weight must have shape \[32, 64\]"),
        ({f"{expert}.1.w2.weight": torch.zeros(64, 3)}, r"dense must have shape \[1, 64, 32\], got \[1, 64, 3\]"),
        ({f"{expert}.4.w1.weight": torch.zeros(32, 64)}, "2 tensors that the model does not have"),
    ):
        changed = {name: tensor for name, tensor in (tensors | change).items() if tensor is not None}
        save_file(changed, file, metadata={"format": "pt"})
        sign(tmp_path / "model")
        refused(tmp_path / "model", message)
    save_file(tensors, file, metadata={"format": "pt"})
    groups = described["quantization_config"]["config_groups"]
    for group in groups.values():
        group["targets"] = [text.replace("(2)", "(7)") for text in group["targets"]]
    config.write_text(json.dumps(described))
    sign(tmp_path / "model")
    refused(tmp_path / "model", rf"lacks the tensor {expert}\.7\.w1\.weight_shape")
    for group in groups.values():  # more digits than Python reads as a number
        group["targets"] = [text.replace("(7)", f"({'7' * 5000})") for text in group["targets"]]
    config.write_text(json.dumps(described))
    sign(tmp_path / "model")
    refused(tmp_path / "model", r"config\.json quantizes re:.{1,210}, which the model does not have")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("specs", [None, (None, "int4-g16-sym"), ("int4-g16-sym", None)])
def test_transformers_is_told_to_leave_it_to_klfast(family, specs, tmp_path):
    model = tiny(family)
    klfast.save_quantized(
        klfast.quantize_model(model, mixed_plan(model, specs) if specs else mixed_plan(model)), tmp_path / "m"
    )
    with pytest.raises(CheckpointError, match=r"experts of several precisions.*load it with klfast\.load_quantized"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "m")


def test_other_formats_refuse(tmp_path):
    model = mixed("lfm2_moe")
    with pytest.raises(InvalidInputError, match=r"different precisions, but a GGUF file has one type for all"):
        klfast.export_gguf(model, tmp_path / "m.gguf")
    with pytest.raises(InvalidInputError, match=r"experts holds quantized experts; use klfast\.save_quantized"):
        model.save_pretrained(tmp_path / "model")
    assert not any(tmp_path.iterdir())


def test_openvino_refuses(tmp_path):
    pytest.importorskip("openvino")
    from klfast.export.openvino.nncf import scopes
    from klfast.export.openvino.write import export_openvino

    model = mixed("lfm2_moe")
    with pytest.raises(InvalidInputError, match=r"different precisions, and OpenVINO"):
        export_openvino(model, tmp_path / "m")
    with pytest.raises(InvalidInputError, match=r"different precisions, which NNCF"):
        scopes(model)
