"""Direct calls into the CPU extension, for layers that run on a few rows in microseconds.

Dispatching an op, validating its arguments and passing a dozen pointers costs more than a small product. Here a layer's
tensors are validated once; each later call only verifies that they are still the same, and keeps their memory alive
until it returns. In any unusual situation the caller falls back to the op. Results are those of the ops.
"""

from __future__ import annotations

import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from torch import get_num_threads, is_grad_enabled, nn
from torch.autograd import forward_ad
from torch.compiler import is_compiling

from klfast.backends.cpu.extension import DTYPE_CODES, view
from klfast.core.dtypes import FLOAT_DTYPES
from klfast.core.errors import InvalidInputError
from klfast.core.torch_internals import (
    MISSING,
    StorageWeakRef,
    dispatch_modes,
    function_modes,
    is_autocasting,
    is_profiled,
    tracing_state,
    transform,
)
from klfast.dispatch import pins
from klfast.dispatch.registry import handed_over, kernel_formats
from klfast.nn.lazy_weight import ReadOnlyWeight
from klfast.quant.layouts import Layout

if TYPE_CHECKING:
    from klfast.nn.linear import QuantLinear
    from klfast.quant.spec import QuantSpec

try:
    from klfast import _C
except ImportError:  # not built
    _C = None  # type: ignore[assignment]

Place = tuple[Mapping[str, "torch.Tensor | None"], str]  # a module's parameters or buffers, and a name among them
_INTEGER_PARTS = ("weight_packed", "weight_scale", "weight_zero_point")
_READY = _C is not None and not MISSING
_Of = TypeVar("_Of")
_Made = TypeVar("_Made", bound="Prepared")


def unobserved(x: torch.Tensor) -> bool:
    """Return True if x is a plain CPU tensor and nothing intercepts operations on it.

    Interceptors are: a tensor subclass, a lazy negation, forward-mode tangents, autocast, a dispatch or function mode,
    a transform such as vmap, a tracer, a compiler, a profiler, and a pin to an implementation outside the extension.
    Without the extension every tensor counts as observed. Gradients are for the caller to ask about.
    """
    return (
        type(x) is torch.Tensor
        and x.is_cpu
        and not is_compiling()
        and _READY
        and not is_autocasting()
        and not dispatch_modes()
        and not function_modes()
        and transform() is None
        and tracing_state() is None
        and forward_ad._current_level < 0
        and not is_profiled()
        and not x.is_neg()
        and pins.pinned() not in ("reference", "triton")
    )


class Watch:
    """Detects whether any watched tensor was replaced, reshaped or moved to other memory.

    It refers to their memory weakly: a model that moves to a GPU must not leave its weights behind. It does not refer
    to the tensors at all, since torch.utils.swap_tensors refuses to swap tensors with weak references.

    Attributes:
        tensors: aliases of the tensors at the time of construction, None for an absent one. Addresses must be taken
            from these; they keep the memory alive, so the watch's creator clears them.
    """

    def __init__(self, *places: Place) -> None:
        self.tensors: tuple[torch.Tensor | None, ...] = ()
        self._seen: tuple[tuple[object, ...], ...] = ()  # csrc/python/watch.h names the fields
        for home, name in places:
            t = alias = home[name]
            facts: tuple[object, ...] = (None, None, None, None, None, None)
            if t is not None and _is_array(t):
                alias = t.data  # keeps its memory; detach() would let other threads in (register_kernel says why)
                storage = alias.untyped_storage()
                facts = (id(t), StorageWeakRef(storage), storage._cdata, alias.data_ptr(), alias.shape, alias.dtype)
            self.tensors += (alias,)
            self._seen += ((home, name, *facts),)

    def hold(self) -> list[torch.UntypedStorage] | None:
        """Return the tensors' memory, pinned while the list lives; None if a tensor has changed or takes gradients."""
        return _C.hold(self._seen, is_grad_enabled())


def has(*places: Place) -> bool:
    """Return True if each place exists; it does not where a parameter was pruned or parametrized."""
    return all(name in home for home, name in places)


