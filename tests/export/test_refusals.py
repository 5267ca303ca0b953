"""What GGUF cannot hold: one line that says so, and no file."""

import gguf
import pytest
import tiny_models
import torch
from exported_models import FAMILIES, exportable, quantized

import klfast
from klfast.export.gguf.tensor_types import tensor_types
from klfast.export.gguf.write import export_gguf


def refused(model, path, match, **options):
    with pytest.raises(klfast.InvalidInputError, match=match) as caught:
        export_gguf(model, path / "m.gguf", **options)
    assert "\n" not in str(caught.value) and not list(path.iterdir())


@pytest.mark.parametrize(
    ("family", "match"),
    [
        ("hymba", "klfast writes no GGUF file of hymba, only of bamba, falcon_h1, "),
        ("mamba", r"no place for backbone\.layers\.0\.mixer\.in_proj\.bias"),
        ("mistral", "attends to a whole text, this model to 6 tokens"),
        ("falcon_h1_norm", "norms after the gate"),
        ("qwen3_5", "keys and values of one width, this model 12 and 20"),
        ("smollm3", "no rotary embeddings in each fourth layer"),
    ],
)
def test_what_llama_cpp_lacks(tmp_path, family, match):
    refused(tiny_models.tiny(family), tmp_path, match)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"time_step_limit": (0.01, 0.1)}, "does not clamp time steps, this model does, to 0.01 to 0.1"),
        ({"use_conv_bias": False}, "needs a bias in convolutions"),
    ],
)
def test_constants_that_llama_cpp_lacks(tmp_path, change, match):
    model = exportable("mamba2")
    for name, value in change.items():
        setattr(model.config, name, value)
    refused(model, tmp_path, match)


@pytest.mark.parametrize(
    ("family", "change", "match"),
    [
        ("nemotron_h_moe", {"n_group": 2}, "all experts in one group, this model has 2"),
        ("nemotron_h_moe", {"layers_block_type": ["mlp", "moe", "mamba"]}, "experts in all of its MLPs"),
        ("lfm2_moe", {"routed_scaling_factor": 2.0}, "weights of experts that add up to one"),
        ("lfm2_moe", {"use_expert_bias": False}, "needs a bias of the router"),
    ],
)
def test_routers_that_llama_cpp_lacks(tmp_path, family, change, match):
    model = exportable(family)
    for name, value in change.items():
        setattr(model.config, name, value)
    refused(model, tmp_path, match)


@pytest.mark.parametrize("family", FAMILIES)
def test_activations_that_llama_cpp_does_not_compute(tmp_path, family):
    model = exportable(family)
    settings = [name for name in ("hidden_act", "mamba_hidden_act", "mlp_hidden_act") if hasattr(model.config, name)]
    assert settings or family.startswith("lfm2")  # which has no choice
    for setting in settings:
        right = getattr(model.config, setting)
        setattr(model.config, setting, "gelu")
        refused(model, tmp_path, f"computes {right} for {setting}, this model gelu; nothing is written")
        setattr(model.config, setting, right)
    model.config.hidden_act = "swish" if "hidden_act" in settings else "gelu"  # silu's other name; nobody reads it
    export_gguf(model, tmp_path / "m.gguf")


def test_rotary_embeddings(tmp_path):
    model = exportable("qwen3")
    model.config.rope_parameters = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}
    refused(model, tmp_path, "rotary embeddings default or linear, this model has yarn")


def test_groups_without_a_type(tmp_path):
    model = quantized(exportable("mamba"), ["int4-g16-sym"])
    refused(model, tmp_path, r"holds backbone\.layers\.0\.mixer\.in_proj \(groups of 16\), .* and \d more; .*--regroup")
    model = quantized(exportable("mamba"), ["int4-g16-sym", "int8-g32-asym"])
    refused(model, tmp_path, r"x_proj \(zero points of 8 bits\)")
    written = export_gguf(model, tmp_path / "m.gguf", regroup=True)
    assert written.kinds["Q4_0"] == 4 and written.kinds["Q8_0"] == 3
    said = "4 layers (backbone.layers.0.mixer.in_proj.weight ...) with groups of 16 are rounded anew to Q4_0"
    assert said in written.notes


def test_corrected_rows(tmp_path):
    model = exportable("mamba2")
    plan = {"lm_head": "int4-g32-sym+20", "backbone.layers.0.mixer.in_proj": "int4-g32-sym+2:4"}
    klfast.quantize_model(model, klfast.Plan(plan, "uniform"))
    refused(model, tmp_path, r"holds .*0\.mixer\.in_proj \(corrected rows\), lm_head \(corrected rows\); ")
    written = export_gguf(model, tmp_path / "m.gguf", regroup=True)
    assert "2 layers (backbone.layers.0.mixer.in_proj.weight ...) with corrected rows are rounded anew to Q8_0" in (
        written.notes
    )


