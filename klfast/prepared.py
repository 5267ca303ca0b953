"""Layers prepared for the CPU extension, so that a call for a few rows takes microseconds.

Going through torch's dispatcher, checking every argument and handing over a dozen addresses takes longer than a small
product. Here the tensors of a layer are checked once, and at each call only that they are still the same ones; where
anything is out of the ordinary the caller takes the op instead. Results are those of the ops.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from klfast import runtime
from klfast.backends.memory import DTYPE_CODES, view
from klfast.errors import InvalidInputError
from klfast.types import FLOAT_DTYPES, Layout, check_parts

try:
    from klfast import _C
except ImportError:  # not built
    _C = None

FEW_ROWS = 8  # for these the kernels read a weight as it lies, at the speed of memory
Place = tuple[dict[str, torch.Tensor | None], str]  # a module's dictionary of parameters or buffers, and a name in it
_GONE = object()
_expired = torch.UntypedStorage._expired


def unobserved(x: torch.Tensor) -> bool:
    """Whether x is a plain CPU tensor and nothing wants to see or to change what is done with it.

    Such would be a tensor subclass, gradients, a mode, a transform (vmap), a tracer, a compiler, a profiler, or a pin to
    an implementation other than the extension's; or the extension is not there.
    """
    return (
        type(x) is torch.Tensor
        and x.is_cpu
        and not torch.compiler.is_compiling()
        and not (x.requires_grad and torch.is_grad_enabled())
        and not torch._C._len_torch_dispatch_stack()
        and not torch._C._len_torch_function_stack()
        and torch._C._functorch.peek_interpreter_stack() is None
        and torch._C._get_tracing_state() is None
        and not torch.autograd._profiler_enabled()
        and runtime.pinned() not in ("reference", "triton")
        and _C is not None
    )


class Watch:
    """Whether the contiguous tensors under some names in modules' dictionaries are still those that they were, memory included."""

    def __init__(self, *places: Place) -> None:
        self._seen = []
        for home, name in places:
            t = home[name]
            # A weak reference: a model moved to a GPU must not leave its weights behind.
            storage = None if t is None else StorageWeakRef(t.untyped_storage())
            self._seen.append((home, name, *((None,) * 5 if t is None else (weakref.ref(t), storage, t.data_ptr(), storage.cdata, t.numel()))))

    def sees_no_change(self) -> bool:
        for home, name, seen, _, address, storage, count in self._seen:
            t = home.get(name, _GONE)
            if t is None or t is _GONE:
                if t is _GONE or seen is not None:
                    return False
            elif seen is None or seen() is not t or t.data_ptr() != address or _expired(storage):
                return False
            elif t.numel() != count or not t.is_contiguous():  # by .data another view of the same memory
                return False
        return True


def has(*places: Place) -> bool:
    """Whether there is a tensor, or None, at each. There is not where a parameter was pruned or parametrized."""
    return all(name in home for home, name in places)


def plain(*tensors: torch.Tensor | None) -> bool:
    """Whether all are ordinary CPU tensors, contiguous and of a float type, or absent."""
    return all(t is None or (type(t) in (torch.Tensor, nn.Parameter) and t.is_cpu and t.dtype in FLOAT_DTYPES and t.is_contiguous()) for t in tensors)


