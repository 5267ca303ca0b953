"""Triton's rms_norm against its formula in float64: the CPU kernels' cases, on the device."""

import pytest
import ssm_truth
import test_norm as cases
import torch
from test_norm import _poison, test_gates_and_offsets, test_rms_norm_takes_any_strides  # noqa: F401


@pytest.fixture
def tier():
    return "triton"


@pytest.fixture(autouse=True)
def _on_the_device(device, monkeypatch):
    if device.type == "cpu":  # the interpreter truncates bfloat16 instead of rounding
        monkeypatch.setitem(ssm_truth.TOLERANCE, torch.bfloat16, 2 * ssm_truth.TOLERANCE[torch.bfloat16])
    with device:
        yield


@pytest.mark.parametrize(
    ("shape", "group"),
    [((1,), 1), ((3, 63), 21), ((2, 5, 100), None), ((2, 3, 4, 48), 16), ((0, 8), None), ((1, 9, 5000), None)],
)
def test_rms_norm(shape, group):
    cases.test_rms_norm(shape, group, "triton")
