"""Transformers models as chains: the steps add up to the model, and models that are not chains are refused."""

import pytest
import torch
from tiny_models import CONFIGS, VOCABULARY, batch, tiny
from torch import nn
from transformers import MambaForCausalLM, RwkvConfig, RwkvForCausalLM

from klfast.core.errors import InvalidInputError
from klfast.models.block_chain import Carry, Chain


def llama():
    return tiny("llama")


@pytest.mark.parametrize("family", CONFIGS)
@torch.no_grad()
def test_steps_add_up_to_the_model(family):
    model = tiny(family)
    ids = batch(3, 11)
    expected = model(ids).logits
    chain = Chain(model)
    passage = chain.enter(ids)
    torch.testing.assert_close(chain.head(chain.run(passage.entry, passage)), expected)

    # Any suffix, with two stacked carries: an unchanged one and one changed on the way.
    carry = chain.step(0, passage.entry, passage)
    changed = Carry(carry.hidden + 0.3 * torch.randn_like(carry.hidden), tuple(t * 1.5 for t in carry.extra))
    wide = chain.enter(ids.repeat(2, 1))
    stacked = chain.head(chain.run(Carry.stack([carry, changed]), wide, start=1)).split(3)
    torch.testing.assert_close(stacked[0], expected)
    torch.testing.assert_close(stacked[1], chain.head(chain.run(changed, passage, start=1)))
    assert (stacked[1] - expected).abs().max() > 1e-3


@torch.no_grad()
def test_carries_shared_keys_and_values():
    """The keys and values of Hymba's second layer are part of the carry, and changing them changes the result."""
    chain = Chain(tiny("hymba_release"))
    passage = chain.enter(batch(3, 11))
    before = chain.step(0, passage.entry, passage)
    assert not passage.entry.extra and not before.extra
    first = chain.step(1, before, passage)
    second = chain.step(2, first, passage)
    assert [tuple(t.shape) for t in first.extra] == [(3, 5, 14, 4), (3, 5, 14, 8)]
    assert all(a is b for a, b in zip(first.extra, second.extra, strict=True))
    assert not chain.step(3, second, passage).extra
    other = Carry(second.hidden, (second.extra[0], second.extra[1] * -1))
    assert not torch.allclose(chain.run(other, passage, start=3), chain.run(second, passage, start=3), atol=1e-4)


@torch.no_grad()
def test_leaves_the_model_alone():
    model = llama()
    before = {name: (set(vars(module)), len(module._forward_hooks)) for name, module in model.named_modules()}
    ids = torch.randint(0, 61, (1, 5))
    expected = model(ids).logits
    chain = Chain(model)
    passage = chain.enter(ids)
    chain.run(passage.entry, passage)
    with pytest.raises(IndexError):
        chain.enter(torch.tensor([[VOCABULARY]]))  # fails inside the bypassed forward
    assert {name: (set(vars(module)), len(module._forward_hooks)) for name, module in model.named_modules()} == before
    assert torch.equal(model(ids).logits, expected)


def test_keeps_a_forward_replaced_by_another_library():
    model = llama()
    block = model.model.layers[1]
    calls = []
    original = block.forward

    def watched(*args, **kwargs):
        calls.append(1)
        return original(*args, **kwargs)

    block.forward = watched
    chain = Chain(model)
    del calls[:]
    passage = chain.enter(torch.randint(0, 61, (1, 5)))
    assert not calls
    chain.run(passage.entry, passage)
    assert calls == [1] and block.forward is watched


def test_block_of():
    chain = Chain(tiny("mamba"))
    assert chain.block_of("backbone.layers.1.mixer.x_proj") == 1
    assert chain.block_of("lm_head") is None


class PairBlock(nn.Module):
    """Returns a tuple, as older transformers blocks do."""

    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, *args, **kwargs):
        return self.block(*args, **kwargs), None


@torch.no_grad()
def test_blocks_that_return_tuples():
    model = tiny("mamba")
    model.backbone.layers = nn.ModuleList(PairBlock(block) for block in model.backbone.layers)
    ids = torch.randint(0, 61, (2, 6))

    def forward(input_ids, use_cache=False, **kwargs):
        hidden = model.backbone.embeddings(input_ids)
        for block in model.backbone.layers:
            hidden, nothing = block(hidden)
            assert nothing is None
        return (model.backbone.norm_f(hidden),)

    model.backbone.forward = forward
    model.forward = lambda input_ids, **_: type("Output", (), {"logits": model.lm_head(forward(input_ids)[0])})
    chain = Chain(model)
    passage = chain.enter(ids)
    torch.testing.assert_close(chain.head(chain.run(passage.entry, passage)), model(ids).logits)


def test_refuses_skip_connections_between_blocks():
    config = CONFIGS["mamba"]()
    config.num_hidden_layers = 3
    model = MambaForCausalLM(config).eval()
    backbone = model.backbone

    def forward(input_ids, use_cache=False, **kwargs):
        hidden, before = backbone.embeddings(input_ids), 0
        for block in backbone.layers:
            hidden, before = block(hidden) + before, hidden
        return (backbone.norm_f(hidden),)

    backbone.forward = forward
    model.forward = lambda input_ids, **_: type("Output", (), {"logits": model.lm_head(forward(input_ids)[0])})
    with pytest.raises(InvalidInputError, match="MambaForCausalLM's blocks do not form a chain"):
        Chain(model)


def test_refuses_a_block_used_twice():
    model = llama()
    model.model.layers[1] = model.model.layers[0]
    with pytest.raises(InvalidInputError, match="one block is used several times"):
        Chain(model)


def test_refuses_logits_made_in_an_unknown_way():
    model = llama()
    forward = model.forward
    model.forward = lambda **kwargs: type("Output", (), {"logits": forward(**kwargs).logits.tanh()})
    with pytest.raises(InvalidInputError, match="LlamaForCausalLM does more to its logits than multiply"):
        Chain(model)


@pytest.mark.parametrize("family", CONFIGS)
def test_the_blocks_of_a_record_have_the_most_parameters(family):
    """The path in a family's record agrees with the search that is used for unknown models."""
    chain = Chain(tiny(family))
    lists = [m for m in chain.model.modules() if isinstance(m, nn.ModuleList)]
    largest = max(lists, key=lambda found: sum(p.numel() for p in found.parameters()))
    assert chain.blocks == list(largest)


@pytest.mark.parametrize("training", [True, False])
def test_refuses_weights_that_move(training):
    """RWKV divides weights in place in its first forward, so a sweep must not even run that one."""
    config = RwkvConfig(
        vocab_size=61,
        hidden_size=32,
        num_hidden_layers=3,
        attention_hidden_size=32,
        intermediate_size=48,
        rescale_every=2,
    )
    model = RwkvForCausalLM(config).train(training)
    before = [parameter.clone() for parameter in model.parameters()]
    with pytest.raises(
        InvalidInputError,
        match=r"rescale_every=2\), so they cannot be quantized; load it with from_pretrained\(\.\.\., rescale_every=",
    ):
        Chain(model)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    config.rescale_every = 0
    assert len(Chain(RwkvForCausalLM(config).eval()).blocks) == 3


@pytest.mark.parametrize("make", [lambda: nn.Linear(3, 3), lambda: tiny("mamba").backbone])
def test_refuses_models_that_are_not_causal_language_models(make):
    with pytest.raises(InvalidInputError, match="has no linear head"):
        Chain(make())
