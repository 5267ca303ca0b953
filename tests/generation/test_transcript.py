"""Transcripts: log probabilities against the model's own forward in float64, and times by a clock made up."""

import pytest
import torch
from tiny_models import VOCABULARY, batch, in_float64, left_padded, tiny

import klfast
from klfast.core import errors
from klfast.generation import transcript as module

pytestmark = pytest.mark.usefixtures("one_thread")


@torch.no_grad()
def logs_after(model, text, prompt_tokens):
    """Return the log probabilities of each new token's place, float64 [N, V]."""
    return in_float64(model)(text, use_cache=False).logits[0, prompt_tokens - 1 : -1].log_softmax(-1)


@pytest.mark.parametrize("options", [{}, {"temperature": 2.0, "top_k": 9}, {"repetition_penalty": 1.5}])
@pytest.mark.parametrize("family", ["llama", "mamba2", "phi"])
def test_logprobs_are_the_model_s_own(family, options):
    model, ids, notes = tiny(family), batch(2, 6), klfast.Transcript(logprobs=3)
    found = klfast.generate(model, ids, 7, transcript=notes, **options)
    assert len(notes.scores) == 2
    for row, scores in zip(found, notes.scores, strict=True):
        truth = logs_after(model, row.unsqueeze(0), 6)
        assert [one.token for one in scores] == row[6:].tolist()
        assert [one.logprob for one in scores] == pytest.approx(truth.gather(1, row[6:, None])[:, 0].tolist(), abs=1e-3)
        for one, logs in zip(scores, truth, strict=True):
            best = logs.topk(3)
            assert [token for token, _ in one.top] == best.indices.tolist()
            assert [logprob for _, logprob in one.top] == pytest.approx(best.values.tolist(), abs=1e-3)


def test_padding_is_not_noted():
    model, ids, notes = tiny("llama"), batch(3, 9), klfast.Transcript(logprobs=0)
    mask = left_padded(ids)
    end = int(klfast.generate(model, ids, 20, attention_mask=mask)[0, 9 + 2])
    found = klfast.generate(model, ids, 20, attention_mask=mask, eos_token_id=end, pad_token_id=60, transcript=notes)
    made = [row[: row.index(end) + 1] if end in row else row for row in found[:, 9:].tolist()]
    assert [[one.token for one in row] for row in notes.scores] == made and len(set(map(len, made))) > 1
    assert notes.prompt_tokens == int(mask.sum()) and notes.new_tokens == sum(map(len, made))
    assert notes.lengths == [len(row) for row in made]
    assert all(one.top == [] for row in notes.scores for one in row)


def test_no_more_likely_tokens_than_there_are():
    notes = klfast.Transcript(logprobs=10**6)
    klfast.generate(tiny("llama"), batch(1, 4), 1, transcript=notes)
    [[one]] = notes.scores
    assert len(one.top) == VOCABULARY
    assert sum(torch.tensor([logprob for _, logprob in one.top]).exp()) == pytest.approx(1, abs=1e-4)


def test_times_add_up(monkeypatch):
    clock = iter([10.0, 12.0, 13.0, 15.0, 100.0, 101.0, 105.0, 105.5])
    monkeypatch.setattr(module, "perf_counter", lambda: next(clock))
    model, notes = tiny("llama"), klfast.Transcript()
    assert notes.prompt_tokens_per_second is notes.tokens_per_second is notes.acceptance is None
    klfast.generate(model, batch(1, 8), 3, transcript=notes)
    assert (notes.prompt_tokens, notes.new_tokens, notes.prompt_seconds, notes.decode_seconds) == (8, 3, 2.0, 3.0)
    assert (notes.prompt_tokens_per_second, notes.tokens_per_second) == (4.0, 2 / 3.0)
    klfast.generate(model, batch(2, 5), 3, transcript=notes)
    assert (notes.prompt_tokens, notes.new_tokens, notes.prompt_seconds, notes.decode_seconds) == (18, 9, 3.0, 7.5)
    assert notes.tokens_per_second == 6 / 7.5 and notes.scores == []


def test_lengths_of_beams_and_of_several_calls():
    notes, made, ends = klfast.Transcript(), [], list(range(0, 60, 6))
    for prompts in (3, 2):
        found = klfast.generate(
            tiny("llama"),
            batch(prompts, 5),
            12,
            num_beams=3,
            num_return_sequences=2,
            eos_token_id=ends,
            pad_token_id=60,
            transcript=notes,
        )
        made += found[:, 5:].tolist()
    firsts = [next((i + 1 for i, token in enumerate(row) if token in ends), len(row)) for row in made]
    assert notes.lengths == firsts and len(set(firsts)) > 1


def test_samples_of_one_prompt_count_it_once():
    notes = klfast.Transcript(logprobs=1)
    klfast.generate(tiny("mamba"), batch(2, 5), 3, temperature=1.0, num_return_sequences=3, transcript=notes)
    assert (notes.prompt_tokens, notes.new_tokens, len(notes.scores)) == (10, 18, 6)


def test_an_interrupt_leaves_what_there_was():
    notes = klfast.Transcript(logprobs=1)

    def interrupt(_):
        if notes.new_tokens == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        klfast.generate(tiny("llama"), batch(1, 5), 9, callback=interrupt, transcript=notes)
    assert [len(row) for row in notes.scores] == [3]


@pytest.mark.parametrize("wrong", [-1, 1.5, True, "3"])
def test_refuses_numbers(wrong):
    with pytest.raises(errors.InvalidInputError, match=r"^logprobs must be an integer"):
        klfast.Transcript(logprobs=wrong)
