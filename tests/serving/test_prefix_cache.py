"""States after the beginnings of texts, and the texts that go on from them."""

import math

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


def restored(prefix, engine):
    state = engine.state()
    prefix.restore(state)
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
    torch.testing.assert_close(engine(ids[row : row + 1, 13:], restored(found, engine)), truth[1], rtol=1e-5, atol=1e-4)
    again = engine(ids[row : row + 1, 13:], restored(found, engine))
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
def test_keeps_what_grows_once_for_all_that_begin_alike(engine):
    text, other, cache = *batch(2, 30).tolist(), PrefixCache(10**9)
    texts = [text[:8], text[:19], text, text[:13], text[:8] + other[:9], text[:8] + other]
    for one in texts:
        kept(cache, engine, one)
    places = 8 + 11 + 11 + 5 + 9 + 21  # of each text, those that the longest beginning kept before it lacks
    size = {True: 0, False: 0}
    for spec in engine.state().specs:
        shape = [n for i, n in enumerate(spec.shape) if i != spec.growing]
        size[spec.growing is not None] += math.prod(shape) * spec.dtype.itemsize
    learned = int(engine.state().seen[0])
    assert cache.nbytes == len(texts) * (size[False] + 4 * VOCABULARY) + (places + learned) * size[True]
    for one in texts:
        state, truth = restored(cache.longest(one), engine), engine.state()
        logits = engine(torch.tensor([one]), truth)
        assert int(state.seen) == int(truth.seen) and torch.equal(cache.longest(one).logits, logits)
        for spec, mine, theirs in zip(state.specs, state.tensors, truth.tensors, strict=True):
            end = len(one) + learned
            torch.testing.assert_close(spec.places(mine, 0, end), spec.places(theirs, 0, end), rtol=1e-5, atol=1e-4)


@torch.inference_mode()
def test_forgets_the_ends_of_texts_before_their_beginnings(engine):
    text, other = batch(2, 30).tolist()
    probe = PrefixCache(10**9)
    for one in (text[:10], text[:20], text, other):
        kept(probe, engine, one)
    cache = PrefixCache(probe.nbytes - 1)
    for one in (text[:10], text[:20], text, other):
        kept(cache, engine, one)
        cache.longest(text)
    assert cache.longest(text).tokens == 20 and cache.longest(other).tokens == 30
    torch.testing.assert_close(
        engine(torch.tensor([text[20:]]), restored(cache.longest(text), engine)),
        engine(torch.tensor([text]), engine.state()),
        rtol=1e-5,
        atol=1e-4,
    )


@torch.inference_mode()
def test_keeps_nothing_larger_than_itself(engine):
    for most in (0, 100):
        cache = PrefixCache(most)
        kept(cache, engine, [1, 2, 3])
        assert len(cache) == cache.nbytes == 0 and cache.longest([1, 2, 3]) is None


@torch.inference_mode()
def test_without_memory_for_a_copy_the_text_is_not_kept(engine):
    cache = PrefixCache(2**62)
    logits = torch.zeros(1, 1).expand(1, 2**45)  # a copy is of 128 TiB
    cache.put([1, 2, 3], engine.state(), 0, logits)
    assert len(cache) == cache.nbytes == 0 and cache.longest([1, 2, 3]) is None
    kept(cache, engine, [1, 2, 3])
    assert cache.longest([1, 2, 3]).tokens == 3
