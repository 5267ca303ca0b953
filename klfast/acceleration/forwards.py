"""The forwards that ``klfast.accelerate`` gives to the mixers, norms and linear layers of a model.

Transformers' mixers look up their functions in their module's globals. Their new forward is a copy of the class's that
looks up klfast's functions instead, so it does everything else that the installed version's forward does. The families'
records (klfast.models.families) list the functions that a class calls, and the parameters of a norm. ``Bound`` attaches
a forward to a module, in a way that survives pickling.
"""

from __future__ import annotations

import dis
import functools
import inspect
from collections.abc import Callable
from types import CellType, CodeType, FunctionType
from typing import Any, Protocol, cast

import torch
from torch import nn

from klfast import ops
from klfast.acceleration.left_weight import StandIn
from klfast.acceleration.transformers_functions import REPLACEMENTS, SILU
from klfast.core.dtypes import FLOAT_DTYPES, FLOAT_NAMES, dtype_name
from klfast.core.errors import KernelUnavailableError
from klfast.dispatch import pins, registry
from klfast.models.families import mixer_of, norm_of
from klfast.models.families.base import Mixer
from klfast.nn import direct_call, mamba_step
from klfast.nn.dense_product import dense_product
from klfast.nn.untouched import has_its_own_forward

_Native = Callable[..., Any]
_Maker = Callable[[type[nn.Module], _Native], _Native]


class Forward(Protocol):
    """A forward of this file, not yet attached to a module, and the maker of its native function for a class."""

    make: _Maker

    def __call__(self, module: nn.Module, /, *args: Any, **kwargs: Any) -> Any:
        """Call it as the forward of a module."""


class Bound(functools.partial[Any]):
    """One of this file's forwards, attached to a module.

    It is not a method, since a method would be pickled by name and restored as the class's own forward. Its native
    function is made at once when it is created or restored, since torch.compile cannot trace the making.
    """

    def __new__(cls, forward: Forward, module: nn.Module) -> Bound:
        """Attach ``forward`` to ``module``."""
        bound = super().__new__(cls, forward, module)
        bound._make()
        return bound

    def __setstate__(self, state: Any) -> None:
        cast(Any, super()).__setstate__(state)  # missing in typeshed
        self._make()

    def __reduce__(self) -> tuple[Any, ...]:
        return _empty, (), super().__reduce__()[2]

    def _make(self) -> None:
        self.klfast_original = True  # mamba_step recognises it by this
        forward: Any = self.func
        _native(forward.make, type(self.args[0]), type(self.args[0]).forward)


def _empty() -> Bound:
    return functools.partial.__new__(Bound, _empty)


def is_own(forward: object) -> bool:
    """Return True for one of klfast's forwards, attached to any module."""
    return isinstance(forward, Bound)


# Dispatch of calls ------------------------------------------------------------------------------------------------

_natives: dict[tuple[_Maker, type[nn.Module], _Native], _Native] = {}


def _native(make: _Maker, module_class: type[nn.Module], original: _Native) -> _Native:
    """Return ``make(module_class, original)``, made once for a class and its current forward."""
    key = (make, module_class, original)
    if key not in _natives:
        _natives[key] = make(module_class, original)
    return _natives[key]


def forget_forwards() -> None:
    """Forget the forwards made so far: modules that have one keep it, others get theirs made as in a new process."""
    _natives.clear()


def _with_own_path(needed: Callable[[type[nn.Module]], tuple[str, ...]], argument: str) -> Callable[[_Maker], Forward]:
    """Turn ``make``, a maker of klfast's forward for a class, into a forward.

    The forward calls the class's own where klfast's does not apply.

    Args:
        needed: returns the ops whose kernels klfast's forward of a class needs on devices other than the CPU; if there
            are none it is only for the CPU.
        argument: the name of the forward's first argument, which callers may use.
    """

    def decorate(make: _Maker) -> Forward:
        def forward(self: nn.Module, x: Any = None, *args: Any, **kwargs: Any) -> Any:
            if x is None:
                x = kwargs.pop(argument)
            module_class = type(self)
            original = module_class.forward
            reason = ""
            if not x.is_cpu:
                device, ops_needed = x.device.type, needed(module_class)
                if not ops_needed:
                    return original(self, x, *args, **kwargs)
                if not all(registry.has_kernel(op, device.upper()) for op in ops_needed):
                    reason = registry.why_no_kernel(device)
            if x.dtype not in FLOAT_DTYPES:
                reason = f"klfast's kernels take {FLOAT_NAMES}, not {dtype_name(x.dtype)}."
            if torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in self.parameters())):
                reason = f"{pins.NO_GRADIENTS} Training has to; klfast.unaccelerate(model) silences this."
            if reason:
                pins.slow_path(module_class.__name__, list(x.shape), reason, how="the model's own forward")
                return original(self, x, *args, **kwargs)
            return _native(make, module_class, original)(self, x, *args, **kwargs)

        # Not functools.wraps: __wrapped__ would make it look like another library's wrapper.
        found: Any = forward
        found.make = make
        found.__name__, found.__qualname__, found.__doc__ = make.__name__, make.__qualname__, make.__doc__
        made: Forward = found
        return made

    return decorate


# The mixers -------------------------------------------------------------------------------------------------------


def _known(mixer: type[nn.Module]) -> Mixer:
    """Return the record of a class of mixers, which has one."""
    return cast(Mixer, mixer_of(mixer))


