"""Hymba's configuration, tensor names and cache size; unsupported configurations."""

import json
import shutil

import pytest
import torch
from hymba_models import GOLDEN, SETS, golden_model, golden_tensors, tiny_model
from safetensors.torch import load_file, save_file
from tiny_models import HYMBA_RELEASE
from transformers import AutoConfig, AutoModelForCausalLM

from klfast.checkpoint.by_name import load_model
from klfast.core.errors import CheckpointError, InvalidInputError
from klfast.models.hymba import HymbaConfig, HymbaForCausalLM, state_bytes

pytestmark = pytest.mark.usefixtures("one_thread")
CONSUMERS = [2, 4, 6, 8, 10, 12, 14, 17, 18, 20, 22, 24, 26, 28, 30]


def released_shapes():
    """Return keys and shapes of nvidia/Hymba-1.5B-Base."""
    shapes = {
        "model.embed_tokens.weight": [32001, 1600],
        "lm_head.weight": [32001, 1600],
        "model.memory_tokens": [128, 1600],
        "model.final_layernorm.weight": [1600],
    }
    for i in range(32):
        layer = {
            "input_layernorm.weight": [1600],
            "mamba.in_proj.weight": [8000 if i in CONSUMERS else 8960, 1600],
            "mamba.conv1d.weight": [3200, 1, 4],
            "mamba.conv1d.bias": [3200],
            "mamba.x_proj.0.weight": [132, 3200],
            "mamba.dt_proj.0.weight": [3200, 100],
            "mamba.dt_proj.0.bias": [3200],
            "mamba.A_log.0": [3200, 16],
            "mamba.D.0": [3200],
            "mamba.dt_layernorm.weight": [100],
            "mamba.B_layernorm.weight": [16],
            "mamba.C_layernorm.weight": [16],
            "mamba.pre_avg_layernorm1.weight": [3200],
            "mamba.pre_avg_layernorm2.weight": [3200],
            "mamba.out_proj.weight": [1600, 3200],
            "pre_moe_layernorm.weight": [1600],
            "moe.experts.0.gate_proj.weight": [5504, 1600],
            "moe.experts.0.up_proj.weight": [5504, 1600],
            "moe.experts.0.down_proj.weight": [1600, 5504],
        }
        shapes |= {f"model.layers.{i}.{name}": shape for name, shape in layer.items()}
    return shapes


def test_released_size():
    with torch.device("meta"):
        model = HymbaForCausalLM(HymbaConfig())
    found = {name: list(t.shape) for name, t in model.state_dict().items()}
    assert found == released_shapes()
    assert len(found) - 1 == 611
    assert sum(p.numel() for p in model.parameters()) == 1_522_797_824
    assert model.lm_head.weight is model.model.embed_tokens.weight
    linears = [m for m in model.modules() if isinstance(m, torch.nn.Linear)]
    assert len(linears) == 225 and sum(m.weight.numel() for m in linears[:-1]) == 1_468_723_200
    assert abs(model.config.rope_base - 74534.83) < 0.01
    assert [i for i in range(32) if model.config.is_global(i)] == [0, 15, 31]


@pytest.mark.parametrize(
    ("changes", "owners"),
    [
        ({"kv_reuse_group": [[0, 1], [3, 4, 5]]}, [0, 2, 3, 6]),
        ({"kv_reuse_group": None}, [0, 1, 2, 3, 4, 5, 6]),
        ({"kv_reuse_group": None, "kv_reuse_every_i_layer": 0}, [0, 1, 2, 3, 4, 5, 6]),
        ({"kv_reuse_group": None, "kv_reuse_every_i_layer": 3}, [0, 3, 6]),
        ({"kv_reuse_group": [[1, 2]], "kv_reuse_every_i_layer": 3}, [0, 1, 3, 4, 5, 6]),
    ],
)
def test_layers_that_own_keys(changes, owners):
    config = HymbaConfig(num_hidden_layers=7, global_attn_idx=[], **changes)
    assert [layer for layer in range(7) if config.owns_kv(layer)] == owners
    assert [layer for layer in range(7) if config.passes_kv(layer)] == [
        layer for layer in range(6) if layer + 1 not in owners
    ]
    config.require_supported()


