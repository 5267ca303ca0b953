"""Ten thousand random op calls against float64; python tests/differential runs more, or one again by its number."""

import judging
import pytest
import torch

from klfast.dispatch import pins

TIERS = [tier for tier in ("scalar", "avx2") if tier in pins.available_tiers()]


@pytest.fixture
def proven_tiers(monkeypatch):
    """Leave out tiers on which the judge has been tried in few cases; python tests/differential runs them."""
    monkeypatch.setattr(pins, "available_tiers", lambda: TIERS)
    with judging.using(TIERS[-1]):
        yield


@pytest.mark.slow
@pytest.mark.parametrize("first", range(0, 10_000, 1000))
def test_random_calls(first, one_thread, proven_tiers):
    faults = [complaint for number in range(first, first + 1000) if (complaint := judging.fault(number))]
    assert not faults, "\n".join(faults[:5])


# A head's equal rows; logits of millions from quantized heads; equal logits.
ONCE_WRONG = (514622, 976204, 831393, 929216, 899633, 949581)


def test_what_was_wrong_once(one_thread, proven_tiers):
    assert [judging.fault(number) for number in ONCE_WRONG] == [None] * len(ONCE_WRONG)


def complaints(op):
    return sum(judging.fault(number, op) is not None for number in range(10))


def test_wrong_results_are_found(one_thread, monkeypatch):
    """The judge itself: float32 results that are off by 0.01 %, and an operand that is written to."""
    results = judging.results

    def a_little_off(call):
        return [t * (1 + 1e-4) if t.dtype == torch.float32 else t for t in results(call)]

    assert not judging.fault(3, "rms_norm")
    monkeypatch.setattr(judging, "results", a_little_off)
    for op in ("gathered_logits", "logit_divergence", "linear_divergence"):
        assert complaints(op) > 5

    def written_to(call):
        x = call.arguments["x"]
        x.new_empty(0).set_(x.untyped_storage()).fill_(7)
        return results(call)

    monkeypatch.setattr(judging, "results", written_to)
    assert "was written to" in judging.fault(3, "rms_norm")


@pytest.mark.parametrize("op", ["logit_divergence", "linear_divergence"])
def test_wrong_agreement_is_found(one_thread, monkeypatch, op):
    results = judging.results

    def opposite(call):
        *others, agree = results(call)
        return [*others, 1 - agree]

    monkeypatch.setattr(judging, "results", opposite)
    assert complaints(op) > 5
