"""GGUF files: each tensor in the file is the model's, and quantized ones have its codes."""

import gguf
import numpy as np
import pytest
import torch
from exported_models import EXACT, FAMILIES, exportable, quantized

import klfast
from klfast.export.gguf.write import export_gguf


def tensors(path):
    return {one.name: one for one in gguf.GGUFReader(path).tensors}


def values(one):
    return torch.from_numpy(gguf.quants.dequantize(one.data, one.tensor_type).copy())


def fields(path):
    found = gguf.GGUFReader(path).fields
    return {name.partition(".")[2]: field.contents() for name, field in found.items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_weight_is_written_once(tmp_path, family):
    model = exportable(family)
    written = export_gguf(model, tmp_path / "m.gguf")
    found = tensors(tmp_path / "m.gguf")
    assert sum(int(np.prod(one.shape)) for one in found.values()) == sum(
        one.numel() for one in model.state_dict().values()
    )
    assert written.kinds == {"F32": len(found)}
    tied = export_gguf(exportable(family, tied=True), tmp_path / "m.gguf")
    is_one = "output.weight" not in tensors(tmp_path / "m.gguf")
    assert (
        is_one == (family not in ("nemotron_h", "nemotron_h_moe", "falcon_h1"))
        and sum(tied.kinds.values()) == len(found) - is_one
    )


@pytest.mark.parametrize("spec", EXACT)
def test_codes_are_the_models(tmp_path, spec):
    model = quantized(exportable("mamba", tied=True), [spec])
    written = export_gguf(model, tmp_path / "m.gguf")
    found = tensors(tmp_path / "m.gguf")
    kind = {"int4-g32-asym": "Q4_1", "int4-g32-sym": "Q4_0", "int4-channel-sym": "Q4_0"}.get(spec, "Q8_0")
    assert written.kinds[kind] == 7 and not written.notes[1:]
    pairs = {"token_embd": model.lm_head} | {
        f"blk.{i}.{name}": getattr(block.mixer, layer)
        for i, block in enumerate(model.backbone.layers)
        for name, layer in {"ssm_in": "in_proj", "ssm_x": "x_proj", "ssm_out": "out_proj"}.items()
    }
    for name, layer in pairs.items():
        one, qt = found[f"{name}.weight"], layer.quantized
        assert one.tensor_type.name == kind
        slack = 2**-11 * qt.scale.float().max() * 15 if kind == "Q4_1" else 0  # minima in float16
        assert (values(one) - qt.dequantize(torch.float32)).abs().max() <= slack


def test_sixteen_bits_stay(tmp_path):
    for dtype in (torch.bfloat16, torch.float16):
        model = exportable("llama").to(dtype)
        assert export_gguf(model, tmp_path / "m.gguf").kinds == {
            str({torch.bfloat16: "BF16"}.get(dtype, "F16")): 16,
            "F32": 5,
        }
        found = values(tensors(tmp_path / "m.gguf")["blk.1.ffn_up.weight"])
        assert torch.equal(found.to(dtype), model.model.layers[1].mlp.up_proj.weight)


def test_falcons_multipliers(tmp_path):
    model = quantized(exportable("falcon_h1"), ["int8-g32-sym"])
    export_gguf(model, tmp_path / "m.gguf")
    found, config = tensors(tmp_path / "m.gguf"), model.config
    weight = model.model.layers[0].mamba.in_proj.quantized.dequantize(torch.float32)
    z, x, b, c, dt = (one * config.ssm_in_multiplier for one in weight.split([128, 128, 32, 32, 8]))
    parts = [factor * one for factor, one in zip(config.ssm_multipliers, (z, x, b, c, dt), strict=True)]
    torch.testing.assert_close(values(found["blk.0.ssm_in.weight"]), torch.cat(parts), rtol=1e-3, atol=1e-6)
    key = model.model.layers[1].self_attn.k_proj.quantized.dequantize(torch.float32)
    expected = key * config.key_multiplier * config.attention_in_multiplier
    torch.testing.assert_close(values(found["blk.1.attn_k.weight"]), expected, rtol=1e-3, atol=1e-6)


def test_qwens_value_heads_come_in_turns(tmp_path):
    model = quantized(exportable("qwen3_5"), ["int4-g32-sym"])
    export_gguf(model, tmp_path / "m.gguf")
    found = tensors(tmp_path / "m.gguf")
    mixer = model.model.layers[0].linear_attn
    order = [key * 3 + turn for turn in range(3) for key in range(3)]  # nine heads of three keys
    out = mixer.out_proj.quantized.dequantize(torch.float32).view(64, 9, 32)[:, order].flatten(1)
    assert torch.equal(values(found["blk.0.ssm_out.weight"]), out)
    conv = mixer.conv1d.weight.detach().view(-1, 3)
    heads = conv[192:].view(9, 32, 3)[order].flatten(0, 1)
    assert torch.equal(values(found["blk.0.ssm_conv1d.weight"]), torch.cat((conv[:192], heads)))
    assert torch.equal(values(found["blk.0.ssm_a"]), -mixer.A_log.detach().exp()[order])


def test_what_each_layer_has(tmp_path):
    export_gguf(exportable("nemotron_h"), tmp_path / "m.gguf")
    found = fields(tmp_path / "m.gguf")
    assert found["feed_forward_length"] == [0, 0, 96, 0] and found["attention.head_count_kv"] == [0, 2, 0, 0]
    export_gguf(exportable("jamba"), tmp_path / "m.gguf")
    assert fields(tmp_path / "m.gguf")["attention.head_count_kv"] == [0, 2, 0]


@pytest.mark.parametrize("is_quantized", [False, True])
def test_experts_lie_side_by_side(tmp_path, is_quantized):
    model = exportable("jamba_moe")
    if is_quantized:
        quantized(model, ["int4-g32-sym", "int8-g32-sym"])
    export_gguf(model, tmp_path / "m.gguf")
    found, experts = tensors(tmp_path / "m.gguf"), model.model.layers[1].feed_forward.experts

    def stack(name):
        one = getattr(experts, name)
        dense = one.quantized.dequantize(torch.float32) if is_quantized else one.detach()
        return dense.view(experts.num_experts, -1, dense.shape[-1])

    for name, expected in zip(("gate", "up"), stack("gate_up_proj").chunk(2, 1), strict=True):
        assert torch.equal(values(found[f"blk.1.ffn_{name}_exps.weight"]), expected)
    assert torch.equal(values(found["blk.1.ffn_down_exps.weight"]), stack("down_proj"))
    assert fields(tmp_path / "m.gguf")["feed_forward_length"] == stack("down_proj").shape[-1]


def test_routers_stay_in_float32(tmp_path):
    export_gguf(exportable("granite_hybrid_moe").to(torch.bfloat16), tmp_path / "m.gguf")
    found = tensors(tmp_path / "m.gguf")
    assert found["blk.0.ffn_gate_inp.weight"].tensor_type.name == "F32"
    assert found["blk.0.ffn_up_exps.weight"].tensor_type.name == "BF16"


def test_bambas_rotary_pairs_are_neighbours_in_half_of_a_head(tmp_path):
    model = exportable("bamba")
    export_gguf(model, tmp_path / "m.gguf")
    heads = model.model.layers[1].self_attn.q_proj.weight.detach().view(4, 16, 64)
    order = [0, 4, 1, 5, 2, 6, 3, 7, *range(8, 16)]
    assert torch.equal(values(tensors(tmp_path / "m.gguf")["blk.1.attn_q.weight"]), heads[:, order].flatten(0, 1))


def test_rotary_frequencies_of_llama3(tmp_path):
    model = exportable("llama")
    rope = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    config = model.config
    config.rope_parameters = rope | {"original_max_position_embeddings": 64}
    slowed = type(model)(config).model.rotary_emb.inv_freq
    export_gguf(model, tmp_path / "m.gguf")
    plain = 1e4 ** (-torch.arange(8) / 8)
    torch.testing.assert_close(values(tensors(tmp_path / "m.gguf")["rope_freqs.weight"]), plain / slowed)


@pytest.mark.parametrize("family", ["mamba", "llama", "lfm2", "qwen2", "qwen3_5"])
def test_transformers_reads_the_same_model(tmp_path, family):
    model = quantized(exportable(family, tied=True), ["int4-g32-sym", "int8-g32-sym"])
    export_gguf(model, tmp_path / "m.gguf")
    found = klfast.load_model(tmp_path / "m.gguf")
    ids = torch.randint(0, 61, (2, 11))
    with torch.no_grad():
        torch.testing.assert_close(found(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-4)
    assert {str(m.spec) for m in found.modules() if isinstance(m, klfast.QuantLinear)} == {
        "int4-g32-sym",
        "int8-g32-sym",
    }
