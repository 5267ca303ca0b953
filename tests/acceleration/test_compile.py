"""Accelerated models under torch.compile: one of each kind of mixer, alone and with attention."""

import pickle

import pytest
import torch
from accelerated_models import logits
from cached_calls import in_chunks
from tiny_models import MIXERS, assert_no_further, batch, in_float64, tiny

import klfast
from klfast.acceleration import forwards
from klfast.models.calling import cache_argument, returned_cache


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "tokens", "pickled"),
    [(family, *((17, False) if i % 2 else (2, True))) for i, family in enumerate(MIXERS)] + [("mamba", 17, False)],
)
def test_whole_sequences_compile_without_a_break(family, tokens, pickled):
    """This includes models that have not run before, as in a new process."""
    model = tiny(family)
    ids = batch(2, tokens)
    truth, plain = logits(in_float64(model), ids), logits(model, ids)
    klfast.accelerate(model)
    stored = pickle.dumps(model)
    forwards.forget_forwards()
    model = pickle.loads(stored) if pickled else klfast.accelerate(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert_no_further(logits(compiled, ids, use_cache=False), plain, truth)


@pytest.mark.slow
@pytest.mark.parametrize(("family", "dtype"), [("qwen3_5", torch.float32), ("mamba", torch.bfloat16)])
def test_prompts_and_tokens_with_a_cache_compile(family, dtype):
    model = klfast.accelerate(tiny(family, dtype=dtype))
    ids = batch(2, 11)
    expected, _ = in_chunks(model, ids, [9, 1, 1])
    torch._dynamo.reset()
    tolerance = 2e-5 if dtype == torch.float32 else 0.05
    found, _ = in_chunks(torch.compile(model, backend="aot_eager"), ids, [9, 1, 1])
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.slow
@pytest.mark.parametrize("family", [*MIXERS, "hymba", "falcon_h1"])
def test_one_token_compiles(family):
    model = klfast.accelerate(tiny(family))
    torch._dynamo.reset()  # it limits how often it compiles one forward for other models
    compiled = torch.compile(model.forward, fullgraph=True, backend="eager")
    with torch.inference_mode():
        # From the second token on, the length of attention's cache is a symbol, which is compiled again.
        ids, name = batch(1, 8 if family in ("mamba", "hymba", "falcon_h1", "qwen3_5") else 6), cache_argument(model)
        caches = [returned_cache(model(ids[:, :5], use_cache=True)) for _ in range(2)]
        for token in ids[:, 5:].split(1, dim=1):
            found, expected = (
                forward(token, use_cache=True, **{name: cache}).logits
                for forward, cache in zip((compiled, model), caches, strict=True)
            )
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_the_convolution_compiles_with_inductor():
    """Inductor is torch.compile's default backend."""
    x, weight = torch.randn(2, 8, 9), torch.randn(8, 4)

    def convolve(x):
        return klfast.ops.causal_conv1d_fn(x, weight, activation="silu") * 2

    torch._dynamo.reset()
    # torch's disk cache also returns code compiled under another ATEN_CPU_CAPABILITY, which gives wrong results.
    with torch._inductor.config.patch(force_disable_caches=True):
        torch.testing.assert_close(torch.compile(convolve, fullgraph=True)(x), convolve(x))
