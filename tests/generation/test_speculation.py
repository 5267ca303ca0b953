"""Guesses ahead change how soon a text is there, but not the text."""

import copy

import pytest
import torch
from tiny_models import batch, left_padded, tiny

import klfast
from klfast.core import errors
from klfast.engine.engine import Engine
from klfast.generation.drafts import PromptLookup

pytestmark = pytest.mark.usefixtures("one_thread")
FAMILIES = (
    *("llama", "mistral", "mamba", "mamba2", "falcon_mamba", "hymba", "granite_hybrid", "falcon_h1", "jamba"),
    *("lfm2", "qwen3_5", "kimi_linear", "minimax"),
)

SINGLE = "^speculative decoding is for a single text"


def nearly(model, noise=0.05):
    """Return a copy of the model that often writes the same."""
    other, chance = copy.deepcopy(model), torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in other.parameters():
            if parameter.dim() >= 2:
                parameter.add_(torch.randn(parameter.shape, generator=chance), alpha=noise)
    return other


def repetitive(ids):
    """Return a prompt that says the same several times."""
    return torch.cat([ids, ids[:, :6], ids, ids[:, :6]], 1)


@pytest.mark.slow
@pytest.mark.parametrize("tokens", [1, 3, 15])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_text_is_the_model_s(family, tokens):
    model, ids = tiny(family), batch(1, 9)
    plain = klfast.generate(model, ids, 60)
    rates = []
    for draft in (model, nearly(model), tiny("llama", seed=7)):
        notes = klfast.Transcript()
        found = klfast.generate(model, ids, 60, draft_model=draft, num_draft_tokens=tokens, transcript=notes)
        assert torch.equal(found, plain)
        rates.append(notes.acceptance)
    assert rates[0] > max(rates[1:])
    ids = repetitive(ids)
    found = klfast.generate(model, ids, 60, num_draft_tokens=tokens)
    assert torch.equal(found, klfast.generate(model, ids, 60))


@pytest.mark.parametrize("options", [{"temperature": 0.4}, {"temperature": 0.7, "top_k": 8, "frequency_penalty": 0.5}])
@pytest.mark.parametrize("family", ["llama", "mamba2", "qwen3_5"])
def test_samples_are_those_without_drafts(family, options):
    model, ids = tiny(family), batch(1, 9)
    for draft in (model, nearly(model), None):
        texts, notes = [], klfast.Transcript()
        for drafts in ({}, {"draft_model": draft, "num_draft_tokens": 3, "transcript": notes}):
            chance = torch.Generator().manual_seed(5)
            texts.append(klfast.generate(model, ids, 80, generator=chance, **options, **drafts))
        assert torch.equal(*texts)
        assert draft is None or notes.draft_tokens > notes.accepted_tokens > 0  # drawn texts seldom repeat themselves


def test_logprobs_ends_and_padding_are_those_without_drafts():
    model, ids = tiny("granite_hybrid"), batch(2, 9)
    ids, mask = ids[:1], left_padded(ids)[:1]
    end = int(klfast.generate(model, ids, 20, attention_mask=mask)[0, -4])
    for draft in (model, None):
        texts, notes = [], []
        for drafts in ({}, {"draft_model": draft, "num_draft_tokens": 4}):
            notes.append(klfast.Transcript(logprobs=2))
            texts.append(
                klfast.generate(model, ids, 40, attention_mask=mask, eos_token_id=end, transcript=notes[-1], **drafts)
            )
        assert torch.equal(*texts) and texts[0].shape[1] <= 9 + 17
        plain, drafted = (one.scores[0] for one in notes)
        assert [one.token for one in drafted] == [one.token for one in plain] == texts[0][0, 9:].tolist()
        assert [one.logprob for one in drafted] == pytest.approx([one.logprob for one in plain], abs=1e-4)
        assert notes[1].prompt_tokens == 5


