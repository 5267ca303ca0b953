"""klfast's state-space functions inside transformers' Mamba, Mamba-2 and FalconMamba.

The mixers of these models look their functions up in their module's globals. ``accelerate`` gives each mixer of one
model a copy of its class's forward whose globals hold klfast's functions instead: nothing global changes, other models
in the process stay as they are, and the copy follows whatever else the installed version's forward does. What then
remains beside the matrix products, the norms and the widening of the logits, is replaced as well.
"""

from __future__ import annotations

import dis
import importlib
import inspect
import threading
from collections.abc import Callable
from types import CellType, FunctionType, MethodType

import torch
import torch.nn.functional as F
from torch import nn

from klfast import ops, prepared, registry, runtime
from klfast.errors import InvalidInputError, KernelUnavailableError
from klfast.models import mamba_step

_OPS = {  # transformers' functions: the ops that take their place
    "causal_conv1d_fn": "causal_conv1d",
    "causal_conv1d_update": "causal_conv1d_update",
    "mamba_selective_scan": "selective_scan",
    "mamba_selective_state_update": "selective_state_update",
    "mamba2_chunk_scan": "mamba_chunk_scan",
    "mamba2_selective_state_update": "selective_state_update",
}
_MAMBA = ("causal_conv1d_fn", "causal_conv1d_update", "mamba_selective_scan", "mamba_selective_state_update")
_MIXERS = {  # class: the functions that its forward calls and klfast replaces
    "MambaMixer": _MAMBA,
    "FalconMambaMixer": _MAMBA,
    "Mamba2Mixer": ("causal_conv1d_fn", "causal_conv1d_update", "mamba2_chunk_scan", "mamba2_selective_state_update"),
}
_NORMS = ("MambaRMSNorm", "MambaRMSNormGated", "Mamba2RMSNorm", "FalconMambaRMSNorm")
_lock = threading.Lock()


def accelerate(model: nn.Module, ssm: str = "klfast") -> nn.Module:
    """Let a transformers Mamba, Mamba-2 or FalconMamba model run klfast's kernels; returns the same model.

    Works in place on this model only, caches and generation included; ``unaccelerate`` undoes it. A model without
    state-space layers (a Llama) has nothing to accelerate and is returned unchanged, as is one already accelerated; one with
    others (a Jamba) stays as it is too, with a ``SlowPathWarning``.
    Which kernels run goes by the device of the tensors at each call: the CPU's, or on CUDA and XPU those in Triton, where
    the linear layers stay torch's. On devices without kernels the model takes its own path, with a ``SlowPathWarning``;
    so do gradients: run inference under ``torch.inference_mode()`` or ``torch.no_grad()``. On the CPU, with 16-bit weights,
    the output head of an accelerated model returns the logits in float32, which the model would make of them anyway.

    Args:
        ssm: whose convolution and scans: "klfast"; or "mamba_ssm", for a model on a CUDA device, to leave these to the
            mixers' own forward, which calls the packages mamba_ssm and causal_conv1d. The last call decides.

    Raises:
        InvalidInputError: ``model`` is no nn.Module, ``ssm`` is unknown, or "mamba_ssm" for a model elsewhere.
        KernelUnavailableError: the model is on the CPU and the extension klfast._C was not built, a package that ``ssm``
            asks for cannot be imported, or the mixers of the installed transformers do not call every function that
            klfast replaces. The model is left as it was.
    """
    if ssm not in ("klfast", "mamba_ssm"):
        raise InvalidInputError(f'accelerate: ssm must be "klfast" or "mamba_ssm", got {ssm!r}')
    with _lock:
        replacements, left = _replacements(model), []
        if ssm == "mamba_ssm":
            _require_mamba_ssm(model)
            left = [one for one in replacements if type(one[0]).__name__ in _MIXERS]
            replacements = [one for one in replacements if one not in left]
        if unknown := _unknown_mixers(model):
            runtime.slow_path("accelerate", type(model).__name__, f"klfast's functions are not for the state-space layers {', '.join(unknown)}.")
        if replacements and not registry.has_kernel("selective_scan", "CPU") and any(p.device.type == "cpu" for p in model.parameters()):
            raise KernelUnavailableError(f"accelerate: {runtime.why_not('scalar')} Install klfast with a C++ compiler present")
        for mixer in {type(module) for module, _ in replacements if type(module).__name__ in _MIXERS}:
            _check_calls(mixer)
        for module, _ in left:
            _restore(module)
        for module, forward in replacements:
            if "forward" not in vars(module):
                module.forward = MethodType(forward, module)
    return model


def accelerate_or_warn(model: nn.Module) -> nn.Module:
    """``accelerate``; where it cannot be done the model stays as it is, with a ``SlowPathWarning``."""
    try:
        return accelerate(model)
    except KernelUnavailableError as error:
        runtime.slow_path("accelerate", type(model).__name__, str(error))
        return model


