"""Pickles whose tensors lie beside them in arrays, which many processes of a machine can map at once."""

from __future__ import annotations

import io
import pickle
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn


@dataclass(frozen=True)
class Shared:
    """A pickled object and the bytes of its tensors' storages: tensors that share memory share it afterwards."""

    pickled: bytes
    storages: list[np.ndarray[Any, np.dtype[np.uint8]]]


def pack(thing: object, pickler: type[Any] = pickle.Pickler) -> Shared:
    """Pickle an object; its tensors on the CPU are not copied but referred to.

    Args:
        thing: any object.
        pickler: pickle's class, or cloudpickle's, which takes functions by value.
    """
    storages: dict[int, tuple[int, np.ndarray[Any, np.dtype[np.uint8]]]] = {}  # by address: number, bytes
    held: list[torch.Tensor] = []  # so that no other tensor gets the id of one that is gone
    numbers: dict[int, int] = {}

    class Pickler(pickler):  # type: ignore[misc]
        def persistent_id(self, value: object) -> tuple[object, ...] | None:
            if not isinstance(value, torch.Tensor) or not _is_plain(value):
                return None
            storage = value.untyped_storage()
            if storage.data_ptr() not in storages:
                storages[storage.data_ptr()] = len(storages), torch.empty(0, dtype=torch.uint8).set_(storage).numpy()
            held.append(value)
            return (
                numbers.setdefault(id(value), len(numbers)),
                storages[storage.data_ptr()][0],
                *(value.dtype, value.storage_offset(), tuple(value.shape), value.stride()),
                value.requires_grad if isinstance(value, nn.Parameter) else None,
            )

    stream = io.BytesIO()
    Pickler(stream, protocol=pickle.HIGHEST_PROTOCOL).dump(thing)
    return Shared(stream.getvalue(), [array for _, array in storages.values()])


def _is_plain(tensor: torch.Tensor) -> bool:
    """Return True for a strided tensor on the CPU that is not of a subclass, which would know more of itself."""
    return (
        type(tensor) in (torch.Tensor, nn.Parameter) and tensor.device.type == "cpu" and tensor.layout == torch.strided
    )


def unpack(shared: Shared) -> Any:
    """Return the object; its tensors lie in the arrays, and nothing may write to them if they are read-only."""
    tensors: dict[int, torch.Tensor] = {}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        storages = [torch.from_numpy(array).untyped_storage() for array in shared.storages]

    class Unpickler(pickle.Unpickler):
        def persistent_load(self, reference: Any) -> torch.Tensor:
            number, storage, dtype, *place, gradient = reference
            if number not in tensors:
                tensor = torch.empty(0, dtype=dtype).set_(storages[storage], *place)
                tensors[number] = tensor if gradient is None else nn.Parameter(tensor, requires_grad=gradient)
            return tensors[number]

    return Unpickler(io.BytesIO(shared.pickled)).load()