@pytest.fixture
def runs(monkeypatch):
    """Return the numbers of tokens that engines have fed at a time."""
    fed = []
    for name in ("__call__", "each"):
        original = getattr(Engine, name)

        def counted(self, ids, state, original=original):
            fed.append(ids.shape[1])
            return original(self, ids, state)

        monkeypatch.setattr(Engine, name, counted)
    return fed


def test_accepted_drafts_cost_no_run(runs):
    """After the prompt each run has the newest token and a draft of four, all accepted in a text of one period."""
    model, notes = _periodic(), klfast.Transcript()
    klfast.generate(model, torch.tensor([[1, 2, 3, 1, 2, 3]]), 26, num_draft_tokens=4, transcript=notes)
    assert runs == [6, 5, 5, 5, 5, 5] and (notes.draft_tokens, notes.accepted_tokens) == (20, 20)


def test_tokens_after_a_rejected_draft_are_fed_again(runs):
    """After 3 1 the draft from the prompt is 9 9 9, but the text goes on with 2."""
    model = _periodic()
    found = klfast.generate(model, torch.tensor([[3, 1, 9, 9, 9, 3]]), 8, num_draft_tokens=3)
    assert found[0, 6:].tolist() == [1, 2, 3, 1, 2, 3, 1, 2]
    assert runs == [6, 1 + 3, 2, 1, 1 + 1, 1 + 3]  # 2: the 1 again, and 2 in place of 9; then a draft of one token


def _periodic():
    """Return a model that writes 1 2 3 1 2 3 ..., whatever came before the latest token."""
    model = tiny("llama")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                parameter.zero_()
        for token, following in ((1, 2), (2, 3), (3, 1)):
            model.lm_head.weight[following] = 10 * model.model.embed_tokens.weight[token]
    return model


@pytest.mark.parametrize(
    ("text", "most", "expected"),
    [
        ([1, 2, 3, 9, 8, 7, 1, 2, 3], 2, [9, 8]),
        ([1, 2, 3, 9, 5, 2, 3, 4, 1, 2, 3], 3, [9, 5, 2]),  # three tokens agree, against two later ones
        ([2, 3, 9, 5, 2, 3, 4, 1, 7, 2, 3], 3, [4, 1, 7]),  # the latest of two places
        ([5, 6, 5, 6], 5, [5, 6, 5, 6, 5]),  # the draft goes on with itself
        ([4, 4, 4], 3, [4, 4, 4]),
        ([1, 2, 3, 4], 3, []),
        ([1, 2, 3, 1], 3, []),  # one token says too little
        ([1], 3, []),
    ],
)
def test_prompt_lookup(text, most, expected):
    whole, growing = PromptLookup(), PromptLookup()
    assert whole(text, most) == expected
    for end in range(1, len(text)):
        growing(text[:end], most)
    assert growing(text, most) == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(num_draft_tokens=0), "^num_draft_tokens must be an integer, 1 or more"),
        (dict(num_draft_tokens=2.0), "^num_draft_tokens must be an integer"),
        (dict(num_draft_tokens=16), "^num_draft_tokens must be 15 or less, got 16"),
        (dict(num_draft_tokens=2, ids=batch(2)), SINGLE),
        (dict(num_draft_tokens=2, num_return_sequences=2, temperature=1.0), SINGLE),
        (dict(num_draft_tokens=2, num_beams=2), SINGLE),
        (dict(draft_model=tiny("llama", vocabulary=50)), "^draft_model must have the model's 61 tokens, got 50"),
        (dict(draft_model=tiny("phi")), "does not run draft_model: the engine does not know models of type phi"),
        (dict(model=tiny("phi"), num_draft_tokens=2), "does not run the model: the engine does not know"),
    ],
    ids=str,
)
def test_refuses_options(options, message):
    with pytest.raises(errors.InvalidInputError, match=message):
        klfast.generate(**{"model": tiny("llama"), "ids": batch(1), "max_new_tokens": 3, **options})
