"""Accelerated models against plain ones: configurations, compilation, copies, pickles and patched forwards."""

import copy
import functools
import io
import pickle
import sys
import warnings

import cached_calls
import pytest
import torch
import transformers
from tiny_models import ACCELERATED, CONFIGS, STATE_SPACE, VOCABULARY, assert_no_further, batch, in_float64, tiny

import klfast
from klfast.acceleration import forwards
from klfast.acceleration.patch import is_accelerated
from klfast.models.families import mixer_of

SSM = list(STATE_SPACE)
_CONFIGS = {
    "mamba": transformers.MambaConfig,
    "mamba2": transformers.Mamba2Config,
    "falcon_mamba": transformers.FalconMambaConfig,
}


def mixers(model):
    return [module for module in model.modules() if mixer_of(type(module)) is not None]


@torch.inference_mode()
def logits(model, ids, **kwargs):
    return model(ids, **kwargs).logits


def in_chunks(model, ids, lengths):
    """Return the logits of ids, fed in pieces of these lengths."""
    return cached_calls.in_chunks(model, ids, lengths)[0]


# Configurations ---------------------------------------------------------------------------------------------------


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
    ("family", "changes"), [*((family, change) for change in CHANGES for family in SSM), *OF_ONE_FAMILY], ids=str
)
def test_every_configuration_equals_transformers(family, changes):
    if family == "mamba2" and changes.get("expand") == 1:
        changes = {**changes, "num_heads": 4}
    plain, fast = configured(family, **changes)
    ids = batch(2, 21)
    assert all(is_accelerated(mixer) for mixer in mixers(fast))
    torch.testing.assert_close(logits(fast, ids), logits(plain, ids), atol=3e-5, rtol=3e-5)
    lengths = [18, 1, 1, 1]
    torch.testing.assert_close(in_chunks(fast, ids, lengths), in_chunks(plain, ids, lengths), atol=3e-5, rtol=3e-5)


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
]


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        *((family, change) for change in HYBRID_CHANGES for family in ("granite_hybrid", "falcon_h1", "bamba")),
        *(case for case in OF_ONE_HYBRID if case[0] in ACCELERATED),
        *OF_OTHERS,
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
        assert_no_further(*(in_chunks(model, ids, lengths) for model in (fast, plain, truth)))


