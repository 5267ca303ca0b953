"""Triton's divergence kernels against float64: the cases of the CPU kernels, but for what only those have."""

import math

import pytest
import test_divergence as cases
import torch

import klfast
from klfast.kernels import launch

# Each of these takes the tier that runs it; here that is Triton.
from test_divergence import (  # noqa: F401
    test_a_few_changed_entries_among_equal_ones,
    test_equal_rows_are_exactly_zero,
    test_huge_logits,
    test_misleading_first_columns,
    test_strides_and_leading_dimensions,
    test_ties_go_to_the_lowest_index,
)


@pytest.fixture
def tier():
    return "triton"


@pytest.fixture(autouse=True)
def _on_the_device(device, monkeypatch):
    """Whatever the cases make, on the device; what they get, back from it."""
    if device.type == "cpu":
        return
    for name in ("logit_divergence", "linear_divergence"):
        function = getattr(klfast, name)

        def moved(*args, function=function):
            found = function(*(t.to(device) if hasattr(t, "to") else t for t in args))
            return type(found)(*(None if t is None else t.cpu() for t in vars(found).values()))

        monkeypatch.setattr(klfast, name, moved)


@pytest.mark.parametrize("vocab", [1, 63, 2049])
@pytest.mark.parametrize("size", [1e-4, 1e-2, 0.4, 8.0])
def test_random_logits(vocab, size):
    cases.test_random_logits("triton", vocab, size)


@pytest.mark.parametrize("size, kl", [(1.4e-4, 1e-8), (0.045, 1e-3), (10.0, 30.0)])
def test_kl_of_every_size_at_a_real_vocabulary(size, kl):
    cases.test_kl_of_every_size_at_a_real_vocabulary("triton", size, kl)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_and_mixed_dtypes(dtype):
    cases.test_half_precision_and_mixed_dtypes("triton", dtype, 1600)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("who", ["teacher", "student"])
def test_not_finite(value, who):
    logits = {"teacher": torch.randn(5, 3000), "student": torch.randn(5, 3000)}
    logits[who][3, 2900] = value
    with pytest.raises(klfast.KlfastError, match=f"the {who}'s logit of token 3, vocabulary entry 2900, is a NaN"):
        klfast.logit_divergence(logits["teacher"], logits["student"])


def test_split_over_the_vocabulary(monkeypatch):
    monkeypatch.setattr(launch, "cores", lambda _: 100)
    teacher = 3 * torch.randn(3, 20_000)
    student = teacher + 0.3 * torch.randn(3, 20_000)
    targets = torch.tensor([0, -100, 19_999])
    cases.assert_matches(klfast.logit_divergence(teacher, student, targets), cases.truth(teacher, student, targets))
