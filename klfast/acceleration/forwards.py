"""The forwards that ``klfast.accelerate`` gives to the mixers, norms and linear layers of a model.

The mixers of transformers' Mamba, Mamba-2 and FalconMamba look their functions up in their module's globals. Theirs is
a copy of the class's forward that looks up klfast's functions instead, so it follows whatever else the installed
version's forward does. ``Bound`` gives a forward to a module, in a way that survives pickling.
"""

from __future__ import annotations

import dis
import functools
import inspect
from collections.abc import Callable
from types import CellType, CodeType, FunctionType

import torch
import torch.nn.functional as F
from torch import nn

from klfast import ops
from klfast.core.errors import KernelUnavailableError
from klfast.dispatch import pins, registry
from klfast.nn import direct_call, mamba_step

_MAMBA = ("causal_conv1d_fn", "causal_conv1d_update", "mamba_selective_scan", "mamba_selective_state_update")
MIXERS = {  # class: the functions that its forward calls and klfast replaces
    "MambaMixer": _MAMBA,
    "FalconMambaMixer": _MAMBA,
    "Mamba2Mixer": ("causal_conv1d_fn", "causal_conv1d_update", "mamba2_chunk_scan", "mamba2_selective_state_update"),
}
NORMS = ("MambaRMSNorm", "MambaRMSNormGated", "Mamba2RMSNorm", "FalconMambaRMSNorm")
_OPS = {  # transformers' functions: the ops that take their place
    "causal_conv1d_fn": "causal_conv1d",
    "causal_conv1d_update": "causal_conv1d_update",
    "mamba_selective_scan": "selective_scan",
    "mamba_selective_state_update": "selective_state_update",
    "mamba2_chunk_scan": "mamba_chunk_scan",
    "mamba2_selective_state_update": "selective_state_update",
}


class Bound(functools.partial):
    """One of this file's forwards as that of a module.

    No method, since a method would be pickled by its name and come back as the class's own forward. However it comes to
    be, its native function is made at once: torch.compile could not look into the making.
    """

    def __new__(cls, forward: Callable, module: nn.Module) -> Bound:
        bound = super().__new__(cls, forward, module)
        bound._make()
        return bound

    def __setstate__(self, state: tuple) -> None:
        super().__setstate__(state)
        self._make()

    def __reduce__(self) -> tuple:
        return _empty, (), super().__reduce__()[2]

    def _make(self) -> None:
        self.klfast_original = True  # by this mamba_step knows it
        _native(self.func.make, type(self.args[0]), type(self.args[0]).forward)


def _empty() -> Bound:
    return functools.partial.__new__(Bound, _empty)


def is_own(forward: object) -> bool:
    """Whether this is one of klfast's, of whatever module."""
    return isinstance(forward, Bound)


# Which way a call takes -------------------------------------------------------------------------------------------

_natives: dict[tuple[Callable, type, Callable], Callable] = {}


def _native(make: Callable, module_class: type, original: Callable) -> Callable:
    """``make(module_class, original)``, made once for a class and the forward that it has at present."""
    key = (make, module_class, original)
    if key not in _natives:
        _natives[key] = make(module_class, original)
    return _natives[key]


def _with_own_path(needed: Callable[[type], tuple[str, ...]]) -> Callable:
    """Let ``make``, a maker of klfast's forward for a class, become a forward that takes the class's own where klfast's does not apply.

    On another device than the CPU klfast's needs the kernels of the ops ``needed``; where there are none it is for the CPU alone.
    """

    def decorate(make: Callable) -> Callable:
        def forward(self, x, *args, **kwargs):
            module_class = type(self)
            original = module_class.forward
            device, reason = x.device.type, ""
            if device != "cpu":
                ops_needed = needed(module_class)
                if not ops_needed:
                    return original(self, x, *args, **kwargs)
                if not all(registry.has_kernel(op, device.upper()) for op in ops_needed):
                    reason = registry.why_no_kernel(device)
            if torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in self.parameters())):
                reason = "klfast's functions have no gradients; use torch.inference_mode()."
            if reason:
                pins.slow_path(module_class.__name__, list(x.shape), reason, how="the model's own forward")
                return original(self, x, *args, **kwargs)
            return _native(make, module_class, original)(self, x, *args, **kwargs)

        # not functools.wraps: __wrapped__ would make it look like another library's wrapper
        forward.make = make
        forward.__name__, forward.__qualname__, forward.__doc__ = make.__name__, make.__qualname__, make.__doc__
        return forward

    return decorate