def plain(*tensors: torch.Tensor | None) -> bool:
    """Return True if all are ordinary CPU tensors, contiguous, of a float type and in memory, or absent."""
    for t in tensors:  # noqa: SIM110 (a generator in all() would take as long as the checks)
        if t is not None and not (_is_array(t) and t.dtype in FLOAT_DTYPES):
            return False
    return True


def _is_array(t: torch.Tensor) -> bool:
    ordinary = type(t) in (torch.Tensor, nn.Parameter) and t.is_cpu and t.layout is torch.strided and t.is_contiguous()
    return ordinary and not t.is_neg() and (t.data_ptr() != 0 or not t.numel())


class Prepared(ABC):
    """The objects of the extension for a module's tensors, which the module owns as its ``_klfast_prepared``.

    Copies and pickles of the module do without it, and make their own.
    """

    _owner: weakref.ref[nn.Module]

    @abstractmethod
    def hold(self, of: Any, /) -> list | None:
        """Return the memory that a call needs; None if the object is stale or cannot be called."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _nothing, ()


def _nothing() -> None:
    """Stand in for a pickled ``Prepared``."""


def current(module: nn.Module, make: Callable[[_Of], _Made], of: _Of) -> tuple[_Made, list | None]:
    """Return the module's ``make(of)``, made again if its ``hold(of)`` is None, and the result of ``hold``.

    The result is None if ``of`` cannot be held or another thread changes it.
    """
    found: Any = module.__dict__.get("_klfast_prepared")
    # copy.copy shares the object with a module that may have other tensors.
    held = found.hold(of) if found is not None and found._owner() is module else None
    if held is None:
        found = make(of)
        found._owner = weakref.ref(module)
        module.__dict__["_klfast_prepared"] = found
        held = found.hold(of)
    return found, held


def forget(module: nn.Module) -> None:
    """Remove what direct calls keep in a module."""
    module.__dict__.pop("_klfast_prepared", None)


class PreparedLinear(Prepared):
    """An nn.Linear or a QuantLinear, prepared for the extension, which takes no other class of layers.

    Attributes:
        n, k: features out and in.
        projection: the extension's object; None if it cannot take this layer. It may run only while the layer is held.
        dtype: the required dtype of x; None for any float type.
    """

    projection: _C.Projection | None
    dtype: torch.dtype | None

    def __init__(self, layer: nn.Module) -> None:
        layer = cast("QuantLinear", layer)  # or an nn.Linear, which has only the features and the bias
        self.n, self.k = layer.out_features, layer.in_features
        self.projection, self.dtype, self._options = None, None, options(layer)
        if self._options == ():
            return
        names = ("weight", "bias") if self._options is None else (*_INTEGER_PARTS, "bias")
        homes: list[Mapping[str, torch.Tensor | None]] = [
            layer._buffers if name in layer._buffers else layer._parameters for name in names
        ]
        places = tuple(zip(homes, names, strict=True))
        if not has(*places):
            return
        self._watch = Watch(*places)
        *weight, bias = self._watch.tensors
        if plain(bias) and (bias is None or bias.shape == (self.n,)):
            if self._options is None:
                self._prepare_dense(weight[0], bias)
            elif self._options:
                spec, activation, layout = self._options
                self._prepare_quantized(spec, activation, layout, weight, bias)
        self._watch.tensors = ()

    def _prepare_dense(self, weight: torch.Tensor | None, bias: torch.Tensor | None) -> None:
        if weight is not None and plain(weight) and weight.shape == (self.n, self.k):
            self.dtype = weight.dtype
            self.projection = _C.Projection.dense(view(weight), view(bias), self.n, self.k)

    def _prepare_quantized(
        self,
        spec: QuantSpec,
        activation: str,
        layout: Layout,
        weight: Sequence[torch.Tensor | None],
        bias: torch.Tensor | None,
    ) -> None:
        packed, scale, zero_point = weight
        parts = [t for t in weight if t is not None]
        if layout is not Layout.PLAIN or spec.format.name not in _formats():
            return
        if not plain(scale) or not all(map(_is_array, parts)):
            return
        try:
            spec.format.check(parts, (self.n, self.k), spec)
        except InvalidInputError:
            return  # the op raises it
        assert packed is not None
        self.projection = _C.Projection.quantized(
            packed.data_ptr(),
            view(scale),
            0 if zero_point is None else zero_point.data_ptr(),
            view(bias),
            self.n,
            self.k,
            spec.bits,
            max(1, spec.group_length(self.k)),
            activation == "int8",
        )

    def hold(self, layer: nn.Module) -> list | None:
        """Return the memory that a call needs; None if the layer has changed, or cannot be called at all."""
        return self._watch.hold() if self.projection is not None and self._options == options(layer) else None

    def takes(self, dtype: torch.dtype) -> bool:
        """Return True if the extension multiplies x of a dtype by this layer."""
        return self.projection is not None and (dtype in DTYPE_CODES if self.dtype is None else dtype is self.dtype)

    def __call__(self, x: torch.Tensor) -> torch.Tensor | None:
        """Multiply x [..., K] while the layer is held: [..., N]; None if the op must do it, or is faster."""
        code = DTYPE_CODES.get(x.dtype)
        if code is None or (self.dtype is not None and x.dtype is not self.dtype):
            return None
        return self.projection(x, code, get_num_threads(), pins.cpu_tier_limit())  # type: ignore[misc]  # it is held


def _formats() -> frozenset[str]:
    """Return the formats that the extension multiplies."""
    return kernel_formats("dequant_matmul", "CPU")


def options(layer: Any) -> tuple[QuantSpec, str, Layout] | tuple[()] | None:
    """Return a QuantLinear's settings besides its tensors; None for an nn.Linear, () for any other class of layers."""
    if type(layer) is nn.Linear:
        return None
    is_own = isinstance(layer, ReadOnlyWeight)
    return (layer.spec, layer.activation, layer.layout) if is_own else ()


