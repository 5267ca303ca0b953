"""Changes of a model after it was lowered: what the engine has copied, what it calls past, and what it holds on to."""

import functools

import pytest
import torch
from test_engine import LOWERED, quantized
from tiny_models import batch, tiny

import klfast
from klfast import Plan, QuantSpec
from klfast.core.errors import CannotLowerError
from klfast.engine.stamps import stamp
from klfast.generation.engine import engine_of, lower

COPIED = (
    "mamba",
    "mamba2",
    "qwen3_5",
    "hymba",
    "falcon_h1",
    "zamba",
    "minimax",
    "kimi_linear",
    "lfm2",
    "nemotron_h_moe",
)


def one_of_each_kind(model):
    """Return the last of the tensors whose names differ in numbers alone."""
    kinds = {}
    for name, t in (*model.named_parameters(), *model.named_buffers()):
        kinds[".".join(part for part in name.split(".") if not part.isdigit())] = name, t.data
    return [found for kind, found in kinds.items() if not kind.endswith("weight_shape")]


def write(name, t):
    if t.is_floating_point():
        t.mul_(1.5).add_(0.25)
    elif name.endswith("correction_rows"):
        t.sub_(1)
    else:
        t.bitwise_xor_(0x11)


def assert_noticed_or_followed(model, ids):
    """Write to one tensor after another: either it is noticed, or the engine gives what a new one does.

    Writes to ``.data`` are those that torch does not count.
    """
    engine, stale = lower(model), []
    for name, t in one_of_each_kind(model):
        before = t.clone()
        write(name, t)
        if engine.is_current():
            found, expected = (each(ids, each.state(len(ids))) for each in (engine, lower(model)))
            assert torch.equal(found, expected), name
        else:
            stale.append(name)
        t.copy_(before)
        assert engine.is_current(), name
    return stale


@torch.no_grad()
@pytest.mark.parametrize("family", LOWERED)
def test_a_write_to_any_tensor_is_noticed_or_followed(family):
    model = tiny(family)
    stale = assert_noticed_or_followed(model, batch(2, 5))
    assert not [name for name in stale if name.endswith("proj.weight")], "the engine reads these where they lie"


@torch.no_grad()
@pytest.mark.parametrize("family", ["mamba2", "qwen3_5"])
def test_a_write_to_any_quantized_tensor_is_noticed_or_followed(family):
    assert_noticed_or_followed(quantized(tiny(family), "int4-g16-asym"), batch(2, 5))


@torch.no_grad()
def test_a_write_to_the_numbers_of_corrected_rows_is_noticed():
    model, ids = tiny("mamba2", tied=True), batch(2, 5)
    layer = "backbone.layers.1.mixer.in_proj"
    specs = {"lm_head": QuantSpec(4, 16, corrected=5), layer: QuantSpec(4, 16, corrected=4, first_corrected=264)}
    klfast.quantize_model(model, Plan(specs, "uniform"))
    stale = assert_noticed_or_followed(model, ids)
    assert {f"{name}.weight_correction_rows" for name in specs} <= set(stale)


@pytest.mark.parametrize("family", COPIED)
def test_texts_follow_new_weights(family, one_thread):
    model, other, ids = tiny(family), tiny(family, seed=1), batch(1, 9)

    def assert_equal_texts():
        with torch.no_grad():
            text = ids
            for _ in range(7):  # without a cache, in which minimax counts wrongly
                text = torch.cat([text, model(text, use_cache=False).logits[:, -1:].argmax(-1)], 1)
        assert torch.equal(klfast.generate(model, ids, 7), text)
        assert engine_of(model).is_current()

    assert_equal_texts()
    model.load_state_dict(other.state_dict())
    assert_equal_texts()
    generator = torch.Generator().manual_seed(3)
    for fused in (False, True):  # torch does not count what fused optimizers write
        for parameter in model.parameters():
            if parameter.is_floating_point() and parameter.requires_grad:
                parameter.grad = torch.randn(parameter.shape, generator=generator)
        torch.optim.SGD([p for p in model.parameters() if p.grad is not None], lr=0.1, fused=fused).step()
        assert_equal_texts()


def test_inference_tensors_have_no_count_of_writes():
    with torch.inference_mode():
        model, ids = tiny("mamba"), batch(1, 5)
        engine = engine_of(model)
        model.backbone.layers[0].mixer.A_log.add_(0.5)
    assert not engine.is_current()
    found, expected = (each(ids, each.state()) for each in (engine_of(model), lower(model)))
    assert torch.equal(found, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8, torch.bool])
def test_stamps_of_odd_sizes_and_places(dtype):
    t = torch.zeros(9, dtype=dtype)
    for part in (t, t[1:], t[3:6], t[1:2], t[::2]):
        before = stamp(part)
        for i in range(len(part)):
            part[i] = 1
            assert stamp(part)[1] != before[1]
            part[i] = 0
        counted = stamp(part)
        assert counted[1] == before[1] and counted[0] > before[0]
    assert stamp(t[:0]) == stamp(t[9:])


PARTS = [
    *(("llama", name) for name in ("", "model", "model.rotary_emb", "model.layers.1.mlp.act_fn", "model.norm")),
    *(("mamba", name) for name in ("", "backbone", "backbone.embeddings", "backbone.layers.0.norm")),
    *(("granite_hybrid_moe", name) for name in ("model.layers.0.shared_mlp.activation", "model.rotary_emb")),
    *(("qwen3_5", name) for name in ("model", "model.layers.1.mlp.act_fn")),
    *(("minimax", name) for name in ("model", "model.layers.0.self_attn.act_fn")),
]


@pytest.mark.parametrize(("family", "name"), PARTS)
def test_hooks_of_all_parts_count(family, name):
    model, ids, calls = tiny(family), batch(1, 5), []
    engine, module, called = engine_of(model), model.get_submodule(name), name or "the model"
    for register in (module.register_forward_hook, module.register_forward_pre_hook):
        assert engine.is_current()
        handle = register(lambda *_: calls.append(1))
        assert not engine.is_current()
        with pytest.raises(CannotLowerError, match=rf"^{called} has hooks$"):
            lower(model)
        assert klfast.explain(model).reason == f"{called} has hooks"
        klfast.generate(model, ids, 2)
        assert calls
        calls.clear()
        handle.remove()
    assert engine.is_current()
    forward = module.forward

    @functools.wraps(forward)
    def replaced(*args, **kwargs):
        calls.append(1)
        return forward(*args, **kwargs)

    module.forward = replaced
    assert not engine.is_current()
    with pytest.raises(CannotLowerError, match=rf"^{called} has a replaced forward$"):
        lower(model)
    klfast.generate(model, ids, 2)
    assert calls
    del module.forward
    assert engine.is_current() and engine_of(model).is_current()


@pytest.mark.parametrize(
    ("family", "name"), [("llama", "model"), ("llama", "model.rotary_emb"), ("mamba", ""), ("minimax", "model")]
)
def test_parts_of_other_classes_are_left_to_the_model(family, name):
    model = tiny(family)
    module = model.get_submodule(name)
    module.__class__ = type("Other", (type(module),), {})
    with pytest.raises(CannotLowerError, match=rf"^{name or 'the model'} is a Other of test_changes$"):
        lower(model)
