"""Mixtures of experts on the native engine against the models themselves in float64."""

import pytest
import torch
from test_engine import logits_of_each, quantized, relative
from tiny_models import CONFIGS, batch, tiny
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssConfig, GptOssExperts

from klfast.core.errors import CannotLowerError
from klfast.engine.builder import Builder
from klfast.engine.routing import Routing
from klfast.generation.engine import lower
from klfast.models.families import norm_of
from klfast.models.families.experts import mixture
from klfast.nn.experts import stack_names

FAMILIES = (
    *("granite_hybrid_moe", "qwen3_5_moe", "qwen3_next", "lfm2_moe"),
    *("nemotron_h_moe", "jamba_moe", "kimi_linear", "minimax"),
)


def changed(family, monkeypatch, **settings):
    """Return a tiny model whose configuration has other settings."""
    make = CONFIGS[family]

    def config():
        made = make()
        for name, value in settings.items():
            setattr(made, name, value)
        return made

    monkeypatch.setitem(CONFIGS, family, config)
    return tiny(family)


def experts_of(model):
    return [module for module in model.modules() if stack_names(module)]


def assert_equals_the_model(model, rows=2, bound=1e-4):
    ids = batch(rows, 12)
    truth, engine = logits_of_each(model, ids), lower(model)
    state = engine.state(rows)
    assert relative(engine(ids[:, :11], state), truth[:, 10]) < bound
    assert relative(engine(ids[:, 11:], state), truth[:, 11]) < bound


@torch.inference_mode()
@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("lfm2_moe", dict(norm_topk_prob=False, routed_scaling_factor=1.7)),
        ("lfm2_moe", dict(use_expert_bias=False, num_experts_per_tok=1, num_dense_layers=2)),
        ("qwen3_next", dict(norm_topk_prob=False, mlp_only_layers=[1])),
        ("qwen3_5_moe", dict(num_experts=7, num_experts_per_tok=5)),
        ("granite_hybrid_moe", dict(num_experts_per_tok=4)),
        ("nemotron_h_moe", dict(n_group=2, norm_topk_prob=False, mlp_bias=True)),
        (
            "nemotron_h_moe",
            dict(n_routed_experts=9, n_group=3, topk_group=2, num_experts_per_tok=4, moe_latent_size=None),
        ),
        ("jamba_moe", dict(num_experts=5, num_experts_per_tok=2)),
        ("kimi_linear", dict(num_local_experts=8, n_group=4, topk_group=2, norm_topk_prob=False)),
        (
            "minimax",
            dict(linear_attn_alpha_factor=1.5, full_attn_beta_factor=0.7, mlp_alpha_factor=0.4, sliding_window=5),
        ),
        ("kimi_linear", dict(q_lora_rank=20, attention_bias=True, routed_scaling_factor=1.7)),
    ],
)
def test_other_settings(family, settings, monkeypatch):
    assert_equals_the_model(changed(family, monkeypatch, **settings))


@torch.inference_mode()
@pytest.mark.parametrize(
    ("family", "settings"), [("lfm2_moe", {}), ("nemotron_h_moe", {}), ("nemotron_h_moe", dict(n_group=2))]
)
def test_a_bias_changes_the_choice_alone(family, settings, monkeypatch):
    model = changed(family, monkeypatch, **settings)
    plain = lower(model)
    before = plain(batch(), plain.state(2)).clone()
    biases = [buffer for name, buffer in model.named_buffers() if name.endswith("_bias")]
    assert biases
    for bias in biases:
        bias.copy_(torch.tensor([4.0, -2.5, 2.0, -2.0]))  # experts 0 and 2; with groups, 0 and 1
    assert_equals_the_model(model)
    assert relative(plain(batch(), plain.state(2)), before.double()) > 1e-2  # read where it lies