def linear(layer: nn.Module, x: torch.Tensor) -> torch.Tensor | None:
    """Call an nn.Linear or a QuantLinear: y [..., N]; None where the op must be called."""
    return None if x.requires_grad and is_grad_enabled() else product(layer, x)


def product(layer: nn.Module, x: torch.Tensor) -> torch.Tensor | None:
    """Call an nn.Linear or a QuantLinear as ``linear`` does, also if x takes a gradient: y is not connected to x."""
    if not unobserved(x) or (type(layer) is nn.Linear and handed_over("linear", "CPU", x)):
        return None
    found, held = current(layer, PreparedLinear, layer)
    return None if held is None else found(x)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, weight_offset: float = 0.0) -> torch.Tensor | None:
    """Compute ``ops.rms_norm`` without a gate; None where the op must be called."""
    shape = x.shape
    if not unobserved(x) or not plain(x, weight) or not shape or weight.shape != shape[-1:] or not weight.shape[0]:
        return None
    if (x.requires_grad or weight.requires_grad) and is_grad_enabled():
        return None
    weight_view, held = view(weight), weight.untyped_storage()
    if not held.data_ptr() <= weight_view[0] < held.data_ptr() + held.nbytes():  # another thread gave it other memory
        return None
    out = (
        torch.empty_like(x)
        if x.dtype is weight.dtype
        else x.new_empty(shape, dtype=torch.promote_types(x.dtype, weight.dtype))
    )
    channels = shape[-1]
    rows, strides = x.numel() // channels, (channels, channels, 1)
    x_view, out_view = ((t.data_ptr(), DTYPE_CODES[t.dtype], strides) for t in (x, out))
    _C.rms_norm(
        x_view,
        weight_view,
        None,
        out_view,
        rows,
        1,
        channels,
        channels,
        eps,
        False,
        False,
        weight_offset,
        torch.get_num_threads(),
        pins.cpu_tier_limit(),
    )
    return out