def has_its_own_forward(module_class: type) -> bool:
    """Whether the class's forward is the one that its author wrote, not one that another library has put there."""
    return inspect.unwrap(module_class.forward).__module__ == module_class.__module__


# The mixers -------------------------------------------------------------------------------------------------------


def missing_functions(mixer: type) -> list[str]:
    """Those of the functions to replace that the forward of this class does not call."""
    called = {i.argval for i in dis.get_instructions(inspect.unwrap(mixer.forward)) if i.opname == "LOAD_GLOBAL"}
    return [name for name in MIXERS[mixer.__name__] if name not in called]


def require_functions(mixer: type) -> None:
    """Raise KernelUnavailableError unless this class's forward itself calls every function that klfast replaces."""
    if missing := missing_functions(mixer):
        from transformers import __version__

        raise KernelUnavailableError(
            f"accelerate: {mixer.__name__} of transformers {__version__} does not call {', '.join(missing)}, which klfast "
            "would replace; install a version of transformers that klfast supports (pip install klfast)"
        )


@_with_own_path(lambda mixer: tuple(_OPS[name] for name in MIXERS[mixer.__name__]))
def mixer_forward(module_class: type, original: Callable) -> Callable:
    """A mixer's."""
    copy = _with_functions(original, _FUNCTIONS)

    def forward(self, hidden_states, *args, **kwargs):
        if torch.compiler.is_compiling():  # which cannot look through the stand-ins below
            return copy(self, hidden_states, *args, **kwargs)
        if hidden_states.is_cpu and hidden_states.shape[1] == 1 and "x_proj" in self._modules:
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
    if (
        cache_params is None
        or attention_mask is not None
        or mixer.activation not in _SILU
        or not cache_params.has_previous_state(mixer.layer_idx)
    ):
        return None
    layer = cache_params.layers[mixer.layer_idx]
    states = layer.conv_states[0], layer.recurrent_states[0]
    own, eps = mixer._parameters, None
    if "b_layernorm" in mixer._modules:  # hasattr would raise and catch an error at each token
        norms = (mixer.dt_layernorm, mixer.b_layernorm, mixer.c_layernorm)
        eps = norms[0].eps
        if any(
            type(norm).__name__ != "FalconMambaWeightlessRMSNorm" or norm.eps != eps or _is_watched(norm)
            for norm in norms
        ):
            return None
    parts = mamba_step.Parts(mixer.conv1d, mixer.x_proj, mixer.dt_proj, (own, "A_log"), (own, "D"), eps)
    step = None if getattr(layer, "record_past", False) else mamba_step.prepare(mixer, parts, hidden_states, *states)
    if step is None:
        return None
    x, z = mixer.in_proj(hidden_states)[:, 0].chunk(2, dim=-1)
    return mixer.out_proj(step(x, z, *states).unsqueeze(1))


def _is_watched(module: nn.Module) -> bool:
    return bool("forward" in module.__dict__ or module._forward_hooks or module._forward_pre_hooks)


def _with_functions(function: Callable, functions: dict[str, Callable]) -> Callable:
    """A copy of a function that calls ``functions`` in place of the globals of these names.

    The copy has the same globals, so it sees whatever becomes of them. klfast's functions lie there under names of their own.
    """
    closure, inner = function.__closure__, getattr(function, "__wrapped__", None)
    code = function.__code__
    if inner is None:
        renamed = {name: f"_klfast_{name}" for name in functions}
        function.__globals__.update((renamed[name], new) for name, new in functions.items())
        code = _rename(code, renamed)
    else:
        copy = _with_functions(inner, functions)
        closure = tuple(CellType(copy) if cell.cell_contents is inner else cell for cell in closure)
    result = FunctionType(code, function.__globals__, function.__name__, function.__defaults__, closure)
    result.__kwdefaults__ = function.__kwdefaults__
    return result