def unaccelerate(model: nn.Module) -> nn.Module:
    """Undo ``accelerate``; a model that was not accelerated is returned unchanged.

    Raises:
        InvalidInputError: ``model`` is no nn.Module.
    """
    with _lock:
        for module, _ in _replacements(model):
            _restore(module)
    return model


def _restore(module: nn.Module) -> None:
    if is_accelerated(module):
        del module.forward


def _require_mamba_ssm(model: nn.Module) -> None:
    if elsewhere := {p.device.type for p in model.parameters()} - {"cuda"}:
        raise InvalidInputError(
            f'accelerate: ssm="mamba_ssm" needs a model on a CUDA device, this one is on {", ".join(sorted(elsewhere))}; '
            'move it with model.to("cuda") first, or leave ssm out'
        )
    for package in ("mamba_ssm", "causal_conv1d"):
        try:
            importlib.import_module(package)
        except Exception as error:  # a binary built for another torch raises all sorts of things
            reason = " ".join(str(error).split())
            raise KernelUnavailableError(
                f'accelerate: ssm="mamba_ssm" needs the package {package}, which cannot be imported ({reason}); '
                "install mamba-ssm and causal-conv1d for this PyTorch and CUDA, or leave ssm out"
            ) from error


def is_accelerated(module: nn.Module) -> bool:
    """Whether this mixer, norm or head runs klfast's functions."""
    return hasattr(vars(module).get("forward"), "klfast_original")


def _replacements(model: nn.Module) -> list[tuple[nn.Module, Callable]]:
    """The modules to change, each with its new forward; none without a mixer among them."""
    if not isinstance(model, nn.Module):
        raise InvalidInputError(f"accelerate takes a transformers model, got {type(model).__name__}")
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    found = []
    for module in model.modules():
        if type(module) is nn.Linear:
            found.append((module, _native(nn.Linear, _head_forward if module is head else _linear_forward, ())))
        if not type(module).__module__.startswith("transformers."):
            continue
        if type(module).__name__ in _MIXERS:
            needed = tuple(_OPS[name] for name in _MIXERS[type(module).__name__])
            found.append((module, _native(type(module), _mixer_forward, needed)))
        elif type(module).__name__ in _NORMS:
            found.append((module, _native(type(module), _norm_forward, ("rms_norm",))))
    has_mixer = any(type(module).__name__ in _MIXERS for module, _ in found)
    return found if has_mixer or type(model).__module__.startswith("klfast.models.") else []


def _unknown_mixers(model: nn.Module) -> list[str]:
    """Classes with a state matrix, as Jamba's or Bamba's mixers, that klfast has no functions for."""
    with_state = {type(module) for module in model.modules() if "A_log" in dict(module.named_parameters(recurse=False))}
    return sorted(c.__name__ for c in with_state if c.__name__ not in _MIXERS and not c.__module__.startswith("klfast."))


_natives: dict[tuple[type, Callable], Callable] = {}


def _native(module_class: type, make: Callable[[Callable], Callable], needed: tuple[str, ...]) -> Callable:
    """``make(original forward)``, or the original where klfast's functions do not apply; made once for both.

    On another device than the CPU these need its kernels of the ops ``needed``; with none named they are for the CPU alone.
    """
    if (module_class, make) not in _natives:
        original = module_class.forward
        native = make(original)

        def forward(self, x, *args, **kwargs):
            device, reason = x.device.type, ""
            if device != "cpu":
                if not needed:
                    return original(self, x, *args, **kwargs)
                if not all(registry.has_kernel(op, device.upper()) for op in needed):
                    reason = registry.why_no_kernel(device)
            if torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in self.parameters())):
                reason = "klfast's functions have no gradients; use torch.inference_mode()."
            if reason:
                runtime.slow_path(module_class.__name__, list(x.shape), reason, how="the model's own forward")
                return original(self, x, *args, **kwargs)
            return native(self, x, *args, **kwargs)

        forward.klfast_original = original
        _natives[module_class, make] = forward
    return _natives[module_class, make]


# The mixers -------------------------------------------------------------------------------------------------------


def _check_calls(mixer: type) -> None:
    """Raise KernelUnavailableError unless this class's forward itself calls every function that klfast replaces."""
    called = {i.argval for i in dis.get_instructions(inspect.unwrap(mixer.forward)) if i.opname == "LOAD_GLOBAL"}
    if missing := [name for name in _MIXERS[mixer.__name__] if name not in called]:
        from transformers import __version__

        raise KernelUnavailableError(
            f"accelerate: {mixer.__name__} of transformers {__version__} does not call {', '.join(missing)}, which klfast "
            "would replace; install a version of transformers that klfast supports (pip install klfast)"
        )


