"""Beam search against transformers' own, on the engine and on the models' caches."""

import pytest
import torch
from tiny_models import batch, left_padded, tiny
from tokenizer_kinds import tokenizer
from transformers import GenerationConfig
from writing_model import writing_model

import klfast
from klfast.core import errors

pytestmark = pytest.mark.usefixtures("one_thread")
ENGINE = ("llama", "mamba", "mamba2", "hymba", "granite_hybrid", "falcon_h1", "qwen3_5", "lfm2", "mistral")
CACHES = ("llama", "mamba2", "hymba", "granite_hybrid", "qwen3_5", "gemma2", "gpt2", "zamba2")
OPTIONS = [
    dict(num_beams=2),
    dict(num_beams=4, num_return_sequences=3, length_penalty=2.0),
    dict(num_beams=3, num_return_sequences=3, length_penalty=-1.0, early_stopping=True),
    dict(num_beams=3, num_return_sequences=2, length_penalty=0.3, early_stopping="never"),
]


def some(families):
    """Pair one family with all options, since they belong to the search, and each other one with some."""
    others = [(family, OPTIONS[i % len(OPTIONS)]) for i, family in enumerate(families) if family != "llama"]
    return pytest.mark.parametrize(("family", "options"), [*(("llama", each) for each in OPTIONS), *others], ids=str)


def ends_of(model, ids):
    """Return end tokens that some of the most likely texts have soon and others late."""
    free = klfast.generate(model, ids, 12, num_beams=4, num_return_sequences=4)[:, ids.shape[1] :]
    return sorted({int(free[0, 2]), int(free[-1, 6])})


def assert_equal(model, ids, mask, **options):
    expected = model.generate(
        ids,
        attention_mask=torch.ones_like(ids) if mask is None else mask,
        do_sample=False,
        max_new_tokens=12,
        **options,
    )
    assert torch.equal(klfast.generate(model, ids, 12, attention_mask=mask, **options), expected)
    return expected


@some(ENGINE)
def test_equals_transformers_on_the_engine(family, options):
    model, ids = tiny(family), batch(3, 9)
    klfast.lower(model)  # or the caches would run
    assert_equal(model, ids, None, **options, pad_token_id=60)
    ends = dict(eos_token_id=ends_of(model, ids), pad_token_id=60)
    found = assert_equal(model, ids, left_padded(ids), **options, **ends)
    assert (found[:, 9:] == 60).any() or options.get("length_penalty") != -1  # with -1, short texts win


@some(CACHES)
def test_equals_transformers_on_caches(family, options):
    model, ids = tiny(family), batch(3, 9)
    with klfast.using("reference"):
        ends = dict(eos_token_id=ends_of(model, ids), pad_token_id=60)
        assert_equal(model, ids, left_padded(ids), **options, **ends)


def test_more_rows_than_an_engine_takes():
    model, ids = tiny("mamba2"), batch(5, 9)
    assert_equal(model, ids, None, num_beams=4, pad_token_id=60)


def test_penalties_count_in_each_beam():
    model, ids = tiny("llama"), batch(2, 9)
    found = assert_equal(model, ids, None, num_beams=3, repetition_penalty=1.4, pad_token_id=60)
    assert not torch.equal(found, klfast.generate(model, ids, 12, num_beams=3))


def test_stop_strings_end_beams():
    words = tokenizer("byte-level BPE")
    model, prompt = writing_model(words), torch.tensor([words("The sea was")["input_ids"]])
    free = klfast.generate(model, prompt, 12, num_beams=4)[0, prompt.shape[1] :]
    stop = words.decode(free[5:7])[1:]
    options = dict(num_beams=4, num_return_sequences=4, stop_strings=[stop], tokenizer=words, pad_token_id=60)
    found = klfast.generate(model, prompt, 12, **options)
    expected = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=12, **options
    )
    assert torch.equal(
        found, expected.where(expected >= 0, 60)
    )  # transformers fills with -1 where no token ends a text
    assert any(stop in words.decode(row[prompt.shape[1] :]) for row in found)


def test_early_stopping_decides_when_a_search_ends():
    model, ids = tiny("llama"), batch(8, 9)
    options = dict(num_beams=2, length_penalty=2.0, eos_token_id=list(range(0, 60, 6)), pad_token_id=60)
    found = [assert_equal(model, ids, None, early_stopping=early, **options) for early in (True, False, "never")]
    assert not torch.equal(found[0], found[1]) and not torch.equal(found[1], found[2])


def test_a_search_that_ends_early_feeds_no_more():
    model, ids = tiny("llama"), batch(1, 9)
    first = klfast.generate(model, ids, 1, num_beams=2, num_return_sequences=2)[:, -1].tolist()
    notes = klfast.Transcript()
    found = klfast.generate(model, ids, 50, num_beams=2, early_stopping=True, eos_token_id=first, transcript=notes)
    assert found.shape[1] == 10 and notes.new_tokens == 1 and notes.prompt_tokens == 9


def test_generation_config_completes_the_options():
    model, ids = tiny("llama"), batch(2, 9)
    model.generation_config = GenerationConfig(
        length_penalty=-2.0, early_stopping=True, eos_token_id=ends_of(model, ids), pad_token_id=60
    )
    found = klfast.generate(model, ids, 12, num_beams=3)
    mask = torch.ones_like(ids)
    assert torch.equal(found, model.generate(ids, attention_mask=mask, max_new_tokens=12, num_beams=3))
    assert not torch.equal(found, klfast.generate(model, ids, 12, num_beams=3, length_penalty=2.0))


def test_no_new_tokens():
    ids = batch(2, 5)
    assert torch.equal(
        klfast.generate(tiny("llama"), ids, 0, num_beams=3, num_return_sequences=2), ids.repeat_interleave(2, 0)
    )


@pytest.mark.filterwarnings("ignore::klfast.SlowPathWarning")
@pytest.mark.parametrize(("family", "message"), [("rwkv", "row by row"), ("xlstm", "cannot change places")])
def test_models_whose_rows_cannot_change_places(family, message):
    with pytest.raises(errors.InvalidInputError, match=f"{message}.*; leave num_beams out"):
        klfast.generate(tiny(family), batch(1, 9), 5, num_beams=3)


def test_a_damaged_model():
    model = tiny("mamba")
    with torch.no_grad():
        model.backbone.norm_f.weight[0] = torch.nan
    with pytest.raises(errors.InvalidInputError, match="logits hold a NaN"):
        klfast.generate(model, batch(), 3, num_beams=2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(num_beams=0), "^num_beams must be an integer"),
        (dict(num_beams=2.0), "^num_beams must be an integer"),
        (dict(length_penalty=float("nan")), "^length_penalty must be between -10 and 10"),
        (dict(length_penalty=11), "^length_penalty must be between"),
        (dict(early_stopping="soon"), '^early_stopping must be True, False or "never"'),
        (dict(temperature=1.0), "leave do_sample and temperature out"),
        (dict(num_return_sequences=4), "^num_return_sequences must be at most num_beams, 3, got 4"),
        (dict(callback=print), "leave out callback, streamer, logprobs"),
        (dict(transcript=klfast.Transcript(logprobs=1)), "leave out callback, streamer, logprobs"),
    ],
)
def test_refuses_options(options, message):
    with pytest.raises(errors.InvalidInputError, match=message):
        klfast.generate(tiny("llama"), batch(), 3, **{"num_beams": 3, **options})
