"""``compare`` against float64 softmaxes of full logits."""

import math
import tracemalloc

import numpy as np
import pytest
import torch
from tiny_models import VOCABULARY, batch, tiny

import klfast
from klfast import Comparison, Plan, QuantSpec
from klfast.core.errors import CheckpointError, InvalidInputError
from klfast.evaluation.comparing import _Tokens
from klfast.evaluation.windowed import Estimate
from klfast.models.linears import linears


@pytest.fixture(scope="module")
def models():
    student = tiny("hymba")
    return tiny("hymba"), klfast.quantize_model(
        student, Plan(dict.fromkeys(linears(student), QuantSpec(4, 16)), "uniform")
    )


@pytest.fixture(scope="module")
def text():
    """Create windows of two lengths, the longer above 64, with tokens of which some are rare."""
    rare = (batch(4, 70).float() ** 2 / VOCABULARY).long()
    return [rare, rare[:1, :9].contiguous()]


@pytest.fixture(scope="module")
def card(models, text):
    return klfast.compare(*models, text)


@torch.no_grad()
def tokens(model, text):
    """Return float64 log-probabilities [N, V] and the right tokens [N]."""
    logs = [model(ids).logits[:, :-1].double().log_softmax(-1).flatten(0, 1) for ids in text]
    return torch.cat(logs), torch.cat([ids[:, 1:].flatten() for ids in text])


@pytest.fixture(scope="module")
def truth(models, text):
    (p, right), (q, _) = (tokens(model, text) for model in models)
    log_p, log_q = (one.gather(1, right[:, None])[:, 0] for one in (p, q))
    return {
        "right": right.numpy(),
        "position": np.concatenate([np.tile(np.arange(1, ids.shape[1]), len(ids)) for ids in text]),
        "kl": (p.exp() * (p - q)).sum(-1).numpy(),
        "reverse": (q.exp() * (q - p)).sum(-1).numpy(),
        "jsd": (p.exp() * (p - _middle(p, q)) + q.exp() * (q - _middle(p, q))).sum(-1).numpy() / 2,
        "same": (p.argmax(-1) == q.argmax(-1)).double().numpy(),
        "change": (log_q.exp() - log_p.exp()).numpy(),
        "nll": -log_q.numpy(),
        "base": -log_p.numpy(),
    }


def _middle(p, q):
    return torch.logaddexp(p, q) - math.log(2)


def test_figures_equal_full_softmaxes(card, truth):
    expected = {
        "Mean KLD": truth["kl"].mean(),
        "Median KLD": np.median(truth["kl"]),
        "90.0% KLD": np.quantile(truth["kl"], 0.9),
        "99.0% KLD": np.quantile(truth["kl"], 0.99),
        "99.9% KLD": np.quantile(truth["kl"], 0.999),
        "Maximum KLD": truth["kl"].max(),
        "Mean reverse KLD": truth["reverse"].mean(),
        "Mean JSD": truth["jsd"].mean(),
        "Same top p": truth["same"].mean(),
        "Mean Δp": truth["change"].mean(),
        "RMS Δp": math.sqrt((truth["change"] ** 2).mean()),
        "Mean PPL(Q)": math.exp(truth["nll"].mean()),
        "Mean PPL(base)": math.exp(truth["base"].mean()),
        "Mean ln(PPL(Q)/PPL(base))": (truth["nll"] - truth["base"]).mean(),
    }
    assert (card.tokens, card.windows) == (4 * 69 + 8, 5)
    assert {name: one.value for name, one in card.figures.items()} == pytest.approx(expected, rel=1e-3, abs=1e-8)
    for name, one in card.figures.items():
        assert name == "Maximum KLD" or one.low <= one.value <= one.high, name
    assert card.figures["Maximum KLD"].low is None


