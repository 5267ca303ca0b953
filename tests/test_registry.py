"""The rules that hold for every op."""

import pytest
import torch

from klfast import ops, registry, selfcheck
from klfast.errors import InvalidInputError


def test_every_op_has_a_cpu_kernel_and_a_self_check():
    assert set(registry.op_names()) == set(selfcheck.CASES)
    assert all(registry.has_kernel(name, "CPU") for name in registry.op_names())


def test_linear_on_a_gpu_needs_no_triton():
    assert registry.has_kernel("linear", "CUDA") and registry.has_kernel("linear", "XPU")


def test_a_direct_call_is_checked_before_any_kernel_reads_memory(tier):
    u, A, B = torch.randn(2, 19, 33), -torch.rand(19, 16), torch.randn(2, 1, 16, 7)
    with pytest.raises(InvalidInputError, match="selective_scan"):
        torch.ops.klfast.selective_scan.default(u, u, A, B, B, None, None, None, None, False)


def test_tensors_on_several_devices_are_refused():
    x = torch.randn(2, 4, 8)
    with pytest.raises(InvalidInputError, match="one device"):
        ops.causal_conv1d_fn(x, torch.empty(4, 3, device="meta"))
