"""What this machine is: CPU, packages, the extension, and which devices torch can use."""

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
    """KernelUnavailableError, with what to do, if torch cannot compute on a type of device; of others than cuda and xpu torch tells."""
    if device not in _INSTALL or getattr(torch, device).is_available():
        return
    if getattr(torch.version, device, None) is None:
        raise KernelUnavailableError(
            f"this PyTorch ({torch.__version__}) cannot use {device} devices; {_INSTALL[device]}"
        )
    raise KernelUnavailableError(f"PyTorch ({torch.__version__}) finds no {device} device; {_DRIVER[device]}")


def cpu_name() -> str:
    """The CPU's model as the system calls it."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def installed_version(package: str) -> str:
    """Of a package; "none" if it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def extension() -> str:
    """Where klfast's C++ extension lies, or why it cannot be imported."""
    try:
        from klfast import _C
    except ImportError as error:
        return f"missing ({error}); build it with pip install ."
    return str(_C.__file__)