def _rename(code: CodeType, names: dict[str, str]) -> CodeType:
    """The code with other names, in the functions that it defines as well."""
    constants = tuple(_rename(c, names) if isinstance(c, CodeType) else c for c in code.co_consts)
    return code.replace(co_names=tuple(names.get(name, name) for name in code.co_names), co_consts=constants)


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

_SILU = ("silu", "swish")


def _conv1d(x, weight, bias=None, activation=None, seq_idx=None, **_):
    if activation is None or activation in _SILU:
        return ops.causal_conv1d_fn(x, weight, bias, seq_idx, activation=activation)
    return _activated(ops.causal_conv1d_fn(x, weight, bias, seq_idx), activation)


def _conv1d_update(x, conv_state, weight, bias=None, activation=None, **kwargs):
    if activation is None or activation in _SILU:
        return ops.causal_conv1d_update(x, conv_state, weight, bias, activation, **kwargs)
    return _activated(ops.causal_conv1d_update(x, conv_state, weight, bias, **kwargs), activation)


def _activated(x: torch.Tensor, activation: str) -> torch.Tensor:
    """With an activation that klfast's convolutions do not compute."""
    from transformers.activations import ACT2FN

    return ACT2FN[activation](x).to(x.dtype)


def _scan(u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False, return_last_state=False, **_):
    return ops.selective_scan_fn(u, delta, A, B, C, D, z, delta_bias, delta_softplus, return_last_state)


def _step(state, x, dt, A, B, C, D=None, z=None, dt_bias=None, dt_softplus=False, **_):
    return ops.selective_state_update(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus)


def _chunk_scan(
    x,
    dt,
    A,
    B,
    C,
    chunk_size,
    *,
    cu_seq_lens_q=None,
    cu_seq_lens_k=None,
    max_length_q=None,
    max_length_k=None,
    **kwargs,
):
    return ops.mamba_chunk_scan_combined(x, dt, A, B, C, chunk_size, **kwargs)


_FUNCTIONS = {
    "causal_conv1d_fn": _conv1d,
    "causal_conv1d_update": _conv1d_update,
    "mamba_selective_scan": _scan,
    "mamba_selective_state_update": _step,
    "mamba2_chunk_scan": _chunk_scan,
    "mamba2_selective_state_update": _step,
}


# Norms and linear layers ------------------------------------------------------------------------------------------


@_with_own_path(lambda norm: ("rms_norm",))
def norm_forward(module_class: type, original: Callable) -> Callable:
    """A norm's."""
    if not has_its_own_forward(module_class):
        return original

    def forward(self, hidden_states, gate=None):
        if (
            gate is None
            and "group_size" not in self.__dict__
            and (y := direct_call.rms_norm(hidden_states, self.weight, self.variance_epsilon)) is not None
        ):
            return y
        return ops.rms_norm(hidden_states, self.weight, gate, self.variance_epsilon, getattr(self, "group_size", None))

    return forward


def _linear(module_class: type, original: Callable, dtype: torch.dtype | None) -> Callable:
    if not has_its_own_forward(module_class):
        return original

    def forward(self, x):
        if dtype is None and (y := direct_call.linear(self, x)) is not None:
            return y
        if x.dtype == torch.float32 or x.dtype != self.weight.dtype:
            return original(self, x)
        return ops.linear(x, self.weight, self.bias, dtype=dtype)

    return forward


@_with_own_path(lambda linear: ())
def linear_forward(module_class: type, original: Callable) -> Callable:
    """An nn.Linear's."""
    return _linear(module_class, original, None)


@_with_own_path(lambda linear: ())
def head_forward(module_class: type, original: Callable) -> Callable:
    """The head's, with logits in float32: the model's forward calls ``.float()`` on them, a second copy of the largest tensor of all."""
    return _linear(module_class, original, torch.float32)
