"""Argument checks common to all ops: types, memory, and writability of tensors written in place."""

from __future__ import annotations

import functools
import inspect
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import ParamSpec, TypeVar

import torch

from klfast.core.dtypes import FLOAT_DTYPES, FLOAT_NAMES
from klfast.core.errors import InvalidInputError
from klfast.dispatch.arguments import union_members

_P = ParamSpec("_P")
_R = TypeVar("_R")
_NAMES = {torch.Tensor: "a tensor", int: "an int", type(None): "None"}


def public(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Make a public function raise InvalidInputError for arguments of the wrong type or without memory.

    Arguments are examined only after an error, so that the check costs nothing: torch and the function itself raise for
    a wrong argument, but without a helpful message.
    """

    @functools.wraps(function)
    def checked(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        try:
            return function(*args, **kwargs)
        except (AttributeError, RuntimeError, TypeError, ValueError) as error:
            complaint = _complaint(function, args, kwargs)
            if complaint:
                raise InvalidInputError(complaint) from error
            raise

    return checked


def _complaint(function: Callable[..., object], args: Sequence[object], kwargs: Mapping[str, object]) -> str:
    """Describe the first wrong argument in one sentence; empty if there is none."""
    hints = typing.get_type_hints(function)
    for name, value in {**dict(zip(inspect.signature(function).parameters, args, strict=False)), **kwargs}.items():
        if name not in hints:
            continue
        kinds = union_members(hints[name]) or (hints[name],)
        if any(typing.get_origin(kind) is not None for kind in kinds):
            continue
        allowed = (*kinds, int) if float in kinds else kinds
        if not isinstance(value, allowed):
            wanted = " or ".join(_NAMES.get(kind, f"a {kind.__name__}") for kind in kinds)
            given = "None" if value is None else type(value).__name__
            return f"{function.__name__}: {name} must be {wanted}, got {given}"
        if (
            isinstance(value, torch.Tensor)
            and value.layout is torch.strided
            and (value.is_cpu or value.is_cuda)
            and not value.data_ptr()
            and value.numel()
        ):
            return no_memory(function.__name__, name, value)
    return ""


def no_memory(op: str, name: str, t: torch.Tensor) -> str:
    """Return the message for a tensor that has elements but no memory: kernels would read from address 0."""
    return (
        f"{op}: {name} {list(t.shape)} has no memory: its storage was freed or never allocated; pass a tensor with data"
    )


def require_memory(op: str, **tensors: torch.Tensor | None) -> None:
    """Raise InvalidInputError for a tensor on the CPU that has elements but no memory."""
    for name, t in tensors.items():
        if t is not None and t.is_cpu and t.layout is torch.strided and not t.data_ptr() and t.numel():
            raise InvalidInputError(no_memory(op, name, t))


def check_writable(op: str, name: str, t: torch.Tensor) -> None:
    """Raise InvalidInputError for a tensor that must not be written in place, as torch's own operations do.

    Like these, count the write, so that autograd detects changes to tensors that it saved.
    """
    if t.requires_grad and torch.is_grad_enabled():
        raise InvalidInputError(
            f"{op}: {name} is written in place and must not require grad; "
            f"pass {name}.detach() or call under torch.no_grad()"
        )
    if not t.is_inference():
        torch.autograd.graph.increment_version(t)
    if t.is_contiguous():
        return
    reach = 0  # the last offset within the dimensions of smaller strides
    for stride, size in sorted(zip(t.stride(), t.shape, strict=True)):
        if size > 1 and stride <= reach:
            raise InvalidInputError(
                f"{op}: {name} is written in place, but several of its elements share memory; pass {name}.clone()"
            )
        reach += stride * (size - 1)


def same_device(op: str, *tensors: torch.Tensor | None) -> None:
    """Raise InvalidInputError unless all given tensors are on one device."""
    for t in tensors:
        if t is not None and not t.is_cpu:  # quicker than to compare devices
            break
    else:
        return
    device = None
    for t in tensors:
        if t is None or t.device == device:
            continue
        if device is not None:
            devices = {str(t.device) for t in tensors if t is not None}
            raise InvalidInputError(f"{op}: all tensors must be on one device, got {', '.join(sorted(devices))}")
        device = t.device


def check_sizes(op: str, sizes: dict[str, int], **tensors: tuple[torch.Tensor | None, str]) -> None:
    """Check each (tensor or None, dimension names): equal names must have equal sizes, collected in ``sizes``."""
    for name, (tensor, dims) in tensors.items():
        if tensor is None:
            continue
        if tensor.dtype not in FLOAT_DTYPES:
            if tensor.is_complex():
                raise InvalidInputError(f"{op}: {name} is complex; klfast supports only real state-space models")
            raise InvalidInputError(f"{op}: {name} must be {FLOAT_NAMES}, got {tensor.dtype}")
        shape, known = tensor.shape, len(sizes)
        fits = len(shape) == len(dims)
        for d, n in zip(dims, shape) if fits else ():  # noqa: B905 (of equal length; strict= is slower)
            fits &= sizes.setdefault(d, n) == n
        if not fits:
            before = dict(list(sizes.items())[:known])
            wanted = ", ".join(str(before.get(d, d)) for d in dims)
            raise InvalidInputError(f"{op}: {name} must be [{wanted}], got {list(shape)}")
    same_device(op, *(tensor for tensor, _ in tensors.values()))


def check_groups(op: str, what: str, count: int, groups: int) -> None:
    """Raise InvalidInputError unless the groups of B and C divide the heads or channels."""
    if groups < 1 or count % groups:
        raise InvalidInputError(f"{op}: the number of groups of B and C must divide the {count} {what}, got {groups}")


def check_integers(op: str, name: str, t: torch.Tensor, *shape: int) -> None:
    """Raise InvalidInputError unless a tensor is int32 or int64, of a shape."""
    if t.dtype not in (torch.int32, torch.int64) or t.shape != shape:
        raise InvalidInputError(
            f"{op}: {name} must be int32 or int64 {list(shape)}, got {str(t.dtype)[6:]} {list(t.shape)}"
        )


def check_slots(op: str, name: str, slots: torch.Tensor, batch: int, count: int, padding: int) -> None:
    """Raise InvalidInputError unless ``slots``, int [batch], gives each entry a state of its own, or ``padding``.

    Slots on a GPU are not read, which would make the host wait for it.

    Args:
        op, name: for the message.
        slots: which of ``count`` states belongs to each entry of the batch.
        batch, count: see ``slots``.
        padding: the slot of entries without a state.
    """
    check_integers(op, name, slots, batch)
    used = [slot for slot in values_at_hand(op, name, slots) if slot != padding]
    for slot in used:
        if not 0 <= slot < count:
            raise InvalidInputError(f"{op}: {name} must be in 0..{count - 1}, or {padding} for padding; got {slot}")
    if len(set(used)) < len(used):
        [twice, *_] = [slot for slot in used if used.count(slot) > 1]
        raise InvalidInputError(f"{op}: {name} must name each state at most once, got {twice} more than once")


def values_at_hand(op: str, name: str, t: torch.Tensor) -> list[int]:
    """Return the values of an integer tensor on the CPU; none of one on a GPU, or without values (a fake)."""
    if type(t) is not torch.Tensor or not t.is_cpu:
        return []
    require_memory(op, **{name: t})
    found: list[int] = t.tolist()
    return found