def test_rows_that_are_not_whole_blocks(tmp_path):
    model = exportable("mamba")
    klfast.quantize_model(model, klfast.Plan({"backbone.layers.0.mixer.dt_proj": "int4-channel-sym"}, "uniform"))
    written = export_gguf(model, tmp_path / "m.gguf")
    assert written.kinds["F16"] == 1
    assert written.notes[0] == "backbone.layers.0.mixer.dt_proj.weight with groups of 4 is F16"


@pytest.mark.parametrize("spec", ["int4-g32-sym", "int4-g32-asym", "int8-g32-asym"])
def test_rows_whose_last_group_is_shorter_than_a_block(tmp_path, spec):
    model = exportable("granite_hybrid")
    layer = "model.layers.0.shared_mlp.output_linear"
    assert model.get_submodule(layer).weight.shape[1] == 48
    klfast.quantize_model(model, klfast.Plan({layer: spec}, "uniform"))
    written = export_gguf(model, tmp_path / "m.gguf")
    assert written.kinds["F16"] == 1 and any(f"{layer}.weight with" in note for note in written.notes)
    one = next(one for one in gguf.GGUFReader(tmp_path / "m.gguf").tensors if one.name == "blk.0.ffn_down.weight")
    assert torch.equal(torch.from_numpy(one.data.copy()), model.get_submodule(layer).quantized.dequantize().half())
    assert r"^blk\.0\.ffn_down\.weight$=f16" in tensor_types(model).splitlines()


@pytest.mark.parametrize("scale_dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("size", [3e-5, 1e-12, 1e-24])
def test_scales_below_float16(tmp_path, scale_dtype, size):
    model, layer = exportable("llama"), "model.layers.0.mlp.up_proj"
    weight = model.get_submodule(layer).weight.detach()
    weight[3] *= size  # one row suffices
    qt = klfast.quantize(weight, "int8-g32-sym", scale_dtype=scale_dtype)
    model.set_submodule(layer, klfast.QuantLinear(qt))
    refused(model, tmp_path, rf"{layer}\.weight: scales of a row are too small for float16")


def test_scales_that_float16_holds_as_well_as_any(tmp_path):
    model, layer = exportable("llama"), "model.layers.0.mlp.up_proj"
    weight = model.get_submodule(layer).weight.detach()
    weight[3] = 0
    weight[5, :32] *= 1e-5  # of no weight beside the row's others
    qt = klfast.quantize(weight, "int8-g32-sym", scale_dtype=torch.float32)
    model.set_submodule(layer, klfast.QuantLinear(qt))
    written = export_gguf(model, tmp_path / "m.gguf")
    one = next(one for one in gguf.GGUFReader(tmp_path / "m.gguf").tensors if one.name == "blk.0.ffn_up.weight")
    assert not any("scales" in note for note in written.notes)
    error = torch.from_numpy(gguf.quants.dequantize(one.data, one.tensor_type).copy()) - qt.dequantize(torch.float32)
    assert error.abs().max() > 0 and (error.norm(dim=1) <= 2**-10 * weight.norm(dim=1)).all()


def test_scales_that_float16_holds_coarsely(tmp_path):
    model, layer = exportable("llama"), "model.layers.0.mlp.up_proj"
    weight = model.get_submodule(layer).weight.detach()
    weight[3] *= 1e-2
    model.set_submodule(layer, klfast.QuantLinear(klfast.quantize(weight, "int8-g32-sym", scale_dtype=torch.float32)))
    [note] = [note for note in export_gguf(model, tmp_path / "m.gguf").notes if "scales" in note]
    qt = model.get_submodule(layer).quantized
    codes = (qt.dequantize(torch.float32) / qt.scale.repeat_interleave(32, 1))[3].view(-1, 32).abs().amax(1).round()
    scale = qt.scale[3].double()
    loss = ((scale.half() - scale) * codes).norm() / (scale * codes).norm()
    said = f"scales are below float16's normal numbers, which changes a row by up to {loss:.2g} of its norm"
    assert 2**-11 < loss < 2**-4 and note == f"{layer}.weight: {said}"


def test_a_scale_beyond_float16(tmp_path):
    model = quantized(exportable("falcon_h1"), ["int8-g32-sym"])
    model.config.ssm_out_multiplier = 1e9
    refused(model, tmp_path, r"layers\.0\.mamba\.out_proj\.weight: a scale is beyond float16")


def test_types_for_llama_quantize():
    model = quantized(exportable("qwen3", tied=True), ["int4-g64-sym", "int8-g32-sym", "int4-g16-sym"])
    lines = tensor_types(model.to(torch.bfloat16)).splitlines()
    assert r"^blk\.0\.attn_q\.weight$=q4_0" in lines and r"^blk\.0\.attn_k\.weight$=q8_0" in lines
    assert not any("norm" in line for line in lines) and len(lines) == 15
