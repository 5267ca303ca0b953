"""What the figures were taken on: names, versions, and the machine's own limits, measured in the same run."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Callable
from datetime import datetime, timezone

import torch
import torch.nn.functional as F

import klfast
from klfast.diagnostics import cpu_name

from .contest import synchronized, timed
from .settings import Settings


def facts(settings: Settings) -> dict[str, object]:
    """Columns that every row of a run bears. The tier is that of dequant_matmul."""
    return {
        "machine": cpu_name() if settings.device == "cpu" else getattr(torch, settings.device).get_device_name(),
        "device": settings.device,
        "tier": klfast.explain("dequant_matmul").chosen if settings.device == "cpu" else "triton",
        "threads": torch.get_num_threads(),
        "onednn_max_cpu_isa": os.environ.get("ONEDNN_MAX_CPU_ISA", ""),
        "working_set_mb": round(settings.working_set / 1e6),
        **peaks(settings),
        "klfast": klfast.__version__,
        **{name: _version(name) for name in ("torch", "transformers", "openvino")},
        "python": platform.python_version(),
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


class Bandwidth:
    """Measures how fast all threads together read memory: sums over more than the caches hold."""

    def __init__(self, settings: Settings) -> None:
        self._device = settings.device
        self._block = torch.ones(settings.working_set // 4, device=settings.device)

    def measure(self) -> float:
        """Bytes per second, the best of some runs."""
        return 4 * self._block.numel() / _best(self._block.sum, self._device, 5)


def peaks(settings: Settings) -> dict[str, float]:
    """peak_<dtype>_tflops: the fastest that torch multiplies large matrices, a lower bound of what the machine can do."""
    size = 1024 if settings.quick else 4096
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        x, w = (torch.ones(n, size, dtype=dtype, device=settings.device) for n in (512, size))
        found[dtype] = _best(lambda x=x, w=w: F.linear(x, w), settings.device, 3)
    x, w = (torch.ones(n, size, dtype=torch.int8, device=settings.device) for n in (512, size))
    found[torch.int8] = _best(lambda: torch._int_mm(x, w.T), settings.device, 3)
    return {f"peak_{str(dtype).removeprefix('torch.')}_tflops": round(2 * 512 * size**2 / seconds / 1e12, 4) for dtype, seconds in found.items()}


def _best(run: Callable[[], object], device: str, times: int) -> float:
    call = synchronized(run, device)
    call()
    return min(timed(call) for _ in range(times))


def memory_peak(run: Callable[[], object]) -> float:
    """Megabytes by which the process grows, at most, while ``run`` runs (Linux; NaN elsewhere)."""
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # sets the high-water mark back to what is resident now
        before = _status("VmRSS")
        run()
        return (_status("VmHWM") - before) / 1e3
    except OSError:
        return float("nan")


def _status(key: str) -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(key))