def missing_functions(mixer: type[nn.Module]) -> list[str]:
    """Return the functions to replace that the forward of this class does not call."""
    called = {i.argval for i in dis.get_instructions(inspect.unwrap(mixer.forward)) if i.opname == "LOAD_GLOBAL"}
    return [name for name in _known(mixer).functions if name not in called]


def cuda_packages(mixer: type[nn.Module]) -> set[str]:
    """Return the packages that have the functions of this class for CUDA."""
    return {REPLACEMENTS[name].package for name in _known(mixer).functions}


def require_functions(mixer: type[nn.Module]) -> None:
    """Raise KernelUnavailableError unless this class's forward itself calls every function that klfast replaces."""
    if missing := missing_functions(mixer):
        from transformers import __version__

        raise KernelUnavailableError(
            f"accelerate: {mixer.__name__} of transformers {__version__} does not call {', '.join(missing)}, which "
            "klfast would replace; install a version of transformers that klfast supports (pip install klfast)"
        )


@_with_own_path(lambda mixer: tuple(REPLACEMENTS[name].op for name in _known(mixer).functions), "hidden_states")
def mixer_forward(module_class: type[nn.Module], original: _Native) -> _Native:
    """Make the forward of a class of mixers."""
    mixer = _known(module_class)
    copy = _with_functions(original, {name: REPLACEMENTS[name].function for name in mixer.functions})

    def forward(self: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():  # which cannot trace the stand-ins below
            return copy(self, hidden_states, *args, **kwargs)
        if mixer.parts is not None and hidden_states.is_cpu and hidden_states.shape[1] == 1:
            out = one_token(mixer.parts, self, hidden_states, *args, **kwargs)
            if out is not None:
                return out
        if mixer.left_weight is not None and hidden_states.shape[1] > 1:
            linear = getattr(self, mixer.left_weight, None)
            if type(linear) is nn.Linear and not hasattr(linear, "_hf_hook"):
                self = StandIn(self, mixer.left_weight)
        return copy(self, hidden_states, *args, **kwargs)

    return forward


def one_token(
    parts_of: Callable[[Any], mamba_step.Parts | None],
    mixer: Any,
    hidden_states: torch.Tensor,
    cache: Any = None,
    attention_mask: torch.Tensor | None = None,
    *,
    cache_params: Any = None,
    **_: object,
) -> torch.Tensor | None:
    """Run a Mamba-1 mixer on one more token of each sequence, [B, 1, H]; return None if its own forward must.

    ``cache_params`` is the cache's name before transformers 5.24.
    """
    cache = cache_params if cache is None else cache
    if (
        cache is None
        or attention_mask is not None
        or mixer.activation not in SILU
        or not cache.has_previous_state(mixer.layer_idx)
    ):
        return None
    layer = cache.layers[mixer.layer_idx]
    states = layer.conv_states[0], layer.recurrent_states[0]
    parts = parts_of(mixer)
    if parts is None:
        return None
    step = None if getattr(layer, "record_past", False) else mamba_step.prepare(mixer, parts, hidden_states, *states)
    if step is None:
        return None
    x, z = mixer.in_proj(hidden_states)[:, 0].chunk(2, dim=-1)
    y: torch.Tensor = mixer.out_proj(step(x, z, *states).unsqueeze(1))
    return y


def _with_functions(function: Any, functions: dict[str, _Native]) -> _Native:
    """Return a copy of a function that calls ``functions`` instead of the globals of these names.

    The copy has the same globals, so it sees changes to them. klfast's functions are there under their own names.
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
    """Return the code with other names, including in the functions that it defines."""
    constants = tuple(_rename(c, names) if isinstance(c, CodeType) else c for c in code.co_consts)
    return code.replace(co_names=tuple(names.get(name, name) for name in code.co_names), co_consts=constants)


# Norms and linear layers ------------------------------------------------------------------------------------------


@_with_own_path(lambda norm: ("rms_norm",), "hidden_states")
def norm_forward(module_class: type[nn.Module], original: _Native) -> _Native:
    """Make the forward of a class of norms."""
    norm_of_module = norm_of(module_class)
    if norm_of_module is None or not has_its_own_forward(module_class):
        return original

    def forward(self: nn.Module, hidden_states: torch.Tensor, gate: torch.Tensor | None = None) -> torch.Tensor:
        norm = norm_of_module(self)
        y = None
        if gate is None and norm.group_size is None:
            y = direct_call.rms_norm(hidden_states, norm.weight, norm.eps, norm.weight_offset)
        if y is None:
            y = ops.rms_norm(hidden_states, norm.weight, gate, *norm[1:-1])
        return y.to(hidden_states.dtype) if norm.keeps_dtype else y

    return forward


def _linear(module_class: type[nn.Module], original: _Native, dtype: torch.dtype | None) -> _Native:
    if module_class is not nn.Linear or not has_its_own_forward(module_class):  # given another class since
        return original

    def forward(self: nn.Linear, x: torch.Tensor) -> Any:
        if dtype is None and (y := direct_call.linear(self, x)) is not None:
            return y
        return dense_product(x, self.weight, self.bias, dtype=dtype)

    return forward


@_with_own_path(lambda linear: (), "input")
def linear_forward(module_class: type[nn.Module], original: _Native) -> _Native:
    """Make nn.Linear's forward."""
    return _linear(module_class, original, None)


@_with_own_path(lambda linear: (), "input")
def head_forward(module_class: type[nn.Module], original: _Native) -> _Native:
    """Make the forward of a head with float32 logits, for a model that would copy them with ``.float()``."""
    return _linear(module_class, original, torch.float32)
