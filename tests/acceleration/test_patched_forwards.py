"""accelerate beside other libraries that patch forwards."""

import functools
import sys
import warnings

import pytest
import torch
from accelerated_models import logits, mixers
from tiny_models import batch, tiny

import klfast
from klfast.acceleration.patch import is_accelerated
from klfast.models.families import mixer_of


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


def test_an_accelerated_layer_of_another_class_runs_that_class():
    class Linear(torch.nn.Linear):
        def forward(self, x):
            return 1.3 * super().forward(x)

    def changed(model):
        mixers(model)[0].in_proj.__class__ = Linear
        return model

    expected = logits(changed(tiny("mamba2")), batch())
    torch.testing.assert_close(
        logits(changed(klfast.accelerate(tiny("mamba2"))), batch()), expected, rtol=2e-5, atol=2e-5
    )


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
