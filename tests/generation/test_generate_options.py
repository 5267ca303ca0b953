"""Options of generate beyond the most likely tokens, against transformers' own generate."""

import numpy as np
import pytest
import torch
from tiny_models import VOCABULARY, batch, left_padded, tiny
from tokenizer_kinds import tokenizer
from transformers import GenerationConfig
from transformers.generation.streamers import BaseStreamer
from writing_model import writing_model

import klfast
from klfast.core import errors

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def model():
    return tiny("llama")


@pytest.fixture(scope="module")
def writer():
    """Return a model that writes letters and spaces, and its byte-level tokenizer."""
    words = tokenizer("byte-level BPE")
    return writing_model(words), words


def texts_within(words, ids):
    """Return texts within the tokens' text: across a border of two, the beginning of one, and two complete tokens."""
    whole = words.decode(ids)
    border = len(words.decode(ids[:8]))
    return [whole[border - 1 : border + 1], words.decode(ids[9:10])[:1], words.decode(ids[5:7])]


def test_stop_strings_end_where_transformers_does(writer):
    model, words = writer
    prompt = torch.tensor([words("The sea was")["input_ids"]])
    free = klfast.generate(model, prompt, 24)[0, prompt.shape[1] :].tolist()
    stops = texts_within(words, free)
    for given in [*stops, stops]:
        expected = model.generate(
            prompt, do_sample=False, max_new_tokens=24, stop_strings=given, tokenizer=words, pad_token_id=0
        )
        found = klfast.generate(model, prompt, 24, stop_strings=given, tokenizer=words)
        assert torch.equal(found, expected) and found.shape[1] < prompt.shape[1] + 24


def test_stop_strings_of_emoji_split_over_tokens():
    """The model writes one text over and over: each token is followed by the next."""
    words = tokenizer("byte-level BPE")
    said = words("🐙🐙 done", add_special_tokens=False)["input_ids"]
    assert len(said) > 4 and "🐙" not in [words.decode([token]) for token in said]
    model = tiny("llama")
    model.resize_token_embeddings(len(words))
    model.forward, step = _says(said, len(words)), len(said)
    found = klfast.generate(model, torch.zeros(1, 1, dtype=torch.int64), 2 * step, stop_strings="🐙🐙", tokenizer=words)
    assert words.decode(found[0, 1:]) == "🐙🐙"


def _says(said, vocabulary):
    from transformers.modeling_outputs import CausalLMOutputWithPast

    made = []

    def forward(input_ids, past_key_values=None, use_cache=True):
        logits = torch.zeros(len(input_ids), 1, vocabulary)
        logits[:, 0, said[len(made) % len(said)]] = 1
        made.append(0)
        return CausalLMOutputWithPast(logits=logits, past_key_values=made)

    return forward


def test_stop_strings_fill_the_rows_that_are_done(writer):
    model, words = writer
    ids = torch.randint(0, len(words), (3, 5))
    free = klfast.generate(model, ids, 12)
    stop = words.decode(free[0, 5 + 4 : 5 + 5])
    found = klfast.generate(model, ids, 12, stop_strings=[stop], tokenizer=words, pad_token_id=7)
    ends = []
    for i in range(3):
        alone = model.generate(
            ids[i : i + 1], do_sample=False, max_new_tokens=12, stop_strings=[stop], tokenizer=words, pad_token_id=7
        )
        ends.append(alone.shape[1])
        assert found[i].tolist() == (free[i, : ends[-1]].tolist() + [7] * 12)[: found.shape[1]]
    assert min(ends) <= 10 and found.shape[1] == max(ends) > min(ends)
    with pytest.raises(errors.InvalidInputError, match="has no padding token; give pad_token_id"):
        klfast.generate(model, ids, 12, stop_strings=[stop], tokenizer=words)


@pytest.mark.parametrize("penalty", [0.7, 1.3, 5])
def test_repetition_penalty_equals_transformers(model, penalty):
    ids = batch(3, 9)
    for mask in (torch.ones_like(ids), left_padded(ids)):
        found = klfast.generate(model, ids, 12, attention_mask=mask, repetition_penalty=penalty)
        rows = [
            klfast.generate(model, ids[i : i + 1, int((mask[i] == 0).sum()) :], 12, repetition_penalty=penalty)[0, -12:]
            for i in range(3)
        ]
        assert torch.equal(found[:, -12:], torch.stack(rows))  # padding is not text
        if mask.all():  # not every version of transformers leaves padding out
            assert torch.equal(
                found,
                model.generate(
                    ids, attention_mask=mask, do_sample=False, max_new_tokens=12, repetition_penalty=float(penalty)
                ),
            )


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 1.3},
        {"temperature": 0.7, "top_k": 5},
        {"temperature": 1.0, "top_p": 0.6},
        {"temperature": 1.5, "min_p": 0.2},
        {"temperature": 1.5, "top_k": 20, "top_p": 0.8, "min_p": 0.05, "repetition_penalty": 1.2},
    ],
)
def test_samples_equal_transformers(model, options):
    ids = batch(3, 9)
    torch.manual_seed(5)
    given = {"attention_mask": torch.ones_like(ids), "top_k": 0, **options}
    expected = model.generate(ids, do_sample=True, max_new_tokens=12, num_return_sequences=2, pad_token_id=0, **given)
    torch.manual_seed(5)
    assert torch.equal(klfast.generate(model, ids, 12, num_return_sequences=2, **options), expected)


