"""Facts about the machine of a run: names, versions, and its limits, measured in the same run."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Callable
from datetime import datetime, timezone

import torch
import torch.nn.functional as F

import klfast
from klfast.benchkit import device_facts as devices
from klfast.benchkit.clock import Clock
from klfast.benchkit.settings import Settings
from klfast.core.machine import cpu_name


def facts(settings: Settings) -> dict[str, object]:
    """Return the columns common to all rows of a run. The tier is that of dequant_matmul."""
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
        **({} if settings.device == "cpu" else {"triton": devices.triton(), "driver": devices.driver(settings.device)}),
        "python": platform.python_version(),
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


class Bandwidth:
    """Measures how fast all threads together, or a GPU, read memory, by sums over more than the caches hold."""

    def __init__(self, settings: Settings) -> None:
        self._clock = Clock(settings.device)
        self._block = torch.ones(settings.working_set // 4, device=settings.device)

    def measure(self) -> float:
        """Return bytes per second, the best of several runs."""
        return 4 * self._block.numel() / _best(self._block.sum, self._clock, 5)


def peaks(settings: Settings) -> dict[str, float]:
    """Return peak_<dtype>_tflops, torch's fastest matmul of large matrices; NaN if torch does not support the dtype.

    It is a lower bound on the machine's peak.
    """
    size = 1024 if settings.quick else 4096
    rows = 512 if settings.device == "cpu" else size  # fewer would leave much of a large GPU idle
    clock, found = Clock(settings.device), {}
    for dtype, product in (
        (torch.float32, F.linear),
        (torch.bfloat16, F.linear),
        (torch.int8, lambda x, w: torch._int_mm(x, w.T)),
    ):
        x, w = (torch.ones(n, size, dtype=dtype, device=settings.device) for n in (rows, size))
        try:
            found[dtype] = _best(lambda x=x, w=w, product=product: product(x, w), clock, 3)
        except (RuntimeError, NotImplementedError):
            found[dtype] = float("nan")
    return {
        f"peak_{str(dtype).removeprefix('torch.')}_tflops": round(2 * rows * size**2 / seconds / 1e12, 4)
        for dtype, seconds in found.items()
    }


def _best(call: Callable[[], object], clock: Clock, times: int) -> float:
    call()
    return min(clock.seconds(call) for _ in range(times))


def memory_peak(run: Callable[[], object], device: str) -> float:
    """Return the peak growth in megabytes of a GPU's memory or (on Linux; else NaN) of the process during ``run``."""
    if device != "cpu":
        module = torch.get_device_module(device)
        module.synchronize()
        module.reset_peak_memory_stats()
        before = module.memory_allocated()
        run()
        module.synchronize()
        return (module.max_memory_allocated() - before) / 1e6
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # resets the high-water mark to the resident size
        before = _status("VmRSS")
        run()
        return (_status("VmHWM") - before) / 1e6
    except OSError:
        return float("nan")


def _status(key: str) -> int:
    """Return a field of this process's memory in bytes; Linux counts in units of 1,024."""
    with open("/proc/self/status") as file:
        return 1024 * next(int(line.split()[1]) for line in file if line.startswith(key))
