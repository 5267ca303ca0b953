"""A layer whose tensors another thread replaces: a direct call uses old or new ones, never freed memory."""

import threading
import time

import pytest
import torch
import transformers
from torch import nn

from klfast import QuantLinear, QuantSpec
from klfast.nn import direct_call, mamba_step

SECONDS = 1.5


def replace(home, name, tensor):
    home[name] = nn.Parameter(tensor, requires_grad=False) if isinstance(home[name], nn.Parameter) else tensor


def other_memory(home, name, tensor):
    home[name].data = tensor


def wrong_results(home, name, values, change, call):
    """Return how many calls matched none of ``values`` while another thread changes them, and the number of calls."""
    expected = []
    for value in values:
        change(home, name, value.clone())
        expected.append(call())
    stop, wrong, calls, changes = threading.Event(), 0, 0, 0

    def keep_changing():
        nonlocal changes
        with torch.no_grad():
            while not stop.is_set():
                change(home, name, values[changes % len(values)].clone())
                torch.full_like(values[0], -1)  # in the freed memory
                changes += 1

    thread = threading.Thread(target=keep_changing)
    thread.start()
    try:
        end = time.monotonic() + SECONDS
        while time.monotonic() < end:
            found = call()
            if found is not None:
                calls += 1
                wrong += not any(torch.equal(found, one) for one in expected)
    finally:
        stop.set()
        thread.join()
    assert changes > 10 and calls > 10
    return wrong


@pytest.mark.parametrize("change", [replace, other_memory])
def test_quantized_layer(change, one_thread):
    first, second = (QuantLinear.from_linear(nn.Linear(512, 512), QuantSpec(8, 64)) for _ in range(2))
    x = torch.randn(1, 512)
    with torch.no_grad():
        values = (first.weight_packed, second.weight_packed)
        assert not wrong_results(first._buffers, "weight_packed", values, change, lambda: direct_call.linear(first, x))


@pytest.mark.parametrize("change", [replace, other_memory])
def test_dense_layer(change, one_thread):
    layer, x = nn.Linear(512, 512).bfloat16(), torch.randn(1, 512).bfloat16()
    values = [torch.randn(512, 512).bfloat16() for _ in range(2)]
    with torch.no_grad():
        assert not wrong_results(layer._parameters, "weight", values, change, lambda: direct_call.linear(layer, x))


@pytest.mark.parametrize("part", ["x_proj", "A_log"])
def test_mamba_step(part, one_thread):
    config = transformers.MambaConfig(vocab_size=16, hidden_size=512, num_hidden_layers=1, state_size=16)
    mixer = transformers.MambaForCausalLM(config).backbone.layers[0].mixer.requires_grad_(False)
    own = mixer._parameters
    parts = mamba_step.Parts(mixer.conv1d, mixer.x_proj, mixer.dt_proj, (own, "A_log"), (own, "D"))
    hidden, x, z = torch.randn(1, 1, 512), torch.randn(1, 1024), torch.randn(1, 1024)
    states = torch.randn(1, 1024, 4), torch.randn(1, 1024, 16)

    def call():
        conv_state, ssm_state = (t.clone() for t in states)
        step = mamba_step.prepare(mixer, parts, hidden, conv_state, ssm_state)
        return None if step is None else step(x, z, conv_state, ssm_state)

    home, name = (mixer.x_proj._parameters, "weight") if part == "x_proj" else (own, "A_log")
    with torch.no_grad():
        values = [home[name].data, home[name].data * 0.5 + 0.25]
        assert not wrong_results(home, name, values, other_memory, call)