def test_several_sequences_belong_to_their_prompts(model):
    ids, mask = batch(3, 9), left_padded(batch(3, 9))
    found = klfast.generate(model, ids, 5, attention_mask=mask, temperature=2.0, num_return_sequences=4)
    assert found.shape == (12, 14) and torch.equal(found[:, :9], ids.repeat_interleave(4, 0))
    assert len({tuple(row) for row in found[:4].tolist()}) > 1
    greedy = klfast.generate(model, ids, 5, attention_mask=mask)
    cold = klfast.generate(model, ids, 5, attention_mask=mask, temperature=1e-40, num_return_sequences=4)
    assert torch.equal(cold, greedy.repeat_interleave(4, 0))


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 1e-40},
        {"temperature": 5e-324},
        {"temperature": 1.0, "top_p": 1e-300},
        {"do_sample": True, "min_p": 1.0},
    ],
)
def test_extremes_sample_the_most_likely_token(model, options):
    assert torch.equal(klfast.generate(model, batch(3, 9), 12, **options), klfast.generate(model, batch(3, 9), 12))


def test_extreme_temperature_samples_all_tokens(model):
    drawn = klfast.generate(model, batch(1, 2).expand(3000, -1), 1, temperature=1e300)[:, -1]
    assert torch.bincount(drawn, minlength=VOCABULARY).min() > 15


class Recorder(BaseStreamer):
    def __init__(self):
        self.seen = []

    def put(self, value):
        self.seen.append(value)

    def end(self):
        self.seen.append("end")


def test_streamer_is_called_as_by_transformers(model):
    ids = batch(2, 5)
    found, expected = Recorder(), Recorder()
    klfast.generate(model, ids, 4, streamer=found)
    model.generate(
        ids, do_sample=False, max_new_tokens=4, streamer=expected, attention_mask=torch.ones_like(ids), pad_token_id=0
    )
    assert found.seen.pop() == expected.seen.pop() == "end"
    assert len(found.seen) == len(expected.seen) and all(map(torch.equal, found.seen, expected.seen))


def test_streamer_ends_after_an_error(model):
    streamer = Recorder()

    def interrupt(token):
        raise KeyboardInterrupt

    model.train()
    with pytest.raises(KeyboardInterrupt):
        klfast.generate(model, batch(), 4, streamer=streamer, callback=interrupt)
    assert streamer.seen[-1] == "end" and all(module.training for module in model.modules())


@pytest.mark.parametrize("answer", [True, np.True_, torch.tensor(True)])
def test_callback_that_returns_true_ends_generation(model, answer):
    free = klfast.generate(model, batch(2, 5), 9)
    calls = []

    def callback(token):
        calls.append(token)
        return answer if len(calls) == 3 else (None, False, 17)[len(calls) % 3]

    assert torch.equal(klfast.generate(model, batch(2, 5), 9, callback=callback), free[:, :8])


def test_generation_config_applies(model):
    ids = batch(3, 9)
    free = klfast.generate(model, ids, 20)
    ends = [int(free[0, 9 + 2]), int(free[1, 9 + 5])]
    model.generation_config = GenerationConfig(
        eos_token_id=ends, pad_token_id=60, repetition_penalty=1.2, max_new_tokens=15
    )
    assert torch.equal(
        klfast.generate(model, ids), model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False)
    )
    assert torch.equal(klfast.generate(model, ids, 20, eos_token_id=[], repetition_penalty=1), free)
    model.generation_config = GenerationConfig(max_length=12, eos_token_id=torch.tensor(ends).tolist())
    assert klfast.generate(model, ids[:1]).shape[1] <= 12
    model.generation_config = GenerationConfig(max_length=9)
    with pytest.raises(errors.InvalidInputError, match="9 tokens reach generation_config's max_length of 9"):
        klfast.generate(model, ids)
    model.generation_config = GenerationConfig()
    with pytest.raises(errors.InvalidInputError, match="sets no length; give max_new_tokens"):
        klfast.generate(model, ids)


