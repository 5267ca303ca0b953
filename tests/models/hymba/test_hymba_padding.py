"""Hymba on batches with padding: each row gives the results of its text alone."""

import pytest
import torch
from cached_calls import GENERATE_CACHE
from hymba_models import golden_model, golden_tensors, tiny_model

import klfast
from klfast.models.hymba import HymbaCache

pytestmark = pytest.mark.usefixtures("one_thread")
LENGTHS = (30, 1, 17, 8, 29)


def batch(side, vocab=61):
    """Return rows of LENGTHS tokens, the mask, and the separate rows."""
    width = max(LENGTHS)
    rows = [torch.randint(0, vocab, (n,)) for n in LENGTHS]
    ids, mask = torch.randint(0, vocab, (len(rows), width)), torch.zeros(len(rows), width, dtype=torch.long)
    for row, (text, n) in enumerate(zip(rows, LENGTHS, strict=True)):
        place = {
            "left": torch.arange(width - n, width),
            "right": torch.arange(n),
            "scattered": torch.randperm(width)[:n].sort().values,
        }[side]
        ids[row, place], mask[row, place] = text, 1
    return ids, mask, rows


@pytest.mark.parametrize("memory", [0, 3])
@pytest.mark.parametrize("side", ["left", "right", "scattered"])
@torch.inference_mode()
def test_forward(side, memory):
    model = tiny_model(num_memory_tokens=memory)
    ids, mask, rows = batch(side)
    out = model(ids, attention_mask=mask, output_hidden_states=True)
    assert out.logits.isfinite().all()
    for row, text in enumerate(rows):
        alone = model(text.unsqueeze(0), output_hidden_states=True)
        torch.testing.assert_close(out.logits[row, mask[row] == 1], alone.logits[0], rtol=0, atol=1e-4)
        for found, expected in zip(out.hidden_states, alone.hidden_states, strict=True):
            torch.testing.assert_close(found[row, :memory], expected[0, :memory], rtol=0, atol=1e-4)
            torch.testing.assert_close(found[row, memory:][mask[row] == 1], expected[0, memory:], rtol=0, atol=1e-4)


@pytest.mark.parametrize("side", ["left", "right"])
@torch.inference_mode()
def test_continuing(side):
    """Continue a padded batch, in steps and in chunks, until everything has left the window."""
    model = tiny_model()
    ids, mask, rows = batch(side)
    cache = model(ids, attention_mask=mask, use_cache=True).past_key_values
    more = torch.randint(0, 61, (len(rows), 20))
    logits = []
    for part in more.split([1, 1, 9, 1, 8], dim=1):
        mask = torch.cat((mask, torch.ones_like(part)), dim=1)
        logits.append(model(part, attention_mask=mask, past_key_values=cache).logits)
    logits = torch.cat(logits, dim=1)
    for row, text in enumerate(rows):
        alone = model(torch.cat((text, more[row])).unsqueeze(0)).logits[0, -20:]
        torch.testing.assert_close(logits[row], alone, rtol=0, atol=1e-4)


@torch.inference_mode()
def test_mask_of_ones_changes_nothing():
    model = tiny_model()
    ids = torch.randint(0, 61, (2, 30))
    assert torch.equal(model(ids, attention_mask=torch.ones_like(ids)).logits, model(ids).logits)


@torch.inference_mode()
def test_generation_left_padded():
    model, expected = golden_model("hybrid_full"), golden_tensors("hybrid_full")
    long, prompts = expected["long.input_ids"], (5, 12, 40)
    ids, mask = torch.zeros(3, 40, dtype=torch.long), torch.zeros(3, 40, dtype=torch.long)
    for row, n in enumerate(prompts):
        ids[row, 40 - n :], mask[row, 40 - n :] = long[0, :n], 1
    want = torch.cat([expected[f"gen{n}.consistent.tokens"] for n in prompts])
    options = {
        "max_new_tokens": 24,
        "do_sample": False,
        "eos_token_id": None,
        "pad_token_id": 0,
        "attention_mask": mask,
    }
    for use_cache in (True, False):
        assert torch.equal(model.generate(ids, use_cache=use_cache, **options)[:, 40:], want)
    assert torch.equal(klfast.generate(model, ids, 24, attention_mask=mask)[:, 40:], want)


@torch.inference_mode()
def test_sampling_left_padded():
    """Rows may end at different lengths, and a prompt may come in pieces."""
    model = tiny_model()
    ids, mask, _ = batch("left")
    options = {
        "max_new_tokens": 20,
        "do_sample": True,
        "temperature": 0.8,
        "top_p": 0.9,
        "eos_token_id": [3, 7, 11, 19, 23, 42],
        "pad_token_id": 0,
    }
    found = []
    for more in (
        {"use_cache": False},
        {"use_cache": True},
        {"use_cache": True, GENERATE_CACHE: HymbaCache(model.config), "prefill_chunk_size": 29},
    ):
        torch.manual_seed(5)
        found.append(model.generate(ids, attention_mask=mask, **options, **more))
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    ended = (found[0][:, 30:] == 0).sum(1)
    assert len(set(ended.tolist())) > 1


@torch.inference_mode()
def test_reordered_rows():
    """Reorder the cache's rows, each with its own padding."""
    model, order = tiny_model(), torch.tensor([3, 0, 4, 1, 1])
    ids, mask, rows = batch("left")
    cache = model(ids, attention_mask=mask, use_cache=True).past_key_values
    cache.reorder_cache(order)
    more = torch.randint(0, 61, (5, 4))
    logits = model(
        more, attention_mask=torch.cat((mask[order], torch.ones_like(more)), dim=1), past_key_values=cache
    ).logits
    for row, source in enumerate(order):
        alone = model(torch.cat((rows[source], more[row])).unsqueeze(0)).logits[0, -4:]
        torch.testing.assert_close(logits[row], alone, rtol=0, atol=1e-4)


@torch.inference_mode()
def test_beam_search_left_padded():
    model = tiny_model()
    ids, mask, _ = batch("left")
    options = {
        "max_new_tokens": 10,
        "num_beams": 3,
        "do_sample": False,
        "eos_token_id": None,
        "pad_token_id": 0,
        "attention_mask": mask,
    }
    assert torch.equal(model.generate(ids, use_cache=True, **options), model.generate(ids, use_cache=False, **options))