@pytest.mark.parametrize("family", SSM)
@pytest.mark.parametrize("activation", ["gelu", "relu"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_other_activations_in_16_bits_are_no_further_from_the_truth(family, activation, dtype):
    plain, fast = configured(family, dtype, hidden_act=activation)
    truth = copy.deepcopy(plain).float()
    ids = batch(2, 21)
    right = in_chunks(truth, ids, [19, 1, 1])
    errors = [(in_chunks(model, ids, [19, 1, 1]).float() - right).square().mean().sqrt() for model in (plain, fast)]
    assert errors[1] <= 1.1 * errors[0] + 1e-4


@pytest.mark.parametrize("family", SSM)
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
    torch.testing.assert_close(
        in_chunks(fast, ids, [10, 1, 1]), in_chunks(plain, ids, [10, 1, 1]), atol=3e-5, rtol=3e-5
    )


# torch.compile ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ACCELERATED)
@pytest.mark.parametrize(("tokens", "pickled"), [(2, False), (17, False), (2, True)])
def test_whole_sequences_compile_without_a_break(family, tokens, pickled, monkeypatch):
    """This includes models that have not run before, as in a new process."""
    model = tiny(family)
    ids = batch(2, tokens)
    truth, plain = logits(in_float64(model), ids), logits(model, ids)
    klfast.accelerate(model)
    stored = pickle.dumps(model)
    monkeypatch.setattr(forwards, "_natives", {})
    model = pickle.loads(stored) if pickled else klfast.accelerate(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert_no_further(logits(compiled, ids, use_cache=False), plain, truth)


@pytest.mark.parametrize(
    ("family", "dtype"),
    [(family, torch.float32) for family in ACCELERATED]
    + [(family, torch.bfloat16) for family in (*SSM, "granite_hybrid")],
)
def test_prompts_and_tokens_with_a_cache_compile(family, dtype):
    model = klfast.accelerate(tiny(family, dtype=dtype))
    ids = batch(2, 11)
    expected = in_chunks(model, ids, [9, 1, 1])
    torch._dynamo.reset()
    tolerance = 2e-5 if dtype == torch.float32 else 0.05
    found = in_chunks(torch.compile(model, backend="aot_eager"), ids, [9, 1, 1])
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("family", SSM)
def test_another_activation_compiles(family):
    plain, fast = configured(family, hidden_act="gelu")
    torch._dynamo.reset()
    compiled = torch.compile(fast, fullgraph=True, backend="eager")
    torch.testing.assert_close(
        logits(compiled, batch(2, 9), use_cache=False), logits(plain, batch(2, 9)), rtol=3e-5, atol=3e-5
    )


def test_the_convolution_compiles_with_inductor():
    """Inductor is torch.compile's default backend."""
    x, weight = torch.randn(2, 8, 9), torch.randn(8, 4)

    def convolve(x):
        return klfast.ops.causal_conv1d_fn(x, weight, activation="silu") * 2

    torch._dynamo.reset()
    # torch's disk cache also returns code compiled under another ATEN_CPU_CAPABILITY, which gives wrong results.
    with torch._inductor.config.patch(force_disable_caches=True):
        torch.testing.assert_close(torch.compile(convolve, fullgraph=True)(x), convolve(x))


# Copies and pickles -----------------------------------------------------------------------------------------------


def _by_torch(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {"pickle": lambda model: pickle.loads(pickle.dumps(model)), "torch.save": _by_torch, "deepcopy": copy.deepcopy}


@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
@pytest.mark.parametrize("family", [*ACCELERATED, "hymba"])
def test_a_copy_is_accelerated_and_can_be_undone(family, copied):
    model = tiny(family)
    ids = batch()
    plain = logits(model, ids)
    truth = plain.double() if family == "hymba" else logits(in_float64(model), ids)  # Hymba calls klfast's ops itself
    fast = [name for name, module in klfast.accelerate(model).named_modules() if is_accelerated(module)]
    other = copied(model)
    assert [name for name, module in other.named_modules() if is_accelerated(module)] == fast
    with torch.no_grad():
        model.get_output_embeddings().weight.zero_()  # the copy has its own weights
    assert_no_further(logits(other, ids), plain, truth)
    assert klfast.unaccelerate(other) is other
    assert not any("forward" in vars(module) for module in other.modules())
    assert torch.equal(logits(other, ids), plain)
    assert [name for name, module in klfast.accelerate(other).named_modules() if is_accelerated(module)] == fast
    assert any(is_accelerated(module) for module in model.modules()), "the original stays as it is"


@pytest.mark.parametrize("family", SSM)
def test_a_copy_of_a_plain_model_stays_plain(family):
    assert not any("forward" in vars(module) for module in pickle.loads(pickle.dumps(tiny(family))).modules())


def test_a_forward_that_was_pickled_as_a_method_is_accelerated_again():
    """Pickles of klfast 0.1 contain such forwards."""
    model = tiny("mamba")
    for module in model.modules():
        if not isinstance(module, torch.nn.ModuleList):
            module.forward = module.forward
    with warnings.catch_warnings():
        warnings.simplefilter("error", klfast.SlowPathWarning)
        klfast.accelerate(model)
    assert all(is_accelerated(mixer) for mixer in mixers(model))


def _in_another_process(model, ids, results):
    results.put((sum(map(is_accelerated, model.modules())), logits(model, ids).tolist()))


def test_a_spawned_process_gets_an_accelerated_model():
    model = klfast.accelerate(tiny("mamba2"))
    context = torch.multiprocessing.get_context("spawn")
    results = context.SimpleQueue()
    process = context.Process(target=_in_another_process, args=(model, batch(), results))
    process.start()
    count, found = results.get()
    process.join(60)
    assert count == sum(map(is_accelerated, model.modules()))
    torch.testing.assert_close(torch.tensor(found), logits(model, batch()), rtol=2e-5, atol=2e-5)


# Libraries that patch forwards ------------------------------------------------------------------------------------


def hook_around(module):
    """Replace the forward as accelerate's add_hook_to_module does."""
    old = module.forward

    def new_forward(module, *args, **kwargs):
        module.calls = getattr(module, "calls", 0) + 1
        return old(*args, **kwargs)

    module.forward = functools.update_wrapper(functools.partial(new_forward, module), old)


def test_modules_with_another_forward_keep_it_and_are_named():
    model = tiny("mamba2")
    ids, plain = batch(), logits(tiny("mamba2"), batch())
    hook_around(mixers(model)[1])
    with pytest.warns(
        klfast.SlowPathWarning,
        match=r"replaced the forward of backbone\.layers\.1\.mixer in this Mamba2ForCausalLM; call klfast\.accelerate",
    ):
        klfast.accelerate(model)
    assert [is_accelerated(mixer) for mixer in mixers(model)] == [True, False]
    torch.testing.assert_close(logits(model, ids), plain, rtol=2e-5, atol=2e-5)
    assert mixers(model)[1].calls == 1
    klfast.unaccelerate(model)
    assert torch.equal(logits(model, ids), plain) and mixers(model)[1].calls == 2


def test_a_hook_around_an_accelerated_module_is_left_in_place():
    model = klfast.accelerate(tiny("mamba2"))
    hook_around(mixers(model)[0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        klfast.accelerate(model)
    assert all(is_accelerated(mixer) for mixer in mixers(model))
    logits(model, batch())
    assert mixers(model)[0].calls == 1
    with pytest.warns(UserWarning, match=r"another library's forward calls klfast's in backbone\.layers\.0\.mixer"):
        klfast.unaccelerate(model)
    assert [is_accelerated(mixer) for mixer in mixers(model)] == [True, False]


def counted(original, module):
    """Return another library's forward for a class."""

    def forward(self, hidden_states, *args, **kwargs):
        self.calls = getattr(self, "calls", 0) + 1
        return original(self, hidden_states, *args, **kwargs)

    forward.__module__ = module
    return forward


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_norm_whose_class_was_patched_runs_the_patch(when, monkeypatch):
    model = tiny("mamba")
    norm = model.backbone.norm_f
    expected = logits(model, batch())
    if when == "after":
        logits(klfast.accelerate(model), batch())
    monkeypatch.setattr(type(norm), "forward", counted(type(norm).forward, "another.library"))
    if when == "before":
        with pytest.warns(klfast.SlowPathWarning, match="replaced the forward of the classes MambaRMSNorm"):
            klfast.accelerate(model)
    torch.testing.assert_close(logits(model, batch()), expected, rtol=2e-5, atol=2e-5)
    assert norm.calls == 1


def test_functions_that_are_patched_later_are_seen(monkeypatch):
    """The copied forward shares the original's globals."""
    model = tiny("mamba2")
    module = sys.modules[type(mixers(model)[0]).__module__]
    before = {name: getattr(module, name) for name in mixer_of(type(mixers(model)[0])).functions}
    logits(klfast.accelerate(model), batch())
    calls, original = [], module.apply_mask_to_padding_states
    monkeypatch.setattr(module, "apply_mask_to_padding_states", lambda *args: calls.append(1) or original(*args))
    logits(model, batch())
    assert len(calls) == 4, "twice in each of two mixers"
    assert all(getattr(module, name) is function for name, function in before.items()), (
        "transformers' own functions stay in their places"
    )


# Layers that klfast has no functions for --------------------------------------------------------------------------

_SMALL = dict(vocab_size=64, hidden_size=32, num_hidden_layers=2)
_ATTENTION = dict(num_attention_heads=4, num_key_value_heads=2, intermediate_size=48)
OTHERS = {
    "RwkvSelfAttention": lambda: transformers.RwkvConfig(**_SMALL, attention_hidden_size=32, intermediate_size=48),
    "RecurrentGemma": lambda: transformers.RecurrentGemmaConfig(**_SMALL, **_ATTENTION, lru_width=32),
    "MiniMaxLightningAttention": lambda: transformers.MiniMaxConfig(
        **_SMALL, **_ATTENTION, head_dim=8, num_local_experts=2, layer_types=["linear_attention", "full_attention"]
    ),
    "xLSTM": lambda: transformers.xLSTMConfig(**_SMALL, num_heads=2, num_blocks=2),
}


@pytest.mark.parametrize("name", OTHERS)
def test_warns_about_unsupported_recurrent_layers(name):
    model = transformers.AutoModelForCausalLM.from_config(OTHERS[name]())
    with pytest.warns(klfast.SlowPathWarning, match=f"does not support the recurrent layers .*{name}"):
        klfast.accelerate(model)
    assert not any(is_accelerated(module) for module in model.modules())


@pytest.mark.parametrize("family", [*ACCELERATED, "hymba", "llama"])
def test_does_not_warn_about_supported_models(family):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        klfast.accelerate(tiny(family))
