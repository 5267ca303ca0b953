"""Rules that hold for every op."""

import other_process
import pytest
import torch

from klfast import ops
from klfast.benchkit import op_cases
from klfast.core.errors import InvalidInputError
from klfast.dispatch import registry


def test_every_op_has_a_cpu_kernel_and_a_self_check():
    assert set(registry.op_names()) == set(op_cases.CASES)
    assert all(registry.has_kernel(name, "CPU") for name in registry.op_names())


def test_linear_on_a_gpu_needs_no_triton():
    assert registry.has_kernel("linear", "CUDA") and registry.has_kernel("linear", "XPU")


def test_direct_calls_are_checked_before_a_kernel_reads_memory(tier):
    u, A, B = torch.randn(2, 19, 33), -torch.rand(19, 16), torch.randn(2, 1, 16, 7)
    with pytest.raises(InvalidInputError, match="selective_scan"):
        torch.ops.klfast.selective_scan.default(u, u, A, B, B, None, None, None, None, False)


def test_tensors_on_several_devices_are_refused():
    x = torch.randn(2, 4, 8)
    with pytest.raises(InvalidInputError, match="one device"):
        ops.causal_conv1d_fn(x, torch.empty(4, 3, device="meta"))


WITHOUT_EXTENSION = """
import sys, warnings
sys.modules["klfast._C"] = None  # makes its import fail
import klfast, torch
from klfast import ops
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    ops.rms_norm(torch.ones(2, 8), torch.ones(8))
reason = "the extension klfast._C cannot be imported (ModuleNotFoundError: "
[message] = [str(warning.message) for warning in caught]
assert reason in message and "build it with pip install ." in message, message
found = klfast.explain("rms_norm")
assert found.chosen == "reference"
assert all("klfast._C cannot be imported" in found.rejected[tier] for tier in klfast.dispatch.pins.CPU_TIERS)
"""


def test_warning_names_a_missing_extension():
    other_process.run(WITHOUT_EXTENSION)


def test_import_errors_of_bugs_are_not_swallowed():
    other_process.run(
        """
        import sys
        sys.modules["klfast.backends.cpu.attention"] = None
        try:
            from klfast import ops
        except ImportError as error:
            assert "cpu.attention" in str(error)
        else:
            raise AssertionError("klfast.ops was imported without its kernels")
        """
    )


def test_reasons_for_one_op_and_for_a_device():
    registry.unavailable("HPU", "there is no compiler.")  # klfast has kernels for neither of these devices
    registry.unavailable("HPU", "it needs the extension.", "linear_divergence")
    assert registry.why_no_kernel("hpu", "rms_norm") == registry.why_no_kernel("hpu") == "there is no compiler."
    assert registry.why_no_kernel("hpu", "linear_divergence") == "it needs the extension."
    assert registry.why_no_kernel("mps") == "klfast has no mps kernel of this op."


def test_amd_gpus_get_no_kernels_made_for_nvidia():
    other_process.run(
        """
        import torch
        torch.version.hip = "7.0"
        from klfast import ops
        from klfast.dispatch import registry
        assert not registry.has_kernel("rms_norm", "CUDA") and registry.has_kernel("linear", "CUDA")
        assert "AMD GPUs (ROCm)" in registry.why_no_kernel("cuda", "rms_norm")
        assert "AMD" not in registry.why_no_kernel("xpu")
        """
    )
