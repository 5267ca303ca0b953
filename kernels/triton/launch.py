"""Kernel launches as data: arguments, grid and options, separate from the call."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch

from klfast.core.errors import KernelUnavailableError

# The interpreter (TRITON_INTERPRET=1) computes in NumPy, which has no bfloat16: kernels widen to float32 there.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

# For every kernel: products are fused with sums. Triton 3.9 warns without this option, and 3.10 will not fuse.
FUSED = {"enable_fp_fusion": True}

MANY = 1 << 62  # more than anything has


@dataclass(frozen=True)
class Launch:
    """One kernel launch.

    Attributes:
        kernel: the jitted function.
        grid: programs along each axis.
        args: its arguments by name, including tl.constexpr ones.
        options: num_warps, num_stages, on XPU grf_mode.
    """

    kernel: Any
    grid: tuple[int, ...]
    args: dict[str, Any]
    options: dict[str, Any] = field(default_factory=dict)

    def run(self) -> None:
        """Launch the kernel, unless the grid is empty."""
        if all(self.grid):
            first = next(value for value in self.args.values() if isinstance(value, torch.Tensor))
            _require_capability(first.device)
            with _device_of(first):
                self.kernel[self.grid](**self.args, **self.options, **FUSED)


def _device_of(t: torch.Tensor) -> AbstractContextManager:
    """Make a tensor's GPU the current one, where Triton launches."""
    return nullcontext() if t.is_cpu else torch.get_device_module(t.device).device_of(t)


def strided(dims: dict[str, str], **tensors: torch.Tensor | None) -> dict:
    """Return kernel arguments for tensors: x_ptr, and a stride x_<letter> per letter of ``dims``; 0 for None."""
    args = {f"{name}_ptr": t for name, t in tensors.items()}
    for name, t in tensors.items():
        args |= zip(
            (f"{name}_{dim}" for dim in dims[name]), (0,) * len(dims[name]) if t is None else t.stride(), strict=True
        )
    return args


def options(config: Any) -> dict[str, Any]:
    """Return a configuration's num_warps, num_stages and grf_mode (registers per thread on Intel GPUs), if set."""
    values = {name: getattr(config, name, None) for name in ("num_warps", "num_stages", "grf_mode")}
    return {name: value for name, value in values.items() if value is not None}


def family(device: torch.device) -> str:
    """Return the vendor of a device's configurations: "intel" for XPU, else "nvidia"."""
    return "intel" if device.type == "xpu" else "nvidia"


def speaks_ptx(family: str) -> bool:
    """Return True if kernels may contain NVIDIA's instructions, which the interpreter does not support."""
    return family == "nvidia" and not INTERPRETED


@cache
def cores(device: torch.device) -> int:
    """Return the number of streaming multiprocessors or Xe cores to keep busy; 1 for the interpreter."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    if device.type == "xpu":
        properties = torch.xpu.get_device_properties(device)
        return getattr(properties, "gpu_subslice_count", 0) or max(1, properties.max_compute_units // 8)
    return 1


@cache
def shared_memory(device: torch.device) -> int:
    """Return the bytes of shared memory that a program may have on an NVIDIA GPU; elsewhere no limit is known."""
    if device.type != "cuda":
        return MANY
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin


@cache
def _require_capability(device: torch.device) -> None:
    """Raise KernelUnavailableError for an NVIDIA GPU for which the kernels do not compile, or only with huge stacks."""
    if device.type == "cuda" and (capability := torch.cuda.get_device_capability(device)) < (8, 0):
        raise KernelUnavailableError(
            f"klfast's kernels need an NVIDIA GPU of compute capability 8.0 or newer, and "
            f"{torch.cuda.get_device_name(device)} has {'.'.join(map(str, capability))}; "
            'with klfast.using("reference") plain torch computes instead'
        )


def cdiv(a: int, b: int) -> int:
    """Return a / b, rounded up."""
    return -(-a // b)


def power_of_2(n: int) -> int:
    """Return the smallest power of two that is at least n."""
    return 1 << max(n - 1, 0).bit_length()
