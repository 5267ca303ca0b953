"""Settings of modules and configurations that change after a model was lowered."""

import math

import pytest
import torch
from test_engine import relative
from tiny_models import VARIANTS, batch, tiny

from klfast.core.errors import CannotLowerError
from klfast.engine.settings import hold, module_settings, plain_settings
from klfast.generation.engine import engine_of

LAYER = "layers.0"
CHANGES = [
    ("llama", "norm", "variance_epsilon", 5.0),
    ("llama", f"{LAYER}.self_attn", "scaling", 2.0),
    ("llama", "rotary_emb", "attention_scaling", 2.0),
    ("qwen3_next", f"{LAYER}.mlp.gate", "top_k", 1),
    ("qwen3_next", f"{LAYER}.mlp.gate", "norm_topk_prob", False),
    ("granite_hybrid", LAYER, "residual_multiplier", 3.0),
    ("granite_hybrid", "", "embedding_multiplier", 9.0),
    ("granite_hybrid", "config", "logits_scaling", 0.5),
    ("mamba2", f"{LAYER}.mixer", "time_step_limit", (0.5, 0.6)),
    ("mistral", "config", "sliding_window", 2),
    ("falcon_h1", LAYER, "ssm_out_multiplier", 3.0),
    ("minimax", LAYER, "attn_alpha_factor", 3.0),
    ("hymba", "config", "sliding_window", 1),
]


@torch.inference_mode()
@pytest.mark.parametrize(("family", "name", "setting", "value"), CHANGES)
def test_changed_settings_are_followed(family, name, setting, value):
    model, ids = tiny(family), batch(1, 12)
    engine = engine_of(model)
    owner = model.config if name == "config" else model.base_model.get_submodule(name)
    old, before = getattr(owner, setting), engine(ids, engine.state())
    setattr(owner, setting, value)
    assert not engine.is_current()
    new, truth = engine_of(model), model(ids, use_cache=False).logits[:, -1]
    found = new(ids, new.state())
    assert relative(found, truth.double()) < 1e-4 and relative(before, truth.double()) > 1e-3
    setattr(owner, setting, old)
    assert engine.is_current() and not new.is_current()


@pytest.mark.parametrize(
    ("family", "name", "setting", "value", "message"),
    [
        ("mamba2", f"{LAYER}.mixer", "activation", "gelu", "an activation is gelu"),
        ("falcon_h1", "", "lm_head_multiplier", 3.0, "lm_head_multiplier is not its configuration's"),
        ("llama", "config", "num_hidden_layers", 1, "its configuration has fewer layers than the model"),
    ],
)
def test_changes_to_what_the_engine_does_not_compute(family, name, setting, value, message):
    model = tiny(family)
    engine_of(model)
    setattr(model.config if name == "config" else model.base_model.get_submodule(name), setting, value)
    with pytest.raises(CannotLowerError, match=f"^{message}$"):
        engine_of(model)


@pytest.mark.parametrize("family", ["mamba2", "llama", "qwen3_5", "hymba", *(set(VARIANTS) & {"lfm3"})])
def test_what_runs_of_the_model_leave_behind_is_no_change(family):
    model, ids = tiny(family), batch(2, 5)
    engine = engine_of(model)
    model.generate(ids, max_new_tokens=3, do_sample=False)
    with torch.no_grad():
        model.train()(ids)
    model.eval()
    assert engine_of(model) is engine


def test_other_configurations_count():
    model = tiny("llama")
    engine, old = engine_of(model), model.config
    model.config = type(old)(**old.to_dict() | {"rms_norm_eps": 0.5})
    assert not engine.is_current()
    model.config = old
    assert engine.is_current()
    old.is_causal = False  # not there before
    assert not engine.is_current()


def test_what_settings_are():
    owner = dict(
        eps=1e-5, limit=(0.0, math.inf), types=["a"], rates={"b": [1]}, rule=math.sin, kind=torch.float32, nothing=None
    )
    others = dict(weight=torch.ones(2), pair=(1, torch.ones(1)), thing=object())
    settings = plain_settings(owner | others)
    assert settings == owner and hold(settings, owner | others)
    for name in owner:
        assert not hold(settings, {key: value for key, value in owner.items() if key != name})
        for value in (-1, torch.ones(2), object()):
            assert not hold(settings, owner | {name: value}), name
    owner["rates"]["b"].append(2)
    assert not hold(settings, owner)
    assert "training" not in module_settings(vars(torch.nn.Linear(1, 1)))
    assert set(module_settings(vars(torch.nn.Linear(1, 1)))) == {"in_features", "out_features"}
