"""Folders in the format of the package mamba_ssm: the logits of its formulas, in float64, and damaged folders."""

import json
import math
import os
import pickle
from inspect import signature

import pytest
import torch
import torch.nn.functional as F
from model_folders import refused
from transformers.models.mamba2.modeling_mamba2 import MambaRMSNormGated

import klfast
from klfast.acceleration.patch import is_accelerated
from klfast.core.errors import CheckpointError

VOCABULARY, PADDED, WIDTH, LAYERS = 45, 48, 24, 2
MAMBA = {"d_state": 5, "d_conv": 3, "expand": 3, "dt_rank": 4, "bias": True}
MAMBA2 = {"layer": "Mamba2", "d_state": 10, "headdim": 8, "ngroups": 3, "chunk_size": 4, "dt_limit": [0.02, 0.5]}
ONE_GROUP = {**MAMBA2, "ngroups": 1}
KINDS = {"mamba": MAMBA, "mamba defaults": {}, "mamba2": MAMBA2, "mamba2 one group": ONE_GROUP}


def configuration(mixer, **entries):
    return {
        "d_model": WIDTH,
        "n_layer": LAYERS,
        "vocab_size": VOCABULARY,
        "ssm_cfg": mixer,
        "rms_norm": True,
        "residual_in_fp32": True,
        "fused_add_norm": True,
        "pad_vocab_size_multiple": 16,
        **entries,
    }


def shapes(mixer):
    """Return the tensors of a mixer, as mamba_ssm makes them."""
    inner, state, width = mixer.get("expand", 2) * WIDTH, mixer.get("d_state", 16), mixer.get("d_conv", 4)
    if mixer.get("layer") == "Mamba2":
        heads, both = inner // mixer["headdim"], 2 * mixer["ngroups"] * state
        own = {"in_proj.weight": (2 * inner + both + heads, WIDTH), "norm.weight": (inner,), "dt_bias": (heads,)}
        own |= {"A_log": (heads,), "D": (heads,)}
        channels = inner + both
    else:
        rank, channels = mixer.get("dt_rank", math.ceil(WIDTH / 16)), inner
        own = {"in_proj.weight": (2 * inner, WIDTH), "x_proj.weight": (rank + 2 * state, inner), "D": (inner,)}
        own |= {"dt_proj.weight": (inner, rank), "dt_proj.bias": (inner,), "A_log": (inner, state)}
    if mixer.get("bias"):
        own |= {"in_proj.bias": (2 * inner,), "out_proj.bias": (WIDTH,)}
    conv = {"conv1d.weight": (channels, 1, width), "conv1d.bias": (channels,)}
    return {**own, **conv, "out_proj.weight": (WIDTH, inner)}


def write(folder, mixer, dtype=torch.float32, tied=True, **entries):
    """Write a folder with random weights; return them."""
    torch.manual_seed(7)
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(configuration(mixer, tie_embeddings=tied, **entries)))
    names = {"backbone.embedding.weight": (PADDED, WIDTH), "backbone.norm_f.weight": (WIDTH,)}
    for i in range(LAYERS):
        names[f"backbone.layers.{i}.norm.weight"] = (WIDTH,)
        names |= {f"backbone.layers.{i}.mixer.{name}": shape for name, shape in shapes(mixer).items()}
    weights = {name: torch.randn(shape) * 0.3 for name, shape in names.items()}
    weights = {name: (tensor + (1 if "norm" in name else 0)).to(dtype) for name, tensor in weights.items()}
    head = weights["backbone.embedding.weight"] if tied else torch.randn(PADDED, WIDTH).to(dtype)
    weights["lm_head.weight"] = head
    torch.save(weights, folder / "pytorch_model.bin")
    return weights


def norm(x, weight, eps=1e-5):
    return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * weight


def conv(x, w):
    """Convolve [T, C] with the channels' own filters, causally."""
    weight = w["conv1d.weight"][:, 0]
    padded = F.pad(x, (0, 0, weight.shape[1] - 1, 0))
    taps = sum(padded[i : i + len(x)] * weight[:, i] for i in range(weight.shape[1]))
    return F.silu(taps + w["conv1d.bias"])


def mamba(x, w):
    inner, state = w["A_log"].shape
    x, z = F.linear(x, w["in_proj.weight"], w.get("in_proj.bias")).split(inner, -1)
    x = conv(x, w)
    dt, b, c = (x @ w["x_proj.weight"].T).split([w["dt_proj.weight"].shape[1], state, state], -1)
    dt = F.softplus(dt @ w["dt_proj.weight"].T + w["dt_proj.bias"])
    h, rows = torch.zeros(inner, state).double(), []
    for t in range(len(x)):
        h = h * torch.exp(dt[t][:, None] * -w["A_log"].exp()) + (dt[t] * x[t])[:, None] * b[t]
        rows.append(h @ c[t] + w["D"] * x[t])
    return F.linear(torch.stack(rows) * F.silu(z), w["out_proj.weight"], w.get("out_proj.bias"))


