"""An open GGUF file: its metadata, and its tensors as float32 numbers or as blocks."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from klfast.checkpoint.loading_errors import one_line_errors
from klfast.core.errors import CheckpointError, InvalidInputError

if TYPE_CHECKING:
    from gguf.gguf_reader import ReaderTensor

_FLOATS = {  # the narrower first: norms are in float32 beside them
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
}


class GgufFile:
    """A GGUF file, mapped into memory; a tensor's bytes are read when its numbers are asked for.

    Attributes:
        path: the file.
        metadata: its keys and values; of an array of text only the length.
        tensors: what the gguf package knows of each tensor, by name.

    Raises:
        InvalidInputError: the package gguf is not installed.
        CheckpointError: the file is damaged, one of several parts, or has tensors of a type that gguf cannot read.
    """

    def __init__(self, path: Path) -> None:
        try:
            import gguf
        except ImportError:
            raise InvalidInputError(
                f"reading {path} needs the package gguf, which is not installed: pip install 'klfast[gguf]'"
            ) from None
        from transformers.integrations.gguf.reader import read_gguf_metadata

        self.path = path
        with one_line_errors(str(path), "model"):
            # transformers' reader goes first: it stops where the file ends, gguf's goes through any length it reads.
            self.metadata: dict[str, Any] = read_gguf_metadata(str(path))[0]
            self.tensors: dict[str, ReaderTensor] = {one.name: one for one in gguf.GGUFReader(path).tensors}
            self._refuse_unreadable()

    def _refuse_unreadable(self) -> None:
        import gguf

        if (count := self.metadata.get("split.count", 1)) > 1:
            raise CheckpointError(f"{self.path} is one of {count} parts; merge them (llama-gguf-split --merge)")
        for name, tensor in {one.tensor_type: (name, one) for name, one in self.tensors.items()}.values():
            kind = tensor.tensor_type
            try:
                gguf.quants.dequantize(np.zeros((1, gguf.GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
            except NotImplementedError:
                raise CheckpointError(
                    f"{self.path} stores {name} as {kind.name}, which the package gguf cannot read; fetch the model in "
                    "another type"
                ) from None

    @property
    def architecture(self) -> str:
        """The model's family, in llama.cpp's words."""
        return str(self.metadata["general.architecture"])

    @property
    def dtype(self) -> torch.dtype:
        """The model's dtype: 16 bits if a tensor has them, float32 if all do, or if the file has quantized ones."""
        kinds = set(map(self.kind, self.tensors))
        wanted = (dtype for kind, dtype in _FLOATS.items() if kind in kinds)
        return torch.float32 if kinds - _FLOATS.keys() else next(wanted, torch.float32)

    def kind(self, name: str) -> str:
        """Return a tensor's type, such as "Q4_0"."""
        return self.tensors[name].tensor_type.name

    def is_quantized(self, name: str) -> bool:
        """Return True if a tensor is stored as blocks of quantized values."""
        return self.kind(name) not in _FLOATS

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape, in torch's order: the file has the shortest stride first."""
        return tuple(int(size) for size in reversed(self.tensors[name].shape))

    def values(self, name: str) -> torch.Tensor:
        """Return a tensor in float32."""
        from gguf.quants import dequantize

        tensor = self.tensors[name]
        return torch.from_numpy(np.require(dequantize(tensor.data, tensor.tensor_type), requirements="W"))
