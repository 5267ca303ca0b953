"""Accelerated models in every configuration against plain ones."""

import copy

import pytest
import torch
import transformers
from accelerated_models import logits, mixers
from cached_calls import in_chunks
from tiny_models import ACCELERATED, CONFIGS, STATE_SPACE, VOCABULARY, assert_no_further, batch, in_float64, tiny

import klfast
from klfast.acceleration.patch import is_accelerated

_CONFIGS = {
    "mamba": transformers.MambaConfig,
    "mamba2": transformers.Mamba2Config,
    "falcon_mamba": transformers.FalconMambaConfig,
}


def configured(family, dtype=torch.float32, **changes):
    """Return two equal models, the second accelerated."""
    torch.manual_seed(3)
    sizes = dict(vocab_size=VOCABULARY, hidden_size=64, num_hidden_layers=2, state_size=8)
    if family == "mamba2":
        sizes |= dict(num_heads=8, head_dim=16, n_groups=2, chunk_size=8)
    plain = transformers.AutoModelForCausalLM.from_config(_CONFIGS[family](**sizes | changes), dtype=dtype).eval()
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            if "A_log" not in name and parameter.dim() > 1:
                parameter.normal_(std=0.2)
            elif name.endswith("bias"):
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return plain, klfast.accelerate(copy.deepcopy(plain))


CHANGES = [
    *({"hidden_act": act} for act in ("gelu", "relu", "gelu_pytorch_tanh", "tanh", "linear", "swish", "quick_gelu")),
    {"use_conv_bias": False},
    {"use_bias": True},
    {"use_conv_bias": False, "hidden_act": "relu"},
    {"layer_norm_epsilon": 0.1},
    {"expand": 1},
    {"residual_in_fp32": False},
    *({"conv_kernel": width} for width in (1, 2, 3, 7)),
    {"state_size": 5},
    {"state_size": 24},
    {"time_step_rank": 3},
]
OF_ONE_FAMILY = [
    ("falcon_mamba", {"mixer_rms_eps": 0.1}),
    ("mamba", {"use_associative_scan": False}),
    ("mamba", {"use_mambapy": True}),
    *(
        ("mamba2", change)
        for change in (
            {"n_groups": 1},
            {"n_groups": 8},
            {"chunk_size": 5},
            {"chunk_size": 256},
            {"time_step_limit": (0.01, 0.2)},
            {"time_step_limit": (0.0, 0.5)},
            {"num_heads": 16, "head_dim": 8},
        )
    ),
]


@pytest.mark.parametrize(
    ("family", "changes"),
    [*((family, change) for change in CHANGES for family in STATE_SPACE), *OF_ONE_FAMILY],
    ids=str,
)
def test_every_configuration_equals_transformers(family, changes):
    if family == "mamba2" and changes.get("expand") == 1:
        changes = {**changes, "num_heads": 4}
    plain, fast = configured(family, **changes)
    ids = batch(2, 21)
    assert all(is_accelerated(mixer) for mixer in mixers(fast))
    torch.testing.assert_close(logits(fast, ids), logits(plain, ids), atol=3e-5, rtol=3e-5)
    lengths = [18, 1, 1, 1]
    torch.testing.assert_close(
        in_chunks(fast, ids, lengths)[0], in_chunks(plain, ids, lengths)[0], atol=3e-5, rtol=3e-5
    )