def test_initial_weights():
    torch.manual_seed(0)
    model = HymbaForCausalLM(HymbaConfig(**{**HYMBA_RELEASE, "hidden_size": 80, "num_memory_tokens": 50}))
    mixer, embedding = model.model.layers[1].mamba, model.model.embed_tokens.weight
    assert (
        mixer.in_proj.weight.std().sub(0.02).abs() < 1e-3
        and embedding[1:].std().sub(0.02).abs() < 1e-3
        and not embedding[0].any()
    )
    assert model.model.memory_tokens.std().sub(1).abs() < 0.05
    assert not mixer.dt_proj[0].bias.any() and (mixer.D[0] == 1).all()
    torch.testing.assert_close(mixer.A_log[0].exp(), torch.arange(1.0, 17).expand(160, -1))


@pytest.mark.parametrize("name", SETS)
def test_config_survives_saving(name, tmp_path):
    """Both the released config.json with its own keys and the one that transformers saves give the same config."""
    config = AutoConfig.from_pretrained(GOLDEN / name)
    assert type(config) is HymbaConfig and config.dtype == torch.float32 and config.use_cache is False
    config.save_pretrained(tmp_path)
    again = AutoConfig.from_pretrained(tmp_path)
    assert again.to_dict() | {"_name_or_path": ""} == config.to_dict() | {"_name_or_path": ""}
    raw, stored = (
        json.loads((GOLDEN / name / "config.json").read_text()),
        json.loads((tmp_path / "config.json").read_text()),
    )
    gone = {"attn_implementation", "attn_implementation_new", "torch_dtype", "output_router_logits"}
    assert {key: stored.get(key) for key in raw if key not in gone} == {
        key: raw[key] for key in raw if key not in gone
    } | {"use_cache": False}


def test_auto_map_is_not_followed(tmp_path):
    """The release refers to remote code in config.json; it is neither run nor requested."""
    copy_golden(
        tmp_path,
        auto_map={
            "AutoConfig": "configuration_hymba.HymbaConfig",
            "AutoModelForCausalLM": "modeling_hymba.HymbaForCausalLM",
        },
    )
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path)) is HymbaForCausalLM
    assert type(load_model(tmp_path)) is HymbaForCausalLM
    assert not hasattr(AutoConfig.from_pretrained(tmp_path), "auto_map")


def copy_golden(folder, name="swa_plain", tensors=None, **changes):
    config = json.loads((GOLDEN / name / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))
    if tensors is None:
        shutil.copy(GOLDEN / name / "model.safetensors", folder)
    else:
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("name", SETS)
@torch.inference_mode()
def test_round_trip(name, tmp_path):
    model, expected = golden_model(name), golden_tensors(name)
    model.save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    again = load_model(tmp_path)
    ids = expected["short.input_ids"]
    torch.testing.assert_close(again(ids).logits, expected["short.logits"], rtol=0, atol=5e-4)


@torch.inference_mode()
def test_stored_head(tmp_path):
    """The file has a lm_head.weight: equal to the embedding if tied, different if untied."""
    tensors = load_file(GOLDEN / "swa_plain" / "model.safetensors")
    expected, ids = golden_model("swa_plain"), torch.arange(1, 9).unsqueeze(0)
    copy_golden(tmp_path, tensors=tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()})
    model = load_model(tmp_path)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(model(ids).logits, expected(ids).logits)
    copy_golden(
        tmp_path,
        tensors=tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"] * 2},
        tie_word_embeddings=False,
    )
    torch.testing.assert_close(load_model(tmp_path)(ids).logits, expected(ids).logits * 2)


