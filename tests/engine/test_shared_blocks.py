"""Zamba and Zamba2 on the native engine: blocks that share a transformer block, adapters, mixers with heads, GELU."""

import itertools

import pytest
import torch
from test_engine import logits_of_each, quantized, relative
from test_experts import assert_equals_the_model, changed
from tiny_models import batch, left_padded, tiny
from torch import nn

import klfast
from klfast import Plan, QuantSpec
from klfast.core.errors import CannotLowerError
from klfast.generation.engine import lower
from klfast.generation.stepper import Stepper
from klfast.models.matrices import matrices
from klfast.nn.direct_call import PreparedLinear

FAMILIES = ("zamba", "zamba2", "zamba2_adapters")
pytestmark = pytest.mark.filterwarnings("ignore:quantize_model")  # Zamba's x_proj stays as it is


@torch.inference_mode()
@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("zamba", dict(n_mamba_heads=1, hidden_act="gelu_pytorch_tanh")),
        ("zamba", dict(n_mamba_heads=8, num_key_value_heads=2, hidden_act="silu")),
        ("zamba", dict(mamba_conv_bias=False, mamba_proj_bias=True, mamba_d_conv=1)),
        ("zamba2", dict(add_bias_linear=True, mamba_ngroups=4, hidden_act="gelu_new")),
        ("zamba2_adapters", dict(use_mem_rope=False, adapter_rank=3)),
        ("zamba2_adapters", dict(use_shared_attention_adapter=False, num_key_value_heads=2)),
    ],
)
def test_other_settings(family, settings, monkeypatch):
    assert_equals_the_model(changed(family, monkeypatch, **settings))


@torch.inference_mode()
@pytest.mark.parametrize("family", FAMILIES)
def test_uses_of_shared_weights_have_states_of_their_own(family):
    model = tiny(family, tied=True)
    uses = [module for name, module in model.named_modules() if name.endswith("self_attn")]
    assert len({module.q_proj.weight.data_ptr() for module in uses}) < len(uses)
    assert_equals_the_model(model)
    assert sum(spec.growing is not None for spec in lower(model).state().specs) == 2 * len(uses)


def test_a_quantized_layer_that_blocks_share_is_prepared_once(monkeypatch):
    prepared = []

    class Counted(PreparedLinear):
        def __init__(self, layer):
            prepared.append(layer)
            super().__init__(layer)

    model = quantized(tiny("zamba2_adapters", tied=True), "int8-g16-sym")
    monkeypatch.setattr("klfast.engine.instructions.matrices.PreparedLinear", Counted)
    engine = lower(model)
    assert engine.names.count("model.layers.1.shared_transformer.self_attn.q_proj") == 2
    assert len(set(prepared)) == len(prepared)


@torch.inference_mode()
@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_is_as_near_as_the_model(family):
    model, ids = tiny(family, dtype=torch.bfloat16), batch(2, 6)
    engine, truth = lower(model), logits_of_each(model, ids)[:, -1]
    assert relative(engine(ids, engine.state(2)), truth) <= 2 * relative(model(ids).logits[:, -1], truth) + 1e-2


@torch.inference_mode()
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [False, True])
def test_greedy_tokens_of_a_mixed_plan_equal_those_of_the_model(family, tied):
    model, ids = tiny(family, tied=tied), batch(3, 9)
    specs = itertools.cycle([QuantSpec.of("int4-g16-sym"), None, QuantSpec.of("int8-g16-asym")])
    plan = {name: spec for name, spec in zip(matrices(model), specs, strict=False) if spec is not None}
    klfast.quantize_model(model, Plan(plan, "mixed"))
    lower(model)  # generate takes it
    for mask in (torch.ones_like(ids), left_padded(ids)):
        found = klfast.generate(model, ids, 10, attention_mask=mask)
        expected = model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=10, pad_token_id=0)
        assert torch.equal(found, expected)


@torch.inference_mode()
@pytest.mark.parametrize("family", ["zamba2", "nemotron_h"])
@pytest.mark.parametrize("tokens", [1, 2, 15])
def test_steps_have_limits_in_prompts_alone(family, tokens):
    """As transformers' forwards have it; a chunk of a prompt is part of it, however short."""
    model, ids = tiny(family), batch(2, tokens)
    for module in model.modules():
        if hasattr(module, "time_step_limit"):
            module.time_step_limit = (2.5, 3.0)
    engine, step = lower(model, rows=14), Stepper(model, None)  # 7 tokens of each sequence at a time
    state = engine.state(2)
    assert relative(engine(ids, state), step(ids).double()) < 1e-4
    for following in (torch.tensor([[3], [5]]), torch.tensor([[8], [2]])):
        assert relative(engine(following, state), step(following).double()) < 1e-4


@torch.inference_mode()
@pytest.mark.parametrize("family", ["zamba2", "nemotron_h", "mamba2"])
def test_guessed_tokens_are_decoded_ones(family):
    """Several at once, as speculation verifies them, have the logits of one after another: no limits, either."""
    model, ids, following = tiny(family), batch(2, 5), torch.tensor([[3, 8, 4], [5, 2, 4]])
    for module in model.modules():
        if hasattr(module, "time_step_limit"):
            module.time_step_limit = (2.5, 3.0)
    engine = lower(model)
    state, same = engine.state(2), engine.state(2)
    engine(ids, state), engine(ids, same)
    found = engine.each(following, state)
    for t in range(3):
        assert relative(found[:, t], engine(following[:, t : t + 1], same).double()) < 1e-4


def test_says_what_it_cannot_lower():
    model = tiny("zamba", tied=True)
    model.model.layers[1].shared_transf.feed_forward.act_fn = nn.GELU()  # which may be the approximation
    with pytest.raises(CannotLowerError, match=r"^an activation is GELU$"):
        lower(model)
    model = tiny("zamba2_adapters")
    model.model.layers[2].shared_transformer.self_attn.linear_k_adapter_list[1] = nn.Identity()
    with pytest.raises(CannotLowerError, match=r"linear_k_adapter_list\.1 is a Identity$"):
        lower(model)
    model = tiny("zamba2_adapters")
    model.model.layers[3].shared_transformer.feed_forward.gate_up_proj_adapter_list[2].register_forward_hook(
        lambda *_: None
    )
    with pytest.raises(CannotLowerError, match=r"gate_up_proj_adapter_list\.2 has hooks$"):
        lower(model)


@torch.inference_mode()
def test_a_changed_adapter_makes_the_engine_stale():
    model = tiny("zamba2_adapters", tied=True)
    engine = lower(model)
    assert engine.is_current()
    adapter = model.model.layers[3].shared_transformer.self_attn.linear_v_adapter_list[2]
    adapter[1] = klfast.QuantLinear.from_linear(adapter[1], QuantSpec.of("int8-g16-sym"))
    assert not engine.is_current()
    assert_equals_the_model(model)
