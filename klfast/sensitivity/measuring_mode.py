"""Temporary preparation of a model for measuring."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import nn

from klfast.acceleration.patch import accelerate_or_warn, is_accelerated, unaccelerate
from klfast.core import heap
from klfast.core.interrupts import deferred
from klfast.models.calling import evaluation_mode
from klfast.nn.conv1d import as_linear, is_conv1d


@contextmanager
def prepared(model: nn.Module, dtype: torch.dtype | None) -> Iterator[None]:
    """Put the model in evaluation mode, without gradients and accelerated, computing in ``dtype`` (None: its own).

    Afterwards it is as it was. The process keeps its memory meanwhile.
    """
    with ExitStack() as stack:
        stack.enter_context(heap.kept())
        stack.enter_context(deferred())  # so that Ctrl-C leaves nothing half restored
        stack.enter_context(torch.no_grad())
        stack.enter_context(evaluation_mode(model))
        stack.enter_context(_without_conv1d(model))
        if dtype is not None:
            stack.enter_context(_lifted(model, dtype))
        stack.enter_context(_accelerated(model))
        yield


@contextmanager
def _without_conv1d(model: nn.Module) -> Iterator[None]:
    """Put an nn.Linear in the place of each Conv1D, so that a weight has a row for each output; afterwards undo it."""
    before = {name: module for name, module in model.named_modules() if is_conv1d(module)}
    try:
        for name, module in before.items():
            model.set_submodule(name, as_linear(module))
        yield
    finally:
        for name, module in before.items():
            model.set_submodule(name, module)


@contextmanager
def _lifted(model: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Hold floating-point tensors smaller than ``dtype`` in it; afterwards restore each one's storage."""
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
        if not before:  # an accelerated model may have been given other options
            accelerate_or_warn(model)
        yield
    finally:
        if not before:
            unaccelerate(model)