HYBRID_CHANGES = [
    *({"hidden_act": act} for act in ("gelu", "relu", "tanh")),
    {"mamba_conv_bias": False},
    {"mamba_proj_bias": True},
    {"rms_norm_eps": 0.1},
    *({"mamba_d_conv": width} for width in (1, 2, 3, 7)),
    {"mamba_d_state": 5},
    {"mamba_n_groups": 1},
    {"mamba_n_groups": 8},
    *({"mamba_chunk_size": size} for size in (5, 256)),
    {"mamba_n_heads": 16, "mamba_d_head": 8},
]
OF_ONE_HYBRID = [
    *(("granite_hybrid", {"time_step_limit": limit}) for limit in ((0.01, 0.2), (0.0, 0.5))),
    ("granite_hybrid", {"position_embedding_type": "rope"}),
    *(("bamba", {"time_step_limit": limit}) for limit in ((0.01, 0.2), (0.0, 0.5))),
    *(("falcon_h1_norm", {"time_step_limit": limit}) for limit in ((0.01, 0.2), (0.0, 0.5))),
    ("falcon_h1", {"mamba_d_ssm": None}),
    ("falcon_h1_norm", {"mamba_n_groups": 1}),
    ("falcon_h1_gated_norm", {"mamba_n_groups": 4}),
    *(
        ("nemotron_h", change)
        for change in (
            {"mamba_hidden_act": "gelu"},
            {"use_conv_bias": False},
            {"use_bias": True},
            {"layer_norm_epsilon": 0.1},
            {"conv_kernel": 1},
            {"conv_kernel": 7},
            {"n_groups": 8},
            {"chunk_size": 256},
            {"mamba_num_heads": 4, "mamba_head_dim": 32},
        )
    ),
    *(
        ("jamba", change)
        for change in (
            {"hidden_act": "gelu"},
            {"mamba_conv_bias": False},
            {"mamba_proj_bias": True},
            {"rms_norm_eps": 0.1},
            {"mamba_d_conv": 1},
            {"mamba_d_conv": 7},
            {"mamba_d_state": 24},
            {"mamba_dt_rank": 3},
        )
    ),
    *(
        ("zamba", change)
        for change in (
            {"hidden_mamba_act": "gelu"},
            {"mamba_conv_bias": False},
            {"mamba_proj_bias": True},
            {"mamba_d_conv": 1},
            {"mamba_d_state": 24},
            {"n_mamba_heads": 1},
            {"n_mamba_heads": 8},
        )
    ),
    *(("zamba2", change) for change in ({"add_bias_linear": True}, {"mamba_d_conv": 1}, {"mamba_ngroups": 4})),
]
_OF_DELTA_NETS = [
    *({"linear_conv_kernel_dim": width} for width in (1, 2, 4)),
    {"linear_num_key_heads": 9},
    {"linear_num_key_heads": 1},
    {"linear_key_head_dim": 32, "linear_value_head_dim": 16},
    {"rms_norm_eps": 0.1},
    {"hidden_act": "gelu"},
]
OF_OTHERS = [
    *((family, change) for family in ("qwen3_5", "qwen3_next", "olmo_hybrid") for change in _OF_DELTA_NETS),
    ("olmo_hybrid", {"linear_allow_neg_eigval": False}),
    *(("kimi_linear", change) for change in ({"linear_head_dim": 32}, {"linear_conv_kernel_dim": 4})),
    *(("lfm2", change) for change in ({"conv_L_cache": 3}, {"conv_L_cache": 2}, {"norm_eps": 0.1})),
    ("lfm3", {"conv_L_cache": 3, "conv_bias": True, "use_sandwich_norm": False, "use_attention_gate": False}),
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "changes"),
    [
        *((family, change) for change in HYBRID_CHANGES for family in ("granite_hybrid", "falcon_h1", "bamba")),
        *(case for case in (*OF_ONE_HYBRID, *OF_OTHERS) if case[0] in ACCELERATED),
    ],
    ids=str,
)
def test_every_configuration_of_a_hybrid_equals_transformers(family, changes, monkeypatch):
    config = CONFIGS[family]()
    config = type(config)(**config.to_dict() | changes)
    monkeypatch.setitem(CONFIGS, family, lambda: config)
    plain = tiny(family)
    with torch.no_grad():
        for parameter in plain.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    fast = klfast.accelerate(copy.deepcopy(plain))
    ids = batch(2, 21)
    assert mixers(fast) and all(is_accelerated(mixer) for mixer in mixers(fast))
    truth = in_float64(plain)
    for lengths in ([21], [18, 1, 1, 1], [9, 4, 1, 7]):
        assert_no_further(*(in_chunks(model, ids, lengths)[0] for model in (fast, plain, truth)))


@pytest.mark.parametrize("family", STATE_SPACE)
@pytest.mark.parametrize("activation", ["gelu", "relu"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_other_activations_in_16_bits_are_no_further_from_the_truth(family, activation, dtype):
    plain, fast = configured(family, dtype, hidden_act=activation)
    truth = copy.deepcopy(plain).float()
    ids = batch(2, 21)
    right = in_chunks(truth, ids, [19, 1, 1])[0]
    errors = [(in_chunks(model, ids, [19, 1, 1])[0].float() - right).square().mean().sqrt() for model in (plain, fast)]
    assert errors[1] <= 1.1 * errors[0] + 1e-4


@pytest.mark.parametrize("family", STATE_SPACE)
def test_another_activation_generates_the_same_tokens(family):
    plain, fast = configured(family, hidden_act="gelu")
    found, expected = (model.generate(batch(2, 5), max_new_tokens=8, do_sample=False) for model in (fast, plain))
    assert torch.equal(found, expected)


def test_falcon_mamba_decodes_with_its_own_norms():
    """The one-token step does not support norms with another eps or with a hook."""
    plain, fast = configured("falcon_mamba")
    for model in (plain, fast):
        mixer = mixers(model)[0]
        mixer.c_layernorm.eps = 0.5
        mixers(model)[1].b_layernorm.register_forward_hook(lambda module, args, output: output * 2)
    ids = batch(2, 12)
    found, expected = (in_chunks(model, ids, [10, 1, 1])[0] for model in (fast, plain))
    torch.testing.assert_close(found, expected, atol=3e-5, rtol=3e-5)


@pytest.mark.slow
@pytest.mark.parametrize("family", STATE_SPACE)
def test_another_activation_compiles(family):
    plain, fast = configured(family, hidden_act="gelu")
    torch._dynamo.reset()
    compiled = torch.compile(fast, fullgraph=True, backend="eager")
    torch.testing.assert_close(
        logits(compiled, batch(2, 9), use_cache=False), logits(plain, batch(2, 9)), rtol=3e-5, atol=3e-5
    )
