"""Kernels for tensors on CUDA and XPU devices, in Triton except for linear.

klfast.kernels (and triton) are imported at the first call. Under TRITON_INTERPRET=1, ``klfast.using("triton")`` runs
them on CPU tensors, slowly, for tests.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import torch

from klfast.dispatch import registry

DEVICES = ("CUDA", "XPU")
FORMATS = ("int4", "int6", "int8")  # of weights that the kernels take
# Their kernels compute sums, which the extension turns into metrics.
DIVERGENCE = ("logit_divergence", "linear_divergence")
_SSM = (
    "causal_conv1d",
    "causal_conv1d_update",
    "selective_scan",
    "selective_state_update",
    "mamba_chunk_scan",
    "gated_delta_rule",
)
_MODULES = {
    "dequant_matmul": "matmul",
    "grouped_dequant_matmul": "matmul",
    "decode_attention": "attention",
    "rms_norm": "norm",
    "gathered_logits": "divergence",
    **dict.fromkeys(DIVERGENCE, "divergence"),
    **dict.fromkeys(_SSM, "ssm"),
}


def _kernel(name: str) -> Callable:
    """Return the kernel of an op; its module is imported at the first call."""

    def kernel(*args):
        return getattr(importlib.import_module(f"klfast.backends.triton.{_MODULES[name]}"), name)(*args)

    return kernel


KERNELS = {name: _kernel(name) for name in _MODULES}


def _why_no_triton(device: str) -> str:
    """Return why Triton kernels cannot run on a type of device, one sentence; empty if they can."""
    if device == "CUDA" and torch.version.hip is not None:
        return "klfast's Triton kernels have not been tested on AMD GPUs (ROCm)."
    if importlib.util.find_spec("triton") is None:
        remedy = "pip install klfast[triton]" if device == "CUDA" else "PyTorch's XPU build brings it: docs/XPU.md"
        return f"Triton, which klfast's {device.lower()} kernels need, is not installed ({remedy})."
    return ""


def register() -> None:
    """Register every kernel with its op; those in Triton only where they can run."""
    from klfast.backends.triton.matmul import linear

    for device in DEVICES:
        registry.register_kernel("linear", device, linear, handed_over=lambda *_: "torch's own product serves GPUs.")
        if reason := _why_no_triton(device):
            registry.unavailable(device, reason)
            continue
        for name, kernel in KERNELS.items():
            if name in DIVERGENCE and not registry.has_kernel(name, "CPU"):
                registry.unavailable(device, registry.why_no_kernel("cpu", name), name)
            else:
                registry.register_kernel(name, device, kernel, formats=FORMATS)
