"""Models in which the code of others runs under known names: the engine leaves them to themselves, and says where."""

import functools

import pytest
import torch
from tiny_models import FAMILIES, VARIANTS, batch, tiny
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import klfast
from klfast.core.errors import CannotLowerError
from klfast.generation.engine import engine_of, lower
from klfast.nn.untouched import has_its_own_forward


class Linear(torch.nn.Module):
    """An adapter of a layer, as peft calls its own, which the tests do not depend on."""

    def __init__(self, layer):
        super().__init__()
        self.base_layer, self.weight, self.bias = layer, layer.weight, layer.bias
        self.in_features, self.out_features = layer.in_features, layer.out_features

    def forward(self, hidden):
        return 0.5 * self.base_layer(hidden)


@torch.inference_mode()
def greedy(model, ids, count=6):
    for _ in range(count):
        ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    return ids


@pytest.mark.parametrize(("family", "name"), [("llama", "model.layers.1.mlp.up_proj"), ("zamba2", "lm_head")])
def test_adapters(family, name):
    model, ids = tiny(family), batch(1, 8)
    plain = greedy(model, ids)
    model.set_submodule(name, Linear(model.get_submodule(name)))
    reason = f"{name} is a Linear of test_other_code"
    with pytest.raises(CannotLowerError, match=rf"^{reason}$"):
        lower(model)
    assert klfast.explain(model).reason == reason
    if name != "lm_head":  # half of all logits
        assert not torch.equal(greedy(model, ids), plain)
    assert torch.equal(klfast.generate(model, ids, 6), greedy(model, ids))


@pytest.mark.parametrize("name", ["", "model.layers.0.self_attn", "model.layers.1.mlp.act_fn", "model.norm"])
def test_classes_of_the_same_name(name):
    model = tiny("llama")
    engine, module = engine_of(model), model.get_submodule(name)
    own = type(module)
    module.__class__ = type(own.__name__, (own,), {})
    assert not engine.is_current()
    called = f"{name or 'the model'} is a {own.__name__} of test_other_code"
    with pytest.raises(CannotLowerError, match=rf"^{called}$"):
        engine_of(model)
    module.__class__ = own
    assert engine.is_current()


@pytest.mark.parametrize("wraps", [False, True])
@pytest.mark.parametrize("name", ["", "model", "model.layers.0.mlp", "model.layers.0.mlp.down_proj", "model.norm"])
def test_forwards_replaced_in_the_class(name, wraps, monkeypatch):
    model, ids, calls = tiny("llama"), batch(1, 8), []
    engine, module = engine_of(model), model.get_submodule(name)
    forward = type(module).forward

    def counted(self, *args, **kwargs):
        calls.append(1)
        return forward(self, *args, **kwargs)

    if wraps or not name:  # how the model is called shows in its signature
        counted = functools.wraps(forward)(counted)
    monkeypatch.setattr(type(module), "forward", counted)
    assert not engine.is_current()
    with pytest.raises(CannotLowerError, match=rf"is a {type(module).__name__}, whose forward has been replaced$"):
        engine_of(model)
    text = klfast.generate(model, ids, 3)
    assert calls
    monkeypatch.undo()
    assert engine.is_current()
    assert torch.equal(klfast.generate(model, ids, 3), text)


def test_the_forwards_of_authors_are_their_own():
    for family in (*FAMILIES, *VARIANTS):
        for kind in {type(module) for module in tiny(family).modules()}:
            assert has_its_own_forward(kind), kind


def squared(module, query, key, value, attention_mask, scaling, **_):
    """Attend with squared scores, causally, for prompts alone."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = (query @ key.transpose(-1, -2) * scaling).square()
    return (scores.tril() @ value).transpose(1, 2).contiguous(), None


@pytest.mark.parametrize("family", ["llama", "qwen3_5"])
def test_attention_functions_of_others(family, monkeypatch):
    model, ids = tiny(family), batch(1, 8)
    engine, usual = engine_of(model), model.config._attn_implementation
    for how in (usual, "squared"):
        monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, how, squared)
        model.set_attn_implementation(how)
        assert not engine.is_current()
        with pytest.raises(CannotLowerError, match=rf"self_attn calls the attention function '{how}', which is not"):
            engine_of(model)
        found, expected = klfast.generate(model, ids, 1), greedy(model, ids, 1)
        assert torch.equal(found, expected)
        monkeypatch.undo()
    for how in ("eager", usual):
        model.set_attn_implementation(how)
        assert engine_of(model).is_current()
    assert engine.is_current()


@pytest.mark.parametrize("family", ["llama", "bamba", "kimi_linear"])
def test_attention_that_is_not_causal(family):
    model, ids = tiny(family), batch(1, 8)
    engine, before = engine_of(model), greedy(model, ids, 1)
    model.config.is_causal = False
    assert not engine.is_current()
    with pytest.raises(CannotLowerError, match=r"^model\.layers\.\d\.self_attn is not causal$"):
        engine_of(model)
    assert torch.equal(klfast.generate(model, ids, 1), greedy(model, ids, 1))
    del model.config.is_causal
    assert engine.is_current() and torch.equal(klfast.generate(model, ids, 1), before)
