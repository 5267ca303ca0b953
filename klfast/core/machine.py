"""Facts about this machine: CPU, packages, the extension, and the devices that torch can use."""

from __future__ import annotations

import importlib.metadata
import platform
from pathlib import Path

import torch

from klfast.core.errors import KernelUnavailableError

_INSTALL = {
    "cuda": "for an NVIDIA GPU, install PyTorch's CUDA build (on Linux what pip install torch brings)",
    "xpu": "for an Intel GPU, pip install torch --index-url https://download.pytorch.org/whl/xpu (docs/XPU.md)",
}
_DRIVER = {
    "cuda": "nvidia-smi must list the GPU",
    "xpu": "Intel's GPU driver and Level Zero must be installed, and clinfo or sycl-ls list the GPU",
}


def require(device: str) -> None:
    """Raise KernelUnavailableError, with a remedy, unless torch can use this device type.

    Types other than cuda and xpu are left to torch.
    """
    if device not in _INSTALL or getattr(torch, device).is_available():
        return
    if getattr(torch.version, device, None) is None:
        raise KernelUnavailableError(
            f"this PyTorch ({torch.__version__}) cannot use {device} devices; {_INSTALL[device]}"
        )
    raise KernelUnavailableError(f"PyTorch ({torch.__version__}) finds no {device} device; {_DRIVER[device]}")


def cpu_name() -> str:
    """Return the CPU's model name as the system reports it."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def available_memory() -> int | None:
    """Return the bytes of memory that programs can still take without swapping; None if the system does not say."""
    try:
        for line in Path("/proc/meminfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) << 10
    except (OSError, ValueError, IndexError):
        pass
    return None


def installed_version(package: str) -> str:
    """Return a package's version, "none" if it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def extension() -> str:
    """Return the path of klfast's C++ extension, or why it cannot be imported."""
    try:
        from klfast import _C
    except ImportError as error:
        return f"missing ({error}); build it with pip install ."
    return _C.__file__