@torch.inference_mode()
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("spec", [None, "int4-g16-asym", "int6-g32-sym"])
@pytest.mark.parametrize("rows", [1, 3])
def test_tokens_read_only_their_experts(family, spec, rows, monkeypatch):
    """Fill the matrices with NaN, except those of the experts that the tokens are routed to."""
    model = changed(family, monkeypatch, num_experts=9, num_local_experts=9)
    if spec is not None:
        model = quantized(model, spec)
    ids, met, hooks = batch(rows, 1), {}, []
    for module in experts_of(model):
        hooks.append(
            module.register_forward_pre_hook(lambda module, args: met.update({module: set(args[1].ravel().tolist())}))
        )
    model(ids)
    for hook in hooks:
        hook.remove()
    engine = lower(model)
    want = engine(ids, engine.state(rows)).clone()
    for module, experts in met.items():
        others = [i for i in range(9) if i not in experts]
        assert others
        for name in stack_names(module):
            stack = getattr(module, name)
            numbers = stack if spec is None else stack.weight_scale.view(9, -1)
            numbers[others] = torch.nan
    assert torch.equal(engine(ids, engine.state(rows)), want)
    for module in met:
        for name in stack_names(module):
            stack = getattr(module, name)
            (stack if spec is None else stack.weight_scale).fill_(torch.nan)
    assert engine(ids, engine.state(rows)).isnan().all()


@torch.inference_mode()
@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_is_as_near_as_the_model(family):
    model = tiny(family, dtype=torch.bfloat16)
    ids = batch(2, 6)
    engine, truth = lower(model), logits_of_each(model, ids)[:, -1]
    assert relative(engine(ids, engine.state(2)), truth) <= 2 * relative(model(ids).logits[:, -1], truth) + 1e-2


@torch.inference_mode()
def test_rounded_activations():
    model = quantized(tiny("granite_hybrid_moe"), "int8-g32-sym", activation="int8")
    assert_equals_the_model(model, bound=2e-2)


@torch.inference_mode()
def test_a_router_of_nans_does_no_harm():
    model = tiny("lfm2_moe")
    model.model.layers[2].feed_forward.gate.weight.fill_(torch.nan)
    engine = lower(model)
    assert engine(batch(), engine.state(2)).isnan().all()


def test_says_what_it_cannot_lower():
    model = tiny("granite_hybrid_moe")
    experts = experts_of(model)[1]
    experts.act_fn = torch.nn.GELU()
    with pytest.raises(CannotLowerError, match=r"^an activation is GELU$"):
        lower(model)
    model = tiny("qwen3_5_moe")
    model.model.layers[1].mlp.gate.register_forward_hook(lambda *_: None)
    with pytest.raises(CannotLowerError, match=r"^model\.layers\.1\.mlp\.gate has hooks$"):
        lower(model)
    model = tiny("nemotron_h_moe")
    [experts] = experts_of(model)
    experts.act_fn = torch.nn.SiLU()
    with pytest.raises(CannotLowerError, match=r"^an activation is SiLU$"):
        lower(model)
    others = GptOssExperts(GptOssConfig(num_local_experts=4, hidden_size=48, intermediate_size=8))
    build = Builder(model, torch.float32, 8, norm_of)
    router, x = build.buffer("router", 4), build.buffer("x", 48)
    with pytest.raises(CannotLowerError, match=r"^GptOssExperts are experts of another kind$"):
        mixture(build, others, build.route("routes", Routing(2), router), x, x)
    with pytest.raises(CannotLowerError, match=r"^routes: a token meets 5 of 4 experts$"):
        build.route("routes", Routing(5), router)
    with pytest.raises(CannotLowerError, match=r"^routes: a token meets 3 of 2 experts$"):
        build.route("routes", Routing(3, groups=2), router)
    for routing in (Routing(1, groups=3, open_groups=2), Routing(1, groups=2, open_groups=3)):
        with pytest.raises(CannotLowerError, match=r"^routes: 4 experts in \d groups, \d open$"):
            build.route("routes", routing, router)
    model = tiny("lfm2_moe")
    model.model.layers[1].feed_forward.gate.half()
    with pytest.raises(CannotLowerError, match=r"gate\.weight is not a tensor of torch\.float32$"):
        lower(model)
