"""Triton's gated delta rule against a float64 recurrence: the CPU kernels' cases, on the device."""

import pytest
import ssm_truth
import test_delta_rule as cases
import torch
from test_delta_rule import (  # noqa: F401
    _poison,
    test_extreme_decays,
    test_not_finite_values_stay_in_their_head,
    test_packed_sequences_equal_each_alone,
    test_scale,
    test_without_a_final_state_there_is_none_and_the_initial_one_stays,
)


@pytest.fixture
def tier():
    return "triton"


@pytest.fixture(autouse=True)
def _on_the_device(device, monkeypatch):
    if device.type == "cpu":  # the interpreter truncates bfloat16 instead of rounding
        monkeypatch.setitem(ssm_truth.TOLERANCE, torch.bfloat16, 2 * ssm_truth.TOLERANCE[torch.bfloat16])
    with device:
        yield


@pytest.mark.parametrize("form", cases.FORMS)
@pytest.mark.parametrize("shape", [(1, 1, 1, 1, 1, 1), (2, 5, 1, 3, 7, 5), (1, 9, 2, 4, 128, 40), (0, 3, 1, 1, 4, 4)])
def test_equals_float64(shape, form):
    cases.test_equals_float64(shape, form, "triton")


@pytest.mark.parametrize("form", cases.FORMS)
def test_update_continues_a_sequence(form):
    cases.test_update_continues_a_sequence(21, form, "triton")
