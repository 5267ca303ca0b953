"""Accelerated models on Triton's kernels against the plain ones, tiny and random."""

import pytest
import torch
from cached_calls import in_chunks
from klfast.kernels.launch import Launch
from tiny_models import STATE_SPACE, VOCABULARY, tiny

import klfast


@pytest.fixture(params=STATE_SPACE)
def model(request, device, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # the plain model's convolution
    return tiny(request.param).to(device)


@pytest.fixture
def launched(monkeypatch):
    """Record the names of the kernels that run."""
    names, run = set(), Launch.run

    def record(launch):
        names.add(launch.kernel.__name__)
        run(launch)

    monkeypatch.setattr(Launch, "run", record)
    return names


def ids(device, *shape):
    return torch.randint(2, VOCABULARY, shape).to(device)


def with_states(model, x, lengths):
    """Return logits of x and the last layer's states, lengths tokens at a time."""
    logits, cache = in_chunks(model, x, lengths)
    layer = cache.layers[-1]
    return logits, layer.conv_states[0], layer.recurrent_states[0]


@pytest.mark.parametrize("shape", [(1, 1), (2, 19)])
def test_logits(model, device, launched, shape):
    x = ids(device, *shape)
    with torch.inference_mode():
        plain = model(x).logits
        assert not launched
        torch.testing.assert_close(klfast.accelerate(model)(x).logits, plain, atol=2e-5, rtol=2e-5)
    assert launched == {"causal_conv1d", "selective_scan", "rms_norm"}


@pytest.mark.parametrize("lengths", [[1, 1], [9, 1, 4, 1]], ids=str)
def test_logits_and_states_with_a_cache(model, device, lengths):
    x = ids(device, 2, sum(lengths))
    plain = with_states(model, x, lengths)
    for fast, expected in zip(with_states(klfast.accelerate(model), x, lengths), plain, strict=True):
        torch.testing.assert_close(fast, expected, atol=2e-5, rtol=2e-5)


def test_generates_the_same_tokens(model, device):
    x = ids(device, 2, 5)
    with torch.inference_mode():
        plain = model.generate(x, max_new_tokens=3, do_sample=False)
        torch.testing.assert_close(
            klfast.accelerate(model).generate(x, max_new_tokens=3, do_sample=False), plain, rtol=0, atol=0
        )
        torch.testing.assert_close(klfast.generate(model, x, 3), plain, rtol=0, atol=0)


def test_hymba(device, launched):
    """Global and sliding layers, a prompt longer than the window, then tokens one and several at a time."""
    model, x = tiny("hymba").to(device), ids(device, 2, 19)

    def logits_and_all_states():
        logits, cache = in_chunks(model, x, [13, 1, 4, 1])
        return logits, *(t for state in cache.layers for t in vars(state).values() if t is not None)

    with klfast.using("reference"):
        plain = logits_and_all_states()
    assert not launched
    for fast, expected in zip(logits_and_all_states(), plain, strict=True):
        torch.testing.assert_close(fast, expected, atol=2e-5, rtol=2e-5)
    assert launched == {"causal_conv1d", "keep_last", "selective_scan", "rms_norm", "decode_attention"}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_logits_are_no_further_from_the_truth(model, device, launched, dtype):
    x = ids(device, 2, 19)
    with torch.inference_mode():
        truth = model(x).logits
        plain = model.to(dtype)(x).logits
        fast = klfast.accelerate(model)(x).logits
    scan = {"ssd_states", "ssd_outputs"} if model.config.model_type == "mamba2" else {"selective_scan"}
    assert launched == {"causal_conv1d", "rms_norm"} | scan
    # Two draws of roundings over 38 tokens; the interpreter truncates bfloat16 instead of rounding.
    factor = 1.25 if device.type != "cpu" else 2
    assert (fast - truth).square().mean().sqrt() <= factor * (plain - truth).square().mean().sqrt() + 1e-4
