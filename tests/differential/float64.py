"""The formulas of klfast's references in float64: what a call should return, without the rounding to its dtypes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from calls import Call
from torch.overrides import TorchFunctionMode

from klfast import reference, using
from klfast.core.dtypes import FLOAT_DTYPES
from klfast.dispatch import registry


class _Formulas(TorchFunctionMode):
    """Let ops of klfast run their references in float64."""

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if getattr(function, "namespace", "") != registry.NAMESPACE:
            return function(*args, **(kwargs or {}))
        name = function.__name__.partition(".")[0]
        given, (_, formula) = registry._checks[name](args), registry.implementation(name, "CPU")
        with _InFloat64():
            return formula(*given)


class _InFloat64(TorchFunctionMode):
    """Let code that asks for a float dtype get float64."""

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if function is torch.Tensor.float:
            return args[0].double()
        if function in _MAKERS:
            if function is torch.empty or (function is torch.zeros_like and args[0].is_floating_point()):
                kwargs = dict(dtype=torch.float64) | kwargs
            args, kwargs = tuple(map(_wide, args)), {name: _wide(a) for name, a in kwargs.items()}
        return function(*args, **kwargs)


_T = torch.Tensor
_MAKERS = {_T.to, _T.new_zeros, _T.new_empty, torch.empty, torch.full, torch.zeros_like}


def _wide(a: Any) -> Any:
    return torch.float64 if isinstance(a, torch.dtype) and a in FLOAT_DTYPES else a


def truth(call: Call) -> list[torch.Tensor]:
    """Return the results of a call in float64, and what it writes, rounded to the dtypes of what it is written to."""
    with using("reference"), _Formulas():
        return results(call)


def rounded_before(call: Call) -> Call:
    """Return the call with x rounded if the op rounds it to int8: that is defined in float32."""
    if call.arguments.get("activation") != "int8":
        return call
    x, qt = call.arguments["x"], call.arguments["qt"]
    rounded = reference.fake_quantize_rows(x.float(), qt.spec)
    return call._replace(arguments=call.arguments | dict(x=rounded, activation="exact"))


def results(call: Call) -> list[torch.Tensor]:
    """Make a call and return its results and, in the end, the tensors that it wrote."""
    found = call.function(**call.arguments)
    if hasattr(found, "__dataclass_fields__"):
        found = tuple(vars(found).values())
    every = found if isinstance(found, tuple) else (found,)
    return [t for t in every if t is not None] + [call.arguments[name] for name in call.written]
