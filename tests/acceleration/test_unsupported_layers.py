"""Recurrent layers that klfast has no functions for are named, and no others."""

import warnings

import pytest
import transformers
from tiny_models import ACCELERATED, tiny

import klfast
from klfast.acceleration.patch import is_accelerated

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