def mamba2(x, w, mixer):
    groups, state, heads = mixer["ngroups"], mixer["d_state"], len(w["A_log"])
    inner = w["norm.weight"].numel()
    z, xbc, dt = (x @ w["in_proj.weight"].T).split([inner, inner + 2 * groups * state, heads], -1)
    x, b, c = conv(xbc, w).split([inner, groups * state, groups * state], -1)
    x = x.view(len(x), heads, -1)
    b, c = (each.view(len(x), groups, state).repeat_interleave(heads // groups, 1) for each in (b, c))
    dt = F.softplus(dt + w["dt_bias"]).clamp(*mixer["dt_limit"])
    h, rows = torch.zeros(heads, x.shape[2], state).double(), []
    for t in range(len(x)):
        h = h * torch.exp(dt[t] * -w["A_log"].exp())[:, None, None]
        h = h + (dt[t][:, None] * x[t])[:, :, None] * b[t][:, None]
        rows.append((h * c[t][:, None]).sum(-1) + w["D"][:, None] * x[t])
    y = torch.stack(rows).flatten(1) * F.silu(z)
    one = torch.ones(inner // groups)
    y = norm(y.view(len(y), groups, -1), one).flatten(1) * w["norm.weight"]
    return y @ w["out_proj.weight"].T


def logits(weights, mixer, ids):
    weights = {name: tensor.double() for name, tensor in weights.items()}
    x = weights["backbone.embedding.weight"][ids]
    for i in range(LAYERS):
        prefix = f"backbone.layers.{i}."
        w = {
            name.removeprefix(f"{prefix}mixer."): tensor for name, tensor in weights.items() if name.startswith(prefix)
        }
        normed = norm(x, weights[f"{prefix}norm.weight"])
        x = x + (mamba2(normed, w, mixer) if mixer.get("layer") == "Mamba2" else mamba(normed, w))
    return norm(x, weights["backbone.norm_f.weight"]) @ weights["lm_head.weight"].T


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_logits(tmp_path, kind, tied):
    mixer = KINDS[kind]
    weights = write(tmp_path / "m", mixer, tied=tied)
    if mixer is MAMBA2 and "group_size" not in signature(MambaRMSNormGated).parameters:  # transformers 5.17
        refused(tmp_path / "m", "does not normalize the 3 groups of a Mamba2 one by one, as mamba_ssm does; a newer")
        return
    model = klfast.load_model(tmp_path / "m")
    ids = torch.arange(0, 33, 3)
    with torch.no_grad():
        found = model(ids[None]).logits[0]
    assert found.shape == (11, PADDED) and not model.training
    torch.testing.assert_close(found.double(), logits(weights, mixer, ids), rtol=1e-4, atol=1e-4)
    assert is_accelerated(model.backbone.layers[0].mixer) and all(p.requires_grad for p in model.parameters())
    assert (model.lm_head.weight is model.backbone.embeddings.weight) == tied
    assert model.generation_config.eos_token_id == 0


def test_dtypes(tmp_path):
    weights = write(tmp_path / "m", MAMBA, torch.float16)
    for dtype, expected in (("auto", torch.float16), ("bfloat16", torch.bfloat16)):
        model = klfast.load_model(tmp_path / "m", dtype)
        assert {p.dtype for p in model.parameters()} == {expected}
    assert torch.equal(
        klfast.load_model(tmp_path / "m").backbone.norm_f.weight, weights["backbone.norm_f.weight"].float()
    )


def test_the_whole_pipeline(tmp_path):
    write(tmp_path / "m", ONE_GROUP)
    model = klfast.load_model(tmp_path / "m")
    found = klfast.sweep(model, [torch.arange(20)[None]], specs=["int4-g8-sym"], layers=["in_proj"])
    klfast.save_quantized(klfast.quantize_model(model, klfast.plan(found, mean_bits=16)), tmp_path / "small")
    assert klfast.load_model(tmp_path / "small").config.model_type == "mamba2"


class Evil:
    def __reduce__(self):
        return os.mkdir, ("unpickled",)


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ({"a": Evil()}, "is damaged, or holds more than tensors, which klfast does not unpickle; fetch it again"),
        ([torch.ones(2)], "holds no tensors by name; fetch it again"),
        ({}, "holds no tensors by name"),
        ({"a": 3}, "holds something other than tensors by name"),
        ({"a": torch.ones(2)}, r"lacks the tensor backbone\.\S+; fetch it again"),
    ],
)
@pytest.mark.parametrize(
    "save", [torch.save, lambda content, path: path.write_bytes(pickle.dumps(content, protocol=2))]
)
def test_other_content(tmp_path, monkeypatch, content, match, save):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "m", MAMBA)
    save(content, tmp_path / "m" / "pytorch_model.bin")
    refused(tmp_path / "m", match if save is torch.save else r"pytorch_model\.bin is damaged, or holds")
    assert not (tmp_path / "unpickled").exists()


