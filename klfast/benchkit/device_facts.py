"""Facts about a device, as torch and its driver report them."""

from __future__ import annotations

import importlib
import os
import platform
import subprocess
from collections.abc import Callable
from pathlib import Path

import torch

import klfast
from klfast.core.errors import one_line
from klfast.core.machine import cpu_name, extension, installed_version
from klfast.dispatch.pins import available_tiers

_TRITONS = ("triton", "triton-xpu", "pytorch-triton-xpu", "pytorch-triton")  # packages that contain Triton
_VARIABLES = (
    "KLFAST_ISA",
    "KLFAST_STRICT",
    "TRITON_INTERPRET",
    "CUDA_VISIBLE_DEVICES",
    "ONEAPI_DEVICE_SELECTOR",
    "ZE_AFFINITY_MASK",
    "ZE_FLAT_DEVICE_HIERARCHY",
)
_PRIVATE = ("uuid", "pci_")  # prefixes of properties that identify a single machine


def gather(device: str) -> dict[str, str]:
    """Return versions, the device's properties and relevant environment variables; no names of user or host."""
    found = {
        "klfast": klfast.__version__,
        "torch": torch.__version__,
        "triton": triton() or "none",
        "transformers": installed_version("transformers"),
        "python": platform.python_version(),
        "OS": _system(),
        "cpu": cpu_name(),
        "cores": f"{os.cpu_count()}, {torch.get_num_threads()} threads",
        "tiers": ", ".join(available_tiers()),
        "extension": extension().replace(str(Path.home()), "~"),
        "device": device,
    }
    if device != "cpu":
        found |= _of_accelerator(device)
    return found | {name: os.environ[name] for name in _VARIABLES if name in os.environ}


def triton() -> str:
    """Return the installed packages that contain Triton, with versions; empty if there are none."""
    return ", ".join(f"{name} {version}" for name in _TRITONS if (version := installed_version(name)) != "none")


def driver(device: str) -> str:
    """Return the version of a GPU's driver; empty without nvidia-smi, "unknown (why)" if nvidia-smi fails."""
    if device == "xpu":
        return str(getattr(torch.xpu.get_device_properties(), "driver_version", ""))
    try:
        done = subprocess.run(
            ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=30,
            check=True,
        )
    except FileNotFoundError:
        return ""
    except (OSError, subprocess.SubprocessError) as error:
        return f"unknown ({one_line(error)})"
    return done.stdout.split("\n")[0].strip()


def _system() -> str:
    try:
        return f"{platform.freedesktop_os_release()['PRETTY_NAME']}, {platform.platform()}"
    except (OSError, KeyError):  # not Linux
        return platform.platform()


def _of_accelerator(device: str) -> dict[str, str]:
    module = importlib.import_module(f"torch.{device}")
    found = {
        "device name": _or_why_not(module.get_device_name),
        f"torch.version.{device}": str(getattr(torch.version, device)),
    }
    found |= {"driver": _or_why_not(lambda: driver(device) or "unknown")}
    try:
        properties = module.get_device_properties()
    except RuntimeError as error:
        found["properties"] = one_line(error)
    else:
        values = {
            name: getattr(properties, name, None) for name in dir(properties) if not name.startswith(("_", *_PRIVATE))
        }
        found |= {
            name: str(value)
            for name, value in values.items()
            if isinstance(value, (bool, int, float, str, list, tuple))
        }
    return found | {"free and total memory, bytes": _or_why_not(module.mem_get_info)}


def _or_why_not(ask: Callable[[], object]) -> str:
    try:
        return str(ask())
    except RuntimeError as error:  # from the driver
        return one_line(error)
