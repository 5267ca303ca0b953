"""Graphs of a GPU's work: recorded once, then launched as a whole."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from klfast.core.errors import CannotLowerError

_CLASSES = {"cuda": "CUDAGraph", "xpu": "XPUGraph"}
_READ_BY_THE_HOST = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
_READING: set[Any] = set()  # klfast's own ops that do so: within one no mode sees torch's operations
_INDEXING = {torch.ops.aten.index, torch.ops.aten.index_put, torch.ops.aten.index_put_}


class Recorder:
    """Records work on a GPU as a graph of torch.

    Args:
        device: the GPU.
        graph_class: torch's for it.
    """

    def __init__(self, device: torch.device, graph_class: Callable[[], Any]) -> None:
        self._device, self._graph_class = device, graph_class
        self._torch: Any = torch.get_device_module(device)
        self._stream = self._torch.Stream(device)
        # So that other threads may go on using the GPU; torch.xpu has no such setting.
        self._options = {"capture_error_mode": "thread_local"} if device.type == "cuda" else {}

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Run work on the stream that records, after what the current one has to do and before what follows."""
        current = self._torch.current_stream(self._device)
        self._stream.wait_stream(current)
        with self._torch.stream(self._stream):
            yield
        current.wait_stream(self._stream)

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        """Record what ``work`` launches, without running it; return what runs it, on the same memory each time."""
        graph = self._graph_class()
        with self.aside(), self._torch.graph(graph, stream=self._stream, **self._options):
            work()
        replay: Callable[[], None] = graph.replay
        return replay


def recorder_of(device: torch.device) -> Recorder | None:
    """Return what records a device's work; None where torch has no graphs."""
    if device.type not in _CLASSES:
        return None
    graph_class = getattr(torch.get_device_module(device), _CLASSES[device.type], None)
    return None if graph_class is None else Recorder(device, graph_class)


def declare_host_reads(op: Any) -> None:
    """Say of an op that the host reads values in it."""
    _READING.add(op)


class NoHostReads(TorchDispatchMode):
    """Makes operations errors whose result the host reads, or whose size depends on data: no graph repeats them.

    A recording that meets one fails, too, but may leave torch's random numbers of the GPU unusable.
    """

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operation of torch, unless it is one of those."""
        kwargs = kwargs or {}
        if _is_read(func, args, kwargs):
            raise CannotLowerError(f"the host reads what {func} computes")
        with self:  # operations composed of others arrive whole in inference mode
            found = func.decompose(*args, **kwargs)
        return func(*args, **kwargs) if found is NotImplemented else found


def _is_read(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    if func in _READING or _crosses_devices(func, args, kwargs):
        return True
    if func.overloadpacket in _INDEXING:  # by a mask, whose ones are counted; not by numbers
        return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])
    return not _READ_BY_THE_HOST.isdisjoint(func.tags)


def _crosses_devices(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Return True for a copy between the host and the GPU, as ``cpu()`` and ``tolist()`` are."""
    if func.overloadpacket is torch.ops.aten._to_copy:
        target = kwargs.get("device")
        return target is not None and torch.device(target).type != args[0].device.type
    return func.overloadpacket is torch.ops.aten.copy_ and args[0].device.type != args[1].device.type
