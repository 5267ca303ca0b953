"""Layers of the shape that the package kernels checks, made of klfast's functions for transformers' mixers.

kernels exchanges a function of a modeling file by the forward of an nn.Module without members, whose parameters it
compares with the function's (kernels 0.17.2, layer/layer.py, ``_validate_layer``).
"""

from __future__ import annotations

from collections.abc import Callable
from inspect import Parameter, Signature
from typing import Any, NamedTuple

import torch
from torch import nn

from klfast.acceleration.transformers_functions import REPLACEMENTS
from klfast.dispatch import pins, registry


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


def layer(name: str, wanted: Callable[[], bool] = lambda: True) -> type[nn.Module]:
    """Return the class for one of ``KERNELS``, whose forward takes the place of the original's.

    Where klfast has no kernel for a device, or gradients are needed, the original runs, with a ``SlowPathWarning``;
    without one while ``wanted`` says no.
    """
    replaces, parameters = KERNELS[name]
    function, op, _ = REPLACEMENTS[replaces]

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        original = type(self).forward
        if not wanted():
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
