"""KL from a sample of the vocabulary against all of it in float64: unbiased, within the stated error, in sweeps."""

import math

import pytest
import torch
from sweep_models import KL, VOCAB, make, means, tokens

import klfast
from klfast.core.errors import InvalidInputError
from klfast.models.families.base import LogitRule
from klfast.models.head import Readout
from klfast.sensitivity import comparison, sampled_vocabulary

pytestmark = pytest.mark.usefixtures("one_thread")
TOKENS, FEATURES, ENTRIES = 40, 16, 3000
RULES = {"plain": LogitRule(), "scaled": LogitRule(0.5), "capped": LogitRule(1.5, 4.0)}


def states(change, rule="plain"):
    torch.manual_seed(0)
    readout = Readout(torch.randn(ENTRIES, FEATURES), torch.randn(ENTRIES) if rule == "capped" else None, RULES[rule])
    hidden = torch.randn(TOKENS, FEATURES)
    return readout, hidden, hidden + change * torch.randn(2, TOKENS, FEATURES)


def truth(readout, hidden, students, targets):
    def log_probabilities(x):
        y = x.double() @ readout.weight.double().T + (0 if readout.bias is None else readout.bias.double())
        y, cap = y * readout.rule.scale, readout.rule.softcap
        return (y if cap is None else cap * (y / cap).tanh()).log_softmax(-1)

    log_p, log_q = log_probabilities(hidden), log_probabilities(students)
    change = (log_p - log_q).gather(-1, targets.expand(2, -1).unsqueeze(-1)).squeeze(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1), change


@pytest.mark.parametrize(("change", "rule"), [(1e-4, "plain"), (0.1, "scaled"), (0.05, "capped")])
def test_no_bias_and_an_honest_error(change, rule):
    readout, hidden, students = states(change, rule)
    kl, stated = [], []
    for seed in range(30):  # other windows, so other draws; the same targets
        windows = torch.randint(ENTRIES, (1, TOKENS + 1), generator=torch.Generator().manual_seed(seed))
        sample = sampled_vocabulary.draw(readout, hidden, windows, rows=24)
        found = sampled_vocabulary.estimate(sample, readout, hidden, students)
        expected, expected_change = truth(readout, hidden, students, windows[0, 1:])
        kl.append(found.kl.mean(-1) / expected.mean(-1) - 1)
        stated.append(found.variance.sum(-1).sqrt() / TOKENS / expected.mean(-1))
        of_ce = found.delta_ce - expected_change
        if rule == "capped":
            assert (of_ce.mean(-1).abs() < 1.5 / math.sqrt(TOKENS) * expected_change.std(-1)).all()
        else:
            torch.testing.assert_close(of_ce, found.kl - expected, rtol=0, atol=1e-5 * change)
    errors, stated = torch.stack(kl), torch.stack(stated)
    spread = errors.std(0)
    assert (errors.mean(0).abs() < 4 * spread / math.sqrt(30)).all()
    assert ((spread / stated.square().mean(0).sqrt() - 1).abs() < 0.5).all()
    assert spread.max() < 0.25


