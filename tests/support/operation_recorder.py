"""Graphs on the CPU, made as torch's are on a GPU: of the operations that a piece of work calls."""

from contextlib import nullcontext

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class OperationRecorder:
    """Stands for ``klfast.core.device_graphs.Recorder``.

    A replay repeats torch's operations on the same memory, with the same numbers from Python. Recording changes no
    tensor.
    """

    def aside(self):
        return nullcontext()

    def record(self, work):
        with _Recording() as recording:
            work()
        recording.undo()
        return recording.replay


class _Recording(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self._calls, self._before = [], []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if torch.Tag.data_dependent_output in func.tags:
            raise RuntimeError("operation not permitted when stream is capturing")
        kwargs = kwargs or {}
        for argument, value in zip(
            func._schema.arguments, args, strict=False
        ):  # those by name follow, and are not written
            if argument.is_write:
                self._before.append((value, value.clone()))
        found = func(*args, **kwargs)
        self._calls.append((func, args, kwargs, found))
        return found

    def undo(self):
        for tensor, before in reversed(self._before):
            tensor.copy_(before)

    def replay(self):
        for func, args, kwargs, found in self._calls:
            for old, new in zip(tree_leaves(found), tree_leaves(func(*args, **kwargs)), strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)
