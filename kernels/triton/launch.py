"""What a kernel is called with, apart from calling it."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch

# The interpreter (TRITON_INTERPRET=1) computes in NumPy, which has no bfloat16: kernels widen to float32 there.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

# For every kernel: products are fused with sums. Triton 3.9 warns where a launch does not say, and 3.10 will not fuse.
FUSED = {"enable_fp_fusion": True}


@dataclass(frozen=True)
class Launch:
    """One kernel launch.

    Attributes:
        kernel: the jitted function.
        grid: programs along each axis.
        args: its arguments by name, tl.constexpr ones included.
        options: num_warps, num_stages, on XPU grf_mode.
    """

    kernel: Any
    grid: tuple[int, ...]
    args: dict[str, Any]
    options: dict[str, Any] = field(default_factory=dict)

    def run(self) -> None:
        if all(self.grid):
            with _device_of(next(value for value in self.args.values() if isinstance(value, torch.Tensor))):
                self.kernel[self.grid](**self.args, **self.options, **FUSED)


def _device_of(t: torch.Tensor) -> AbstractContextManager:
    """Makes a tensor's GPU the current one, which is where Triton launches."""
    return nullcontext() if t.is_cpu else torch.get_device_module(t.device).device_of(t)


def strided(dims: dict[str, str], **tensors: torch.Tensor | None) -> dict:
    """Kernel arguments of tensors: x_ptr and, for each letter of its dimensions, the stride x_<letter>; None has strides 0."""
    args = {f"{name}_ptr": t for name, t in tensors.items()}
    for name, t in tensors.items():
        args |= zip(
            (f"{name}_{dim}" for dim in dims[name]), (0,) * len(dims[name]) if t is None else t.stride(), strict=True
        )
    return args


def options(config: Any) -> dict[str, Any]:
    """num_warps and what else of num_stages and grf_mode (registers a thread on Intel GPUs) a configuration has."""
    values = {name: getattr(config, name, None) for name in ("num_warps", "num_stages", "grf_mode")}
    return {name: value for name, value in values.items() if value is not None}


def family(device: torch.device) -> str:
    """Whose configurations to use: "intel" for XPU, else "nvidia"."""
    return "intel" if device.type == "xpu" else "nvidia"


def speaks_ptx(family: str) -> bool:
    """Whether kernels may hold NVIDIA's instructions; the interpreter knows none."""
    return family == "nvidia" and not INTERPRETED


@cache
def cores(device: torch.device) -> int:
    """Streaming multiprocessors, or Xe cores, to keep busy; 1 for the interpreter."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    if device.type == "xpu":
        properties = torch.xpu.get_device_properties(device)
        return getattr(properties, "gpu_subslice_count", 0) or max(1, properties.max_compute_units // 8)
    return 1


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def power_of_2(n: int) -> int:
    """The smallest power of two that is not below n."""
    return 1 << max(n - 1, 0).bit_length()
