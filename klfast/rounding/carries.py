"""Hidden states between two blocks, in memory while there is room, else on disk."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from safetensors.torch import load, save

from klfast.core import temporaries
from klfast.core.machine import available_memory
from klfast.models.block_chain import Carry

_SHARE = 4  # of the free memory that one set of hidden states may take


class Carries:
    """What enters a block, by micro-batch; each may be replaced by what leaves it.

    They go to a temporary folder, a file for each, if together they take more than a quarter of the memory that is free
    at first. ``tempfile`` says where; the environment variable TMPDIR changes it. The next ones remove what a killed
    process left there.

    Args:
        carries: the first ones.
        room: bytes that they may take in memory, by default a quarter of what is free.

    Raises:
        OSError: the disk is full; the message says how to name another folder.
    """

    def __init__(self, carries: Sequence[Carry], room: int | None = None) -> None:
        if room is None:
            free = available_memory()
            room = None if free is None else free // _SHARE
        size = sum(part.nbytes for carry in carries for part in (carry.hidden, *carry.extra))
        on_host = all(carry.hidden.device.type == "cpu" for carry in carries)
        self._folder: Path | None = None
        if room is not None and on_host and size > room:
            self._folder = temporaries.scratch_folder("klfast-rounding")
            weakref.finalize(self, temporaries.remove, self._folder)
        self._held: list[Carry | None] = [None] * len(carries)
        for index, carry in enumerate(carries):
            self[index] = carry

    def __len__(self) -> int:
        return len(self._held)

    def __iter__(self) -> Iterator[Carry]:
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: int) -> Carry:
        if (held := self._held[index]) is not None:
            return held
        parts = load(self._path(index).read_bytes())
        hidden, *extra = (parts[str(number)] for number in range(len(parts)))
        return Carry(hidden, tuple(extra))

    def __setitem__(self, index: int, carry: Carry) -> None:
        if self._folder is None:
            self._held[index] = carry
            return
        whole = torch.contiguous_format  # and apart: files of tensors hold none that share memory
        parts = [part.clone(memory_format=whole) for part in (carry.hidden, *carry.extra)]
        path = self._path(index)
        try:
            path.write_bytes(save({str(number): part for number, part in enumerate(parts)}))
        except OSError as error:
            raise OSError(error.errno, f"{error.strerror} (TMPDIR names another folder)", str(path)) from error

    def _path(self, index: int) -> Path:
        assert self._folder is not None  # as it is not held
        return self._folder / f"{index}.safetensors"
