"""``register_kernels``: klfast's functions for transformers' ``use_kernels=True``, through the package kernels.

That package exchanges functions of transformers' modeling files for ones that it loads by name, usually from the hub.
transformers has a mapping of names, devices and modes, which it gives to the package each time that a model asks for
kernels (transformers 5.17 to 5.24, integrations/hub_kernels.py). klfast's functions go there: so they hold in every
thread, and before transformers' own choice for XPU.
"""

from __future__ import annotations

import importlib
import os
from inspect import Parameter, Signature
from typing import Any, NamedTuple

import torch
from torch import nn

from klfast.acceleration.transformers_functions import REPLACEMENTS
from klfast.core.errors import KernelUnavailableError
from klfast.dispatch import pins, registry

DEVICES = ("cpu", "xpu")


class Kernel(NamedTuple):
    """A function that the package kernels exchanges.

    Attributes:
        replaces: its name in transformers' modeling files, as in ``REPLACEMENTS``.
        parameters: its parameters there (transformers 5.17 to 5.24), whose number and kinds kernels compares.
    """

    replaces: str
    parameters: str


_STATE = "initial_state output_final_state use_qk_l2norm_in_kernel **kwargs"
KERNELS = {
    "causal_conv1d_fn": Kernel("causal_conv1d_fn", "hidden_states weight bias activation **kwargs"),
    "causal_conv1d_update": Kernel("causal_conv1d_update", "hidden_states conv_state weight bias activation"),
    "selective_scan_fn": Kernel(
        "mamba_selective_scan",
        "hidden_states dt A B C D z delta_bias delta_softplus return_last_state "
        "use_mambapy use_associative_scan **kwargs",
    ),
    "selective_state_update": Kernel(
        "mamba_selective_state_update", "state hidden_states dt A B C D dt_bias dt_softplus z **kwargs"
    ),
    "mamba_chunk_scan_combined": Kernel(
        "mamba2_chunk_scan",
        "hidden_states dt A B C chunk_size D dt_bias initial_states dt_softplus dt_limit return_final_states **kwargs",
    ),
    "chunk_gated_delta_rule": Kernel("torch_chunk_gated_delta_rule", f"query key value g beta chunk_size {_STATE}"),
    "fused_recurrent_gated_delta_rule": Kernel("torch_recurrent_gated_delta_rule", f"query key value g beta {_STATE}"),
    "chunk_kda": Kernel("chunk_kimi_delta_attention", f"query key value g beta chunk_size {_STATE}"),
    "fused_recurrent_kda": Kernel("recurrent_kimi_delta_attention", f"query key value g beta {_STATE}"),
}

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
    """What the package kernels takes for a repository: it loads one layer."""

    name: str

    def load(self) -> type[nn.Module]:
        """Return the class whose forward takes the place of the original's."""
        return _layer(self.name)

    def __str__(self) -> str:
        return f"klfast ({self.name})"


def _layer(name: str) -> type[nn.Module]:
    replaces, parameters = KERNELS[name]
    function, op, _ = REPLACEMENTS[replaces]

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        original = type(self).forward
        if not _replaced:
            return original(self, *args, **kwargs)
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
        device, reason = tensors[0].device.type, ""
        if not registry.has_kernel(op, device.upper()):
            reason = registry.why_no_kernel(device, op)
        elif torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
            reason = pins.NO_GRADIENTS
        if reason:
            pins.slow_path(name, list(tensors[0].shape), reason, how="transformers' own function")
            return original(self, *args, **kwargs)
        return function(*args, **kwargs)

    forward.__signature__ = _signature(parameters)  # type: ignore[attr-defined]
    return type(name, (nn.Module,), {"forward": forward, "has_backward": False, "can_torch_compile": True})


def _signature(parameters: str) -> Signature:
    kinds = {"**": Parameter.VAR_KEYWORD}
    names = ["self", *parameters.split()]
    return Signature(
        [Parameter(name.lstrip("*"), kinds.get(name[:2], Parameter.POSITIONAL_OR_KEYWORD)) for name in names]
    )
