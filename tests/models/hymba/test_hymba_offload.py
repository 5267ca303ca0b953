"""Hymba with weights offloaded as by accelerate."""

import functools

import pytest
import torch
from tiny_models import batch, tiny

import klfast
from klfast.models.linears import linears


class OffloadHook:
    """Stand-in for the hook of accelerate's cpu_offload: weights are on the meta device except during a call."""

    def __init__(self, module):
        self.weights = {
            name: (dict_, tensor)
            for dict_ in (module._parameters, module._buffers)
            for name, tensor in dict_.items()
            if tensor is not None
        }
        self.loaded = 0
        self.post_forward(module, None)

    def pre_forward(self, module, *args, **kwargs):
        self.loaded += 1
        for name, (dict_, tensor) in self.weights.items():
            dict_[name] = tensor

    def post_forward(self, module, output):
        for name, (dict_, tensor) in self.weights.items():
            dict_[name] = (
                torch.nn.Parameter(tensor.to("meta"), tensor.requires_grad)
                if isinstance(tensor, torch.nn.Parameter)
                else tensor.to("meta")
            )


def offload(model):
    for module in list(model.modules()):
        if not any(True for _ in (*module.parameters(recurse=False), *module.buffers(recurse=False))):
            continue
        module._hf_hook, forward = OffloadHook(module), module.forward

        def hooked(module, forward, *args, **kwargs):
            module._hf_hook.pre_forward(module)
            try:
                return forward(*args, **kwargs)
            finally:
                module._hf_hook.post_forward(module, None)

        module.forward = functools.partial(hooked, module, forward)


@pytest.mark.parametrize("quantized", [False, True])
@torch.inference_mode()
def test_a_model_with_offloaded_weights(quantized):
    model = tiny("hymba")
    if quantized:
        klfast.quantize_model(model, klfast.Plan({name: klfast.QuantSpec(8, 16) for name in linears(model)}, "uniform"))
    klfast.accelerate(model)
    ids = batch(2, 9)
    expected, tokens = model(ids).logits, model.generate(ids, max_new_tokens=4, do_sample=False)
    offload(model)
    mixer = model.model.layers[0].mamba
    assert mixer.conv1d.weight.is_meta and mixer.A_log[0].is_meta
    torch.testing.assert_close(model(ids).logits, expected)
    assert torch.equal(model.generate(ids, max_new_tokens=4, do_sample=False), tokens)
    assert mixer.conv1d.weight.is_meta and mixer.conv1d._hf_hook.loaded