def test_the_variance_of_a_large_kl():
    """Each token is another draw from Gaussian changes, whose KL is half their variance."""
    changes = 0.45 * torch.randn(1, 20000, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    weights = torch.full((20000, 64), 1 / 64, dtype=torch.float64)
    kl, _, variance = sampled_vocabulary._of_changes(changes, weights, torch.ones(20000, dtype=torch.float64), 64)
    assert kl.mean() == pytest.approx(0.45**2 / 2, rel=0.01)
    assert variance.mean() / kl.var() == pytest.approx(1, rel=0.1)


def test_a_sample_of_nearly_all_entries_is_nearly_exact():
    readout, hidden, students = states(0.1)
    windows = torch.randint(ENTRIES, (1, TOKENS + 1))
    sample = sampled_vocabulary.draw(readout, hidden, windows, rows=2 * ENTRIES - 20)
    found = sampled_vocabulary.estimate(sample, readout, hidden, students)
    kl, change = truth(readout, hidden, students, windows[0, 1:])
    torch.testing.assert_close(found.kl, kl, rtol=1e-3, atol=0)
    torch.testing.assert_close(found.delta_ce, change, rtol=0, atol=1e-5)
    assert sample.weights.sum(-1).sub(1).abs().max() < 1e-12


@torch.no_grad()
def test_a_sweep_equals_float64_within_its_error():
    model, ids, spec = make(), tokens(4, 33), klfast.QuantSpec(4, 32)
    full = klfast.sweep(model, ids, spec)
    found = klfast.sweep(model, ids, spec, vocabulary=VOCAB // 2)
    assert found.provenance["vocabulary"] == VOCAB // 2 and full.provenance["vocabulary"] == "full"
    assert found.provenance["ce_teacher"] == pytest.approx(full.provenance["ce_teacher"], rel=1e-6)
    for key, one in found.measurements.items():
        assert set(one.mean) == {KL, "delta_ce"}
        assert one.mean[KL] == pytest.approx(full.measurements[key].mean[KL], rel=0.1), key
        room = max(full.measurements[key].stderr["delta_ce"], 1e-6)
        assert one.mean["delta_ce"] == pytest.approx(full.measurements[key].mean["delta_ce"], abs=room), key
    split = klfast.sweep(model, ids, spec, vocabulary=VOCAB // 2, max_batch_tokens=4 * 33)
    for key, one in found.measurements.items():
        assert split.measurements[key].mean[KL] == pytest.approx(one.mean[KL], rel=1e-4), key


@pytest.mark.parametrize("limit", ["LARGE", "UNSURE"])
def test_what_is_large_or_unsure_is_compared_in_full(limit, monkeypatch):
    monkeypatch.setattr(comparison, limit, 0.0)
    model, ids = make(), tokens()
    full = klfast.sweep(model, ids, "int4", metrics="delta_ce")
    found = klfast.sweep(model, ids, "int4", vocabulary=16)
    assert found.provenance["compared_in_full"] == len(found.measurements) + 1  # the noise floor
    assert means(found) == means(full)


def test_an_interrupted_sweep_keeps_its_sample(tmp_path):
    path = tmp_path / "resume.json"
    whole = klfast.sweep(make(), tokens(), "int4", vocabulary=16, max_batch_tokens=4 * 17)

    def stop(done, total, what):
        if done >= 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        klfast.sweep(make(), tokens(), "int4", vocabulary=16, max_batch_tokens=4 * 17, resume=path, progress=stop)
    resumed = klfast.sweep(make(), tokens(), "int4", vocabulary=16, max_batch_tokens=4 * 17, resume=path)
    assert means(resumed) == means(whole)
    assert resumed.provenance["compared_in_full"] == whole.provenance["compared_in_full"]
    with pytest.raises(InvalidInputError, match="other vocabulary"):
        klfast.sweep(make(), tokens(), "int4", vocabulary=17, max_batch_tokens=4 * 17, resume=path)


def test_infinite_logits_are_reported():
    readout, hidden, _ = states(0.1)
    hidden[3] *= 3e38
    with pytest.raises(InvalidInputError, match="teacher's logit of token 3, vocabulary entry 0, is a NaN or an inf"):
        sampled_vocabulary.draw(readout, hidden, torch.zeros(1, TOKENS + 1, dtype=torch.int64), 16)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(vocabulary="some"), 'vocabulary must be "full", "sampled" or a number of entries from 4 on, got .some'),
        (dict(vocabulary=3), "from 4 on, got 3"),
        (dict(vocabulary=True), "from 4 on, got True"),
        (dict(vocabulary=0), "from 4 on, got 0"),
        (
            dict(vocabulary=8, metrics="jsd"),
            'jsd needs vocabulary="full" and budget=.exhaustive.; others give kl_teach',
        ),
    ],
)
def test_bad_input(change, message):
    with pytest.raises(InvalidInputError, match=message) as caught:
        klfast.sweep(make(), tokens(), "int4", **change)
    assert "\n" not in str(caught.value)
