"""Kernels for tensors on CUDA and XPU devices, in Triton but for linear; klfast.kernels (and triton) are imported at the first call.

Under TRITON_INTERPRET=1, ``klfast.using("triton")`` runs them on CPU tensors, slowly: that is for tests.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable

import torch
import torch.nn.functional as F

from klfast.dispatch import pins, registry
from klfast.quant.layouts import RELAID, fill_blocks, parts_in
from klfast.quant.types import Layout

DEVICES = ("CUDA", "XPU")


def dequant_matmul(x, packed, scale, zero_point, bias, n, k, bits, group_size, layout, activation):
    y = x.new_empty((*x.shape[:-1], n))
    if not k or not y.numel():
        return y.zero_() if bias is None else y.copy_(bias.expand_as(y))
    if layout != Layout.TILED.value:
        pins.slow_path("dequant_matmul", list(x.shape), RELAID, how="with another pass over the weight")
        packed, scale, zero_point = parts_in(Layout.TILED, packed, scale, zero_point, n, k, bits, group_size, layout)
    dequant_product(
        x.reshape(-1, k), packed, scale, zero_point, bias, y.view(-1, n), k, bits, group_size, int8=activation == "int8"
    )
    return y


def dequant_product(
    x: torch.Tensor,
    packed: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor | None,
    bias: torch.Tensor | None,
    y: torch.Tensor,
    k: int,
    bits: int,
    group_size: int,
    *,
    int8: bool = False,
) -> None:
    """Write x [M, K] times a weight's parts in ``Layout.TILED`` to y [M, N], of any float dtype; neither is empty."""
    from klfast.kernels import dequant_matmul as kernel
    from klfast.kernels.launch import cores, family

    rows = fill_blocks(x, bits, group_size)
    if rows.stride(1) != 1:
        rows = rows.contiguous()
    contiguous = [None if t is None else t.detach().contiguous() for t in (packed, scale, zero_point, bias)]
    for launch in kernel.plan(
        rows, *contiguous, y, k, bits, group_size, int8=int8, family=family(x.device), cores=cores(x.device)
    ):
        launch.run()


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype | None) -> torch.Tensor:
    """torch's own product (cuBLAS, oneDNN): no kernel of klfast's would be better."""
    if bias is None or bias.dtype == x.dtype:
        y = F.linear(x, weight, bias)
    else:
        y = F.linear(x.float(), weight.float(), bias.float()).to(x.dtype)
    return y.detach().to(dtype or x.dtype)  # no gradients, as all ops


def decode_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    from klfast.kernels import decode_attention as kernel
    from klfast.kernels.launch import cores

    y = q.new_empty(*q.shape[:2], v.shape[-1])
    if y.numel():
        for launch in kernel.plan(q.detach(), k.detach(), v.detach(), y, scale, cores=cores(q.device)):
            launch.run()
    return y


def _from(module: str, name: str) -> Callable:
    """A kernel of another module of this package, imported at the first call."""

    def kernel(*args):
        return getattr(importlib.import_module(f"klfast.backends.triton.{module}"), name)(*args)

    return kernel


DIVERGENCE = (
    "logit_divergence",
    "linear_divergence",
)  # their kernels leave sums, which the extension turns into metrics
KERNELS = {
    "dequant_matmul": dequant_matmul,
    "decode_attention": decode_attention,
    **{name: _from("divergence", name) for name in DIVERGENCE},
    **{
        name: _from("ssm", name)
        for name in (
            "causal_conv1d",
            "causal_conv1d_update",
            "selective_scan",
            "selective_state_update",
            "mamba_chunk_scan",
            "rms_norm",
        )
    },
}


def _why_no_triton(device: str) -> str:
    """Why Triton kernels cannot run on a type of device, one sentence; empty if they can."""
    if device == "CUDA" and torch.version.hip is not None:
        return "klfast's Triton kernels have not been tried on AMD GPUs (ROCm)."
    if importlib.util.find_spec("triton") is None:
        remedy = "pip install klfast[triton]" if device == "CUDA" else "PyTorch's XPU build brings it: docs/XPU.md"
        return f"Triton, which klfast's {device.lower()} kernels need, is not installed ({remedy})."
    return ""


def register() -> None:
    """Register every kernel with its op; Triton's only where they can run."""
    for device in DEVICES:
        registry.register_kernel("linear", device, linear, handed_over=lambda *_: "torch's own product serves GPUs.")
        if reason := _why_no_triton(device):
            registry.unavailable(device, reason)
            continue
        for name, kernel in KERNELS.items():
            if name in DIVERGENCE and not registry.has_kernel(name, "CPU"):
                registry.unavailable(device, registry.why_no_kernel("cpu", name), name)
            else:
                registry.register_kernel(name, device, kernel)