def _mixer_forward(original: Callable) -> Callable:
    copy = _with_globals(original, _FUNCTIONS)

    def forward(self, hidden_states, *args, **kwargs):
        if hidden_states.is_cpu and hidden_states.shape[1] == 1 and hasattr(self, "x_proj"):
            out = _one_token(self, hidden_states, *args, **kwargs)
            if out is not None:
                return out
        dt_proj = getattr(self, "dt_proj", None)
        if type(dt_proj) is nn.Linear and hidden_states.shape[1] > 1 and not hasattr(dt_proj, "_hf_hook"):
            self = _Mixer(self)
        return copy(self, hidden_states, *args, **kwargs)

    return forward


def _one_token(mixer, hidden_states, cache_params=None, attention_mask=None, **_):
    """What a Mamba or FalconMamba mixer makes of one more token of each sequence, [B, 1, H]; None where its own forward has to."""
    if cache_params is None or attention_mask is not None or mixer.activation not in ("silu", "swish") or not cache_params.has_previous_state(mixer.layer_idx):
        return None
    layer = cache_params.layers[mixer.layer_idx]
    states = layer.conv_states[0], layer.recurrent_states[0]
    own = mixer._parameters
    parts = mamba_step.Parts(mixer.conv1d, mixer.x_proj, mixer.dt_proj, (own, "A_log"), (own, "D"), mixer.rms_eps if hasattr(mixer, "b_layernorm") else None)
    step = None if getattr(layer, "record_past", False) else mamba_step.prepare(mixer, parts, hidden_states, *states)
    if step is None:
        return None
    x, z = mixer.in_proj(hidden_states)[:, 0].chunk(2, dim=-1)
    return mixer.out_proj(step(x, z, *states).unsqueeze(1))


def _with_globals(function: Callable, changed: dict[str, object]) -> Callable:
    """A copy of a function, and of those it wraps, that sees other globals."""
    closure, inner = function.__closure__, getattr(function, "__wrapped__", None)
    namespace = function.__globals__
    if inner is None:
        namespace = {**namespace, **changed}
        del namespace["__name__"]  # torch.compile would look the names up in that module instead
    else:
        copy = _with_globals(inner, changed)
        closure = tuple(CellType(copy) if cell.cell_contents is inner else cell for cell in closure)
    result = FunctionType(function.__code__, namespace, function.__name__, function.__defaults__, closure)
    result.__kwdefaults__ = function.__kwdefaults__
    return result


class _Mixer:
    """What the copied forward gets as ``self``: the mixer, but ``dt_proj.weight @ x`` is a linear layer.

    The forward writes dt as weight @ x [B, R, L], a batch of products with a broadcast left side, six times as slow
    (bf16, 2 x 512 tokens, 48 to 1536) as x^T weight^T, which is the same and leaves the channels side by side.
    """

    def __init__(self, mixer: nn.Module) -> None:
        self._mixer = mixer
        self.dt_proj = _Projection(mixer.dt_proj)

    def __getattr__(self, name: str) -> object:
        return getattr(self._mixer, name)


class _Projection:
    def __init__(self, linear: nn.Linear) -> None:
        self._linear = linear
        self.weight = _LeftOperand(linear.weight)

    def __getattr__(self, name: str) -> object:
        return getattr(self._linear, name)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self._linear(x)


class _LeftOperand:
    def __init__(self, weight: torch.Tensor) -> None:
        self._weight = weight

    def __getattr__(self, name: str) -> object:
        return getattr(self._weight, name)

    def __matmul__(self, x: torch.Tensor) -> torch.Tensor:
        x = x.transpose(-1, -2)
        linear = ops.linear if x.is_cpu and x.dtype == self._weight.dtype != torch.float32 else F.linear
        return linear(x, self._weight).transpose(-1, -2)


# transformers' functions under its names, with the arguments its mixers pass; further keywords mean nothing to klfast's
# kernels but for packed sequences, which the ops refuse.


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


# Norms and head ---------------------------------------------------------------------------------------------------


def _norm_forward(original: Callable) -> Callable:
    def forward(self, hidden_states, gate=None):
        if gate is None and not hasattr(self, "group_size") and (y := prepared.rms_norm(hidden_states, self.weight, self.variance_epsilon)) is not None:
            return y
        return ops.rms_norm(hidden_states, self.weight, gate, self.variance_epsilon, getattr(self, "group_size", None))

    return forward


def _linear_forward(original: Callable, dtype: torch.dtype | None = None) -> Callable:
    def forward(self, x):
        if dtype is None and (y := prepared.linear(self, x)) is not None:
            return y
        if x.dtype == torch.float32 or x.dtype != self.weight.dtype:
            return original(self, x)
        return ops.linear(x, self.weight, self.bias, dtype=dtype)

    return forward


def _head_forward(original: Callable) -> Callable:
    """The head with logits in float32: the model's forward calls ``.float()`` on them, a second copy of the largest tensor of all."""
    return _linear_forward(original, torch.float32)
