"""klfast's state-space functions inside transformers' Mamba, Mamba-2 and FalconMamba.

The mixers of these models look their functions up in their module's globals. ``accelerate`` gives each mixer of one
model a copy of its class's forward whose globals hold klfast's functions instead: nothing global changes, other models
in the process stay as they are, and the copy follows whatever else the installed version's forward does.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import CellType, FunctionType, MethodType

import torch
from torch import nn

from klfast import ops, registry, runtime
from klfast.errors import InvalidInputError, KernelUnavailableError

MIXERS = ("MambaMixer", "Mamba2Mixer", "FalconMambaMixer")
_lock = threading.Lock()


def accelerate(model: nn.Module) -> nn.Module:
    """Let a transformers Mamba, Mamba-2 or FalconMamba model run klfast's kernels on the CPU; returns the same model.

    Works in place on this model only, caches and generation included; ``unaccelerate`` undoes it. A model without
    state-space layers (a Llama) has nothing to accelerate and is returned unchanged, as is one already accelerated.
    Tensors on other devices take the model's own path. So do gradients, with a ``SlowPathWarning``: run inference under
    ``torch.inference_mode()`` or ``torch.no_grad()``.

    Raises:
        InvalidInputError: ``model`` is no nn.Module.
        KernelUnavailableError: the extension klfast._C was not built.
    """
    with _lock:
        for mixer in _mixers(model):
            if not registry.has_kernel("selective_scan", "CPU"):
                raise KernelUnavailableError(f"accelerate: {runtime.why_not('scalar')} Install klfast with a C++ compiler present")
            if "forward" not in vars(mixer):
                mixer.forward = MethodType(_native_forward(type(mixer)), mixer)
    return model


def unaccelerate(model: nn.Module) -> nn.Module:
    """Undo ``accelerate``; a model that was not accelerated is returned unchanged.

    Raises:
        InvalidInputError: ``model`` is no nn.Module.
    """
    with _lock:
        for mixer in _mixers(model):
            if is_accelerated(mixer):
                del mixer.forward
    return model


def is_accelerated(mixer: nn.Module) -> bool:
    """Whether this layer runs klfast's functions."""
    return hasattr(vars(mixer).get("forward"), "klfast_original")


def _mixers(model: nn.Module) -> list[nn.Module]:
    if not isinstance(model, nn.Module):
        raise InvalidInputError(f"accelerate takes a transformers model, got {type(model).__name__}")
    return [m for m in model.modules() if type(m).__name__ in MIXERS and type(m).__module__.startswith("transformers.")]


_forwards: dict[type, Callable] = {}


def _native_forward(mixer_class: type) -> Callable:
    """The class's forward with klfast's functions, or the original where those do not apply; made once a class."""
    if mixer_class not in _forwards:
        original = mixer_class.forward
        native = _with_globals(original, _substitutes(original))

        def forward(self, hidden_states, *args, **kwargs):
            if hidden_states.device.type != "cpu":
                return original(self, hidden_states, *args, **kwargs)
            if torch.is_grad_enabled() and (hidden_states.requires_grad or any(p.requires_grad for p in self.parameters())):
                runtime.slow_path(mixer_class.__name__, list(hidden_states.shape), "klfast's functions have no gradients; use torch.inference_mode().")
                return original(self, hidden_states, *args, **kwargs)
            return native(self, hidden_states, *args, **kwargs)

        forward.klfast_original = original
        _forwards[mixer_class] = forward
    return _forwards[mixer_class]


def _with_globals(function: Callable, changed: dict[str, object]) -> Callable:
    """A copy of a function, and of those it wraps, that sees other globals."""
    closure, inner = function.__closure__, getattr(function, "__wrapped__", None)
    namespace = function.__globals__
    if inner is None:
        namespace = {**namespace, **changed}
    else:
        copy = _with_globals(inner, changed)
        closure = tuple(CellType(copy) if cell.cell_contents is inner else cell for cell in closure)
    result = FunctionType(function.__code__, namespace, function.__name__, function.__defaults__, closure)
    result.__kwdefaults__ = function.__kwdefaults__
    return result


def _substitutes(forward: Callable) -> dict[str, Callable]:
    while hasattr(forward, "__wrapped__"):
        forward = forward.__wrapped__
    return {name: function for name, function in _FUNCTIONS.items() if name in forward.__globals__}


# transformers' functions under its names, with the arguments its mixers pass; further keywords mean nothing on a CPU
# but for packed sequences, which the ops refuse.


def _conv1d(x, weight, bias=None, activation=None, seq_idx=None, **_):
    return ops.causal_conv1d_fn(x, weight, bias, seq_idx, activation=activation)


def _scan(u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False, return_last_state=False, **_):
    return ops.selective_scan_fn(u, delta, A, B, C, D, z, delta_bias, delta_softplus, return_last_state)


def _step(state, x, dt, A, B, C, D=None, z=None, dt_bias=None, dt_softplus=False, **_):
    return ops.selective_state_update(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus)


def _chunk_scan(x, dt, A, B, C, chunk_size, *, cu_seq_lens_q=None, cu_seq_lens_k=None, max_length_q=None, max_length_k=None, **kwargs):
    return ops.mamba_chunk_scan_combined(x, dt, A, B, C, chunk_size, **kwargs)


_FUNCTIONS = {
    "causal_conv1d_fn": _conv1d,
    "causal_conv1d_update": ops.causal_conv1d_update,
    "mamba_selective_scan": _scan,
    "mamba_selective_state_update": _step,
    "mamba2_chunk_scan": _chunk_scan,
    "mamba2_selective_state_update": _step,
}
