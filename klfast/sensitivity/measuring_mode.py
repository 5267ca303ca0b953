"""A model made ready to be measured, and left as it was afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import nn

from klfast.acceleration.patch import accelerate_or_warn, is_accelerated, unaccelerate
from klfast.core.interrupts import deferred
from klfast.models.calling import evaluation_mode


@contextmanager
def prepared(model: nn.Module, dtype: torch.dtype | None) -> Iterator[None]:
    """In evaluation mode, without gradients, computing in ``dtype`` (None: as it is), with klfast's state-space kernels."""
    with ExitStack() as stack:
        stack.enter_context(deferred())  # Ctrl-C leaves nothing half restored
        stack.enter_context(torch.no_grad())
        stack.enter_context(evaluation_mode(model))
        if dtype is not None:
            stack.enter_context(_lifted(model, dtype))
        stack.enter_context(_accelerated(model))
        yield


@contextmanager
def _lifted(model: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Floating-point tensors smaller than ``dtype`` are held in it for a while; then each gets its own storage back."""
    before = []
    try:
        for tensor in {id(t): t for t in (*model.parameters(), *model.buffers())}.values():
            if tensor.is_floating_point() and tensor.element_size() < dtype.itemsize:
                before.append((tensor, tensor.data))
                tensor.data = tensor.data.to(dtype)
        yield
    finally:
        for tensor, data in before:
            tensor.data = data


@contextmanager
def _accelerated(model: nn.Module) -> Iterator[None]:
    before = any(is_accelerated(module) for module in model.modules())
    try:
        if not before:  # else it may be so with other options
            accelerate_or_warn(model)
        yield
    finally:
        if not before:
            unaccelerate(model)