class PreparedLinear:
    """An nn.Linear or a QuantLinear.

    Attributes:
        n, k: features out and in.
        projection: what the extension calls; None if it cannot take this layer.
        dtype: of the x that it takes; None for any float type.
    """

    def __init__(self, layer: nn.Module) -> None:
        self.n, self.k = layer.out_features, layer.in_features
        self.projection, self.dtype, self._options = None, None, _options(layer)
        names = ("weight", "bias") if self._options is None else ("weight_packed", "weight_scale", "weight_zero_point", "bias")
        homes = [layer._buffers if name in layer._buffers else layer._parameters for name in names]
        places = tuple(zip(homes, names, strict=True))
        if not has(*places):
            return
        *weight, bias = (home[name] for home, name in places)
        if not plain(bias) or (bias is not None and bias.shape != (self.n,)):
            return
        if self._options is None:
            self._prepare_dense(*weight, bias)
        elif layer.layout is Layout.PLAIN:
            self._prepare_quantized(layer, *weight, bias)
        if self.projection is not None:
            self._watch = Watch(*places)

    def _prepare_dense(self, weight: torch.Tensor | None, bias: torch.Tensor | None) -> None:
        if weight is not None and plain(weight) and weight.shape == (self.n, self.k):
            self.dtype = weight.dtype
            self.projection = _C.Projection.dense(view(weight), view(bias), self.n, self.k)

    def _prepare_quantized(self, layer: nn.Module, packed: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor | None, bias: torch.Tensor | None) -> None:
        spec = layer.spec
        words = [t for t in (packed, zero_point) if t is not None]
        if not plain(scale) or not all(type(t) is torch.Tensor and t.is_cpu and t.is_contiguous() for t in words):
            return
        try:
            check_parts(packed, scale, zero_point, self.n, self.k, spec.bits, spec.n_groups(self.k))
        except InvalidInputError:
            return  # the op says it
        self.projection = _C.Projection.quantized(
            packed.data_ptr(), view(scale), 0 if zero_point is None else zero_point.data_ptr(), view(bias), self.n, self.k,
            spec.bits, max(1, spec.group_length(self.k)), layer.activation == "int8",
        )  # fmt: skip

    def is_current(self, layer: nn.Module) -> bool:
        return self.projection is not None and self._options == _options(layer) and self._watch.sees_no_change()

    def takes(self, dtype: torch.dtype) -> bool:
        return self.projection is not None and (dtype in DTYPE_CODES if self.dtype is None else dtype is self.dtype)

    def __call__(self, x: torch.Tensor) -> torch.Tensor | None:
        """x [..., K] to [..., N]; None if the extension cannot take this x, or another way is faster."""
        shape, dtype = x.shape, x.dtype
        if not shape or shape[-1] != self.k or not x.is_contiguous():
            return None
        rows = x.numel() // max(self.k, 1)
        if not rows or not self.takes(dtype) or (self.dtype is not None and (rows > FEW_ROWS or dtype is torch.float32)):
            return None
        y = x.new_empty((*shape[:-1], self.n))
        self.projection(x.data_ptr(), DTYPE_CODES[dtype], self.k, y.data_ptr(), rows, torch.get_num_threads(), runtime.cpu_tier_limit())
        return y


def _options(layer: nn.Module) -> tuple | None:
    """What beside its tensors makes up a QuantLinear; None for an nn.Linear."""
    return None if type(layer) is nn.Linear else (layer.spec, layer.activation, layer.layout)


_prepared: weakref.WeakKeyDictionary[nn.Module, object] = weakref.WeakKeyDictionary()


def prepared(module: nn.Module, make: Callable, of: object) -> object:
    """What ``make(of)`` made for a module, made anew where ``is_current(of)`` of it says no. It must not refer to the module."""
    found = _prepared.get(module)
    if found is None or not found.is_current(of):
        found = _prepared[module] = make(of)
    return found


def linear(layer: nn.Module, x: torch.Tensor) -> torch.Tensor | None:
    """y [..., N] of an nn.Linear or a QuantLinear; None where the op has to be called."""
    return prepared(layer, PreparedLinear, layer)(x) if unobserved(x) else None


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor | None:
    """``ops.rms_norm`` without a gate; None where the op has to be called."""
    shape = x.shape
    if not unobserved(x) or not plain(x, weight) or not shape or weight.shape != shape[-1:] or not weight.shape[0]:
        return None
    out = torch.empty_like(x) if x.dtype is weight.dtype else x.new_empty(shape, dtype=torch.promote_types(x.dtype, weight.dtype))
    channels = shape[-1]
    rows, strides = x.numel() // channels, (channels, channels, 1)
    x_view, out_view = ((t.data_ptr(), DTYPE_CODES[t.dtype], strides) for t in (x, out))
    _C.rms_norm(x_view, view(weight), None, out_view, rows, 1, channels, channels, eps, torch.get_num_threads(), runtime.cpu_tier_limit())
    return out