def test_wrong_tensors_are_named(tmp_path):
    tensors = load_file(GOLDEN / "swa_plain" / "model.safetensors")
    name = "model.layers.2.mamba.x_proj.0.weight"
    for changed, message in (
        ({k: v for k, v in tensors.items() if k != name}, f"lacks 1 of the model's tensors, such as {name}"),
        (tensors | {name: tensors[name][1:]}, rf"{name} must have shape \[35, 96\], got \[34, 96\]"),
        (
            tensors | {"model.layers.0.moe.router.weight": torch.ones(2)},
            "holds 1 tensors that the model does not have, such as model.layers.0.moe.router.weight",
        ),
    ):
        copy_golden(tmp_path, tensors={k: v.contiguous() for k, v in changed.items()})
        with pytest.raises(CheckpointError, match=message):
            load_model(tmp_path)
    with pytest.raises(RuntimeError, match=name):
        tiny_model().load_state_dict(tensors)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mlp_hidden_act": "relu2"}, "supports only mlp_hidden_act 'silu', got 'relu2'"),
        ({"num_experts": 4}, "supports only num_experts 1, got 4"),
        ({"kq_norm": "rms"}, "supports only kq_norm 'none', got 'rms'"),
        ({"memory_tokens_interspersed_every": 512}, "only memory_tokens_interspersed_every 0, got 512"),
        ({"rope_type": "yarn"}, "only rope_type 'ntk', got 'yarn'"),
        ({"kq_head_dim": 8}, r"only kq_head_dim -1 \(here 4\), got 8"),
        ({"num_attention_heads": 7}, "hidden_size must be a multiple of num_attention_heads, got 40 and 7"),
        ({"num_key_value_heads": 3}, "num_attention_heads must be a multiple of num_key_value_heads, got 10 and 3"),
        ({"global_attn_idx": None}, "global_attn_idx must be a list if sliding_window is set"),
        ({"kv_reuse_group": [[1, 3]]}, r"kv_reuse_group must be neighbours within 0..4, got \[1, 3\]"),
        ({"kv_reuse_group": [[4, 5]]}, r"kv_reuse_group must be neighbours within 0..4, got \[4, 5\]"),
        ({"kv_reuse_group": [[1, 2], [2, 3]]}, "must not be in two groups"),
        (
            {"kv_reuse_group": [[0, 1]]},
            "layers 0 and 1 share keys and values, so both or neither must be in global_attn_idx",
        ),
    ],
)
def test_unsupported_configurations(changes, message, tmp_path):
    config = HymbaConfig(**{**HYMBA_RELEASE, **changes})
    with pytest.raises(InvalidInputError, match=message), torch.device("meta"):
        HymbaForCausalLM(config)
    config.save_pretrained(tmp_path)
    save_file({}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(InvalidInputError, match=message):
        load_model(tmp_path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.inference_mode()
def test_cache_size(dtype):
    """Windowed layers keep the memory tokens and the window, consumers nothing; state_bytes adds it up."""
    model = tiny_model(dtype)
    memory, window, cache, tokens = 3, 6, None, 0
    for length in (4, 1, 9, 1, 1, 20):
        cache = model(torch.randint(0, 61, (1, length)), past_key_values=cache, use_cache=True).past_key_values
        tokens += length
        kept = [None if state.keys is None else state.keys.shape[2] for state in cache.layers]
        assert kept == [memory + tokens, min(memory + tokens, memory + window), None, None, memory + tokens]
        stored = [t for state in cache.layers for t in vars(state).values() if t is not None]
        assert (
            sum(t.untyped_storage().nbytes() for t in stored)
            == cache.nbytes
            == state_bytes(model.config, tokens, dtype)
        )


def test_cache_size_of_the_release():
    config = HymbaConfig()
    per_key = 5 * (64 + 128) * 2
    assert state_bytes(config, 5000) - state_bytes(config, 4999) == 3 * per_key
    assert state_bytes(config, 100) - state_bytes(config, 99) == 17 * per_key
    assert round(state_bytes(config, 1024) / 1e6, 1) == 45.0  # docs/HYMBA.md