def test_damaged_weights(tmp_path):
    weights = write(tmp_path / "m", MAMBA)
    path = tmp_path / "m" / "pytorch_model.bin"
    whole = path.read_bytes()
    for kept in (0, 10, len(whole) // 2, len(whole) - 30):
        path.write_bytes(whole[:kept])
        refused(tmp_path / "m", r"pytorch_model\.bin is damaged")
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n")
    refused(tmp_path / "m", r"pytorch_model\.bin: it is a pointer of git-lfs, not the file itself; run `git lfs pull`")
    path.unlink()
    refused(tmp_path / "m", r"has no weights: pytorch_model\.bin is missing; fetch it again")
    name = "backbone.layers.1.mixer.x_proj.weight"
    for tensor, match in (
        (torch.ones(3, 72), rf"{name} must have shape \[14, 72\], got \[3, 72\]; fetch it again"),
        (torch.ones(1).expand(10**6, 10**6), r"must have shape \[14, 72\], got \[1000000, 1000000\]"),
        (torch.ones(14, 72, dtype=torch.int8), rf"{name} must have a dtype like torch.float32, got torch.int8"),
    ):
        torch.save({**weights, name: tensor}, path)
        refused(tmp_path / "m", match)
    torch.save({**weights, "extra": torch.ones(1)}, path)
    refused(tmp_path / "m", r"holds 1 tensors that the model does not have, such as extra; fetch it again")


@pytest.mark.parametrize(
    ("entries", "match"),
    [
        (
            {"attn_layer_idx": [1]},
            r"neither transformers' Mamba nor its Mamba2 has attn_layer_idx = \[1\] of mamba_ssm",
        ),
        ({"d_intermediate": 64}, "has d_intermediate = 64"),
        ({"rms_norm": False}, "has rms_norm = False"),
        ({"ssm_cfg": {"layer": "Mamba3"}}, "does not know the layer 'Mamba3' of mamba_ssm"),
        ({"ssm_cfg": {**MAMBA2, "norm_before_gate": True}}, r"has ssm_cfg\.norm_before_gate = True"),
        ({"ssm_cfg": {**MAMBA2, "D_has_hdim": True}}, r"has ssm_cfg\.D_has_hdim = True"),
        ({"ssm_cfg": {"headdim": 8}}, r"has ssm_cfg\.headdim = 8"),
        ({"bidirectional": True}, "has bidirectional = True"),
        ({"ssm_cfg": [1]}, "does not describe a model"),
        ({"n_layer": 10**12}, r"describes a far larger model than the \d+ tensors stored"),
        ({"n_layer": "two"}, "does not describe a model that this transformers can build"),
        ({"n_layer": 3}, r"lacks the tensor backbone\.layers\.2"),
        ({"d_model": 10**6}, r"must have shape .*; fetch it again"),
        ({"pad_vocab_size_multiple": 0}, "does not describe a model"),
        ({"vocab_size": 49}, r"backbone\.embeddings\.weight must have shape \[64, 24\], got \[48, 24\]"),
        ({"ssm_cfg": {**MAMBA2, "dt_limit": [3, "x"]}}, "time_step_limit must be two numbers|does not describe"),
    ],
)
def test_other_configurations(tmp_path, entries, match):
    write(tmp_path / "m", MAMBA)
    (tmp_path / "m" / "config.json").write_text(json.dumps(configuration(MAMBA) | entries))
    refused(tmp_path / "m", match)


def test_harmless_entries(tmp_path):
    ssm = {**MAMBA, "dt_min": 0.01, "use_fast_path": False}
    write(tmp_path / "m", ssm, d_intermediate=0, attn_layer_idx=[], attn_cfg={}, torch_dtype="float32")
    assert klfast.load_model(tmp_path / "m").config.state_size == 5


def test_without_a_tokenizer(tmp_path):
    write(tmp_path / "m", MAMBA)
    with pytest.raises(CheckpointError, match="has no tokenizer; copy the model's tokenizer files into it"):
        klfast.load_tokenizer(tmp_path / "m")
