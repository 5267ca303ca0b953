"""``register_kernels``: klfast's functions for transformers' ``use_kernels=True``, through the package kernels.

That package exchanges functions of transformers' modeling files for ones that it loads by name, usually from the hub.
transformers has a mapping of names, devices and modes, which it gives to the package each time that a model asks for
kernels (transformers 5.17 to 5.24, integrations/hub_kernels.py). klfast's functions go there: so they hold in every
thread, and before transformers' own choice for XPU.
"""

from __future__ import annotations

import importlib
import os
from typing import Any, NamedTuple

from torch import nn

from klfast.acceleration.transformers_functions import REPLACEMENTS
from klfast.core.errors import KernelUnavailableError
from klfast.dispatch import registry
from klfast.integrations.hub_layers import KERNELS, layer

DEVICES = ("cpu", "xpu")

# What transformers' mapping held instead of each of klfast's entries, by name and device; empty if not registered.
_replaced: dict[tuple[str, str], Any] = {}


def register_kernels() -> None:
    """Let transformers find klfast's kernels itself: ``from_pretrained(..., use_kernels=True)``.

    On the CPU and XPU, the mixers of models that ask for kernels then run klfast's convolutions, scans and delta rules,
    without ``klfast.accelerate``; that covers more, such as norms and linear layers. CUDA keeps transformers' choice.
    ``unregister_kernels`` undoes it, also for models that are loaded.

    The package kernels exchanges a function for the whole modeling file: a model that did not ask for kernels runs
    klfast's, too, once another one of its file did. Wherever klfast has no kernel for a device, or gradients are
    needed, the original runs, with a ``SlowPathWarning``.

    Raises:
        KernelUnavailableError: the package kernels is missing, or not of the version that transformers needs; an
            environment variable turns it off; or klfast has no kernels here.
    """
    mapping = _transformers_mapping()
    inference, compiled = (importlib.import_module("kernels").Mode[mode] for mode in ("INFERENCE", "TORCH_COMPILE"))
    found = [
        (name, device)
        for name, kernel in KERNELS.items()
        for device in DEVICES
        if registry.has_kernel(REPLACEMENTS[kernel.replaces].op, device.upper())
    ]
    if not found:
        raise KernelUnavailableError(f"register_kernels: {registry.why_no_kernel('cpu')}")
    for name, device in found:
        devices = mapping.setdefault(name, {})
        _replaced.setdefault((name, device), devices.get(device))
        modes = dict.fromkeys((inference, inference | compiled), _Repository(name))
        devices[device] = {**(devices.get(device) or {}), **modes}


def unregister_kernels() -> None:
    """Undo ``register_kernels``; models that are loaded run their original functions again."""
    if not _replaced:
        return
    mapping = _transformers_mapping()
    for (name, device), before in _replaced.items():
        if before is None:
            del mapping[name][device]
        else:
            mapping[name][device] = before
    _replaced.clear()


def _transformers_mapping() -> dict[str, dict[Any, Any]]:
    """Return what transformers registers with the package kernels; raise KernelUnavailableError if it does not."""
    from transformers import __version__
    from transformers.integrations import hub_kernels
    from transformers.utils import ENV_VARS_TRUE_VALUES, import_utils

    if not import_utils.is_kernels_available():
        wanted = f"{import_utils.KERNELS_MIN_VERSION},<{import_utils.KERNELS_MAX_VERSION}"
        raise KernelUnavailableError(
            f"register_kernels: transformers {__version__} finds no package kernels of a version that it takes; "
            f"pip install 'kernels>={wanted}'"
        )
    hub, disabled = os.environ.get("USE_HUB_KERNELS", "YES"), os.environ.get("DISABLE_KERNEL_MAPPING", "0")
    if hub.upper() not in ENV_VARS_TRUE_VALUES or disabled != "0":
        which = "DISABLE_KERNEL_MAPPING" if disabled != "0" else "USE_HUB_KERNELS"
        raise KernelUnavailableError(f"register_kernels: the environment variable {which} turns kernels off; unset it")
    mapping: dict[str, dict[Any, Any]] = hub_kernels.get_kernel_mapping_transformers()
    return mapping


class _Repository(NamedTuple):
    """A repository, as the package kernels sees one: it loads one layer."""

    name: str

    def load(self) -> type[nn.Module]:
        """Return the class whose forward takes the place of the original's."""
        return layer(self.name, lambda: bool(_replaced))

    def __str__(self) -> str:
        return f"klfast ({self.name})"