def test_parts_hold_the_tokens_of_their_positions_and_counts(card, truth):
    counts = np.bincount(truth["right"])[truth["right"]]
    assert [(part.first, part.last) for part in card.by_position] == [(1, 64), (65, 128)]
    assert [(part.first, part.last) for part in card.by_frequency][:3] == [(1, 1), (2, 4), (5, 16)]
    for parts, numbers in ((card.by_position, truth["position"]), (card.by_frequency, counts)):
        assert sum(part.tokens for part in parts) == card.tokens
        for part in parts:
            chosen = (numbers >= part.first) & (numbers <= (part.last or math.inf))
            found = {name: one.value for name, one in part.figures.items()}
            assert part.tokens == chosen.sum() and found == pytest.approx(
                {
                    "Mean KLD": truth["kl"][chosen].mean(),
                    "Same top p": truth["same"][chosen].mean(),
                    "Mean ln(PPL(Q)/PPL(base))": (truth["nll"] - truth["base"])[chosen].mean(),
                },
                rel=1e-3,
                abs=1e-7,
            )


def test_agrees_with_evaluate(card, models, text):
    found = klfast.evaluate(models[1], text, teacher=models[0])
    figures = card.figures
    assert figures["Mean KLD"].value == pytest.approx(found.kl, rel=1e-6)
    assert figures["Mean PPL(Q)"].value == pytest.approx(found.perplexity, rel=1e-6)
    assert figures["Mean reverse KLD"].value == pytest.approx(found.kl_student_teacher, rel=1e-6)
    assert figures["Mean KLD"].high - figures["Mean KLD"].value == pytest.approx(2.7764 * found.kl_stderr, rel=1e-4)


def random_tokens(batches):
    tokens, random = _Tokens(), torch.Generator().manual_seed(0)
    for _ in range(batches):
        ids = torch.randint(0, 5000, (4, 1001), generator=random)
        tokens.take(ids, torch.rand(6, 4, 1000, generator=random, dtype=torch.float64))
    return tokens


def test_the_memory_that_a_token_takes():
    """36 bytes of what is kept, then copies of a metric or two in float64, not of all six."""
    random_tokens(1).comparison()  # imports scipy
    tracemalloc.start()
    tokens = random_tokens(25)
    kept, _ = tracemalloc.get_traced_memory()
    tracemalloc.reset_peak()
    found = tokens.comparison()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert found.tokens == 100_000
    assert kept / found.tokens == pytest.approx(36, abs=1) and peak / found.tokens < 100


def test_one_window_has_no_intervals(models, text):
    found = klfast.compare(*models, text[1])
    assert found.windows == 1 and all(one.low is None for one in found.figures.values())
    assert Comparison.from_json(found.to_json()) == found


def test_a_model_against_itself(models, text):
    found = klfast.compare(models[0], models[0], text).figures
    for name in ("Mean KLD", "Median KLD", "99.9% KLD", "RMS Δp", "Mean ln(PPL(Q)/PPL(base))"):
        assert (found[name].value, found[name].low, found[name].high) == (0, 0, 0), name
    assert found["Same top p"] == Estimate(1, 1, 1)


def test_json(card, tmp_path):
    card.to_json(tmp_path / "card.json")
    assert Comparison.from_json(tmp_path / "card.json") == card
    endless = Comparison(1, 1, {"Mean PPL(Q)": Estimate(math.inf, 2.0, math.inf)})
    assert Comparison.from_json(endless.to_json()) == endless
    text = card.to_json()
    for broken, match in (
        (text.replace('"tokens": 284', '"tokens": 285'), "does not match"),
        ('{"schema": "klfast-plan/1"}', "not a comparison"),
        ('{"schema": "klfast-comparison/1", "tokens": 5, "windows": 1, "figures": {"a": 1}}', "damaged"),
    ):
        with pytest.raises(CheckpointError, match=match):
            Comparison.from_json(broken)


def test_refuses_other_vocabularies(models):
    with pytest.raises(InvalidInputError, match="one vocabulary"):
        klfast.compare(models[0], tiny("llama", vocabulary=VOCABULARY + 1), [batch()])
