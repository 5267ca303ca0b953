"""States of earlier texts, and the texts that go on from them."""

import pytest
import torch
from tiny_models import VOCABULARY, batch, tiny

from klfast.generation.engine import lower
from klfast.serving.prefix_cache import PrefixCache

FAMILIES = ("mamba2", "granite_hybrid", "qwen3_5", "hymba")  # Hymba's states begin with learned positions


@pytest.fixture(scope="module", params=FAMILIES)
def engine(request):
    return lower(tiny(request.param))


@torch.inference_mode()
def kept(cache, engine, tokens):
    state = engine.state()
    cache.put(tokens, state, 0, engine(torch.tensor([tokens]), state))
    return state


@torch.inference_mode()
def test_finds_the_longest_beginning(engine):
    text, cache = batch(1, 30)[0].tolist(), PrefixCache(10**9)
    for length in (3, 17, 9):
        kept(cache, engine, text[:length])
    kept(cache, engine, [VOCABULARY - 1 - text[0], *text[1:20]])
    assert [cache.longest(text[:n]).tokens for n in (3, 8, 9, 16, 17, 30)] == [3, 3, 9, 9, 17, 17]
    assert cache.longest(text[:2]) is None


@torch.inference_mode()
@pytest.mark.parametrize("row", [0, 2])
def test_goes_on_as_the_whole_does(engine, row):
    ids, cache = batch(3, 21), PrefixCache(10**9)
    state = engine.state(3)
    logits = engine(ids[:, :13], state)
    text = ids[row].tolist()
    cache.put(text[:13], state, row, logits[row : row + 1])
    engine(ids[:, 13:], state)  # what follows must not change the copy
    whole = engine.state()
    truth = [engine(ids[row : row + 1, part], whole) for part in (slice(13), slice(13, 21))]
    found = cache.longest(text)
    torch.testing.assert_close(found.logits, truth[0], rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(engine(ids[row : row + 1, 13:], found.state.copy()), truth[1], rtol=1e-5, atol=1e-4)
    again = engine(ids[row : row + 1, 13:], found.state.copy())
    torch.testing.assert_close(again, truth[1], rtol=1e-5, atol=1e-4)


@torch.inference_mode()
def test_forgets_what_was_used_least_recently(engine):
    texts = [batch(1, 12, seed)[0].tolist() for seed in range(4)]
    probe = PrefixCache(10**9)
    kept(probe, engine, texts[0])
    cache = PrefixCache(3 * probe.nbytes)
    for text in texts[:3]:
        kept(cache, engine, text)
    cache.longest(texts[0])
    kept(cache, engine, texts[3])
    assert [cache.longest(text) is not None for text in texts] == [True, False, True, True]
    assert len(cache) == 3 and cache.nbytes == 3 * probe.nbytes
    kept(cache, engine, texts[0])  # again: nothing more
    assert cache.nbytes == 3 * probe.nbytes


@torch.inference_mode()
def test_takes_no_more_room_than_tokens_need(engine):
    short, long = PrefixCache(10**9), PrefixCache(10**9)
    state = kept(short, engine, batch(1, 5)[0].tolist())
    kept(long, engine, batch(1, 40)[0].tolist())
    growing = sum(spec.growing is not None for spec in state.specs)
    assert (long.nbytes > short.nbytes) == bool(growing)
    if growing:
        assert state.nbytes > long.nbytes - short.nbytes  # it has room for 256


@torch.inference_mode()
def test_keeps_nothing_larger_than_itself(engine):
    for most in (0, 100):
        cache = PrefixCache(most)
        kept(cache, engine, [1, 2, 3])
        assert len(cache) == cache.nbytes == 0 and cache.longest([1, 2, 3]) is None