def test_generation_config_applies_to_sampling(model):
    ids = batch(3, 9)
    model.generation_config = GenerationConfig(
        do_sample=True, temperature=1.7, top_k=7, top_p=0.9, min_p=0.01, pad_token_id=0
    )
    torch.manual_seed(3)
    expected = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=9)
    torch.manual_seed(3)
    assert torch.equal(klfast.generate(model, ids, 9, do_sample=True), expected)
    assert not torch.equal(klfast.generate(model, ids, 9), expected)  # sampling must be requested
    model.generation_config = GenerationConfig(top_k=0)
    klfast.generate(model, ids, 2, temperature=1.0)  # transformers' value for no limit
    model.generation_config = GenerationConfig(top_k=1)
    greedy = klfast.generate(model, ids, 9)
    assert torch.equal(klfast.generate(model, ids, 9, temperature=9.0), greedy)
    assert not torch.equal(klfast.generate(model, ids, 9, temperature=9.0, top_k=0), greedy)
    model.generation_config = GenerationConfig(no_repeat_ngram_size=2, num_beams=3)
    with pytest.warns(UserWarning, match="ignores num_beams, no_repeat_ngram_size"):
        klfast.generate(model, ids, 2)
    for name, value in (("encoder_repetition_penalty", 1.5), ("encoder_no_repeat_ngram_size", 2), ("top_h", 0.5)):
        model.generation_config = GenerationConfig(**{name: value})
        with pytest.warns(UserWarning, match=f"ignores {name} in the generation_config"):
            klfast.generate(model, ids, 2)


def test_warns_about_sampling_limits_without_sampling(model):
    with pytest.warns(UserWarning, match="top_k, min_p has no effect .*; give a temperature above 0"):
        assert torch.equal(klfast.generate(model, batch(), 3, top_k=3, min_p=0.1), klfast.generate(model, batch(), 3))


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("max_new_tokens", [True, -1, 1.5, float("nan"), "3", 10**30]),
        ("temperature", [True, -0.1, float("nan"), float("inf"), "1", 10**400]),
        ("top_k", [True, -1, -3, 2.0, float("nan"), 10**30]),
        ("top_p", [True, 0, -0.5, 1.1, float("nan"), "0.5"]),
        ("min_p", [True, -0.1, 1.1, float("nan")]),
        ("repetition_penalty", [True, 0, -1, float("nan"), float("inf"), 1e-300]),
        ("num_return_sequences", [True, 0, 2.0, -1, 10**30]),
        ("eos_token_id", [True, -1, 1.0, [1, -2], "1", [None], 10**30]),
        ("pad_token_id", [True, -1, VOCABULARY, 10**30, 1.0]),
        ("do_sample", [1, "yes"]),
        ("stop_strings", ["", ["a", ""], [3], 5]),
        ("generator", [3]),
    ],
)
def test_refuses_numbers_in_one_line(model, name, wrong):
    for value in wrong:
        with pytest.raises(errors.InvalidInputError, match=f"^{name}") as caught:
            klfast.generate(
                model,
                batch(),
                **{"max_new_tokens": 2, "temperature": 1.0, name: value}
                | ({"temperature": None} if name == "do_sample" else {}),
            )
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"do_sample": True, "temperature": 0}, "contradict each other"),
        ({"do_sample": False, "temperature": 0.5}, "contradict each other"),
        ({"num_return_sequences": 2}, "needs sampling"),
        ({"stop_strings": "a"}, "need the model's tokenizer"),
        ({"stop_strings": "a", "tokenizer": object()}, "object does not support the stop strings"),
        ({"attention_mask": [[1]]}, "attention_mask must have the shape .* got list"),
    ],
)
def test_refuses_contradictory_options(model, options, match):
    with pytest.raises(errors.InvalidInputError, match=match):
        klfast.generate(model, batch(), 3, **options)


def test_refuses_to_sample_from_an_infinity(model):
    model.lm_head.register_forward_hook(lambda _, inputs, logits: logits.index_fill(-1, torch.tensor([3]), torch.inf))
    with pytest.raises(errors.InvalidInputError, match="hold an infinity, so no token can be sampled"):
        klfast.generate(model, batch(), 3, temperature=1.0)
    assert set(klfast.generate(model, batch(), 3)[:, -3:].flatten().tolist()) == {3}


def test_numpy_numbers_are_numbers(model):
    found = klfast.generate(
        model, batch(), np.int64(3), temperature=np.float32(1e-20), top_k=np.int32(5), top_p=np.float64(0.9)
    )
    assert torch.equal(found, klfast.generate(model, batch(), 3))
