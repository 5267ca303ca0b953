"""The types of GGUF whose values are a code times a scale: klfast's symmetric formats hold them exactly.

The others add a minimum, a float (Q4_1, Q5_1, Q2_K, Q4_K, Q5_K), or index tables of vectors.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch

from klfast.checkpoint.gguf.file import GgufFile
from klfast.quant.spec import QuantSpec


class _Field(NamedTuple):
    """Bytes of a block that hold scales."""

    first: int
    size: int
    dtype: str

    def of(self, blocks: np.ndarray) -> np.ndarray:
        """Return the scales in uint8 blocks [..., bytes], as a view."""
        return blocks[..., self.first : self.first + self.size].view(self.dtype)


# The spec, and the fields whose product is the scale (ggml-common.h of llama.cpp, block_q4_0 to block_iq4_nl). IQ4_NL
# has a table of 16 levels, which are integers of 8 bits.
_LEADING_SCALE = (_Field(0, 2, "<f2"),)
_EXACT = {
    "Q4_0": (QuantSpec(4, 32), _LEADING_SCALE),
    "Q5_0": (QuantSpec(6, 32), _LEADING_SCALE),
    "Q8_0": (QuantSpec(8, 32), _LEADING_SCALE),
    "IQ4_NL": (QuantSpec(8, 32), _LEADING_SCALE),
    "Q6_K": (QuantSpec(6, 16), (_Field(192, 16, "<i1"), _Field(208, 2, "<f2"))),
}


def exact_spec(kind: str) -> QuantSpec | None:
    """Return the spec that holds a type's values exactly; None if there is none."""
    return _EXACT[kind][0] if kind in _EXACT else None


def codes_and_scale(file: GgufFile, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the codes, int8 [..., N, K], and the scales, [..., N, G], of a matrix or a stack of such a type.

    The scales are the file's own float16 numbers; where two fields make one (Q6_K), the product, exact in float32.
    """
    from gguf.constants import GGML_QUANT_SIZES
    from gguf.quants import dequantize

    tensor = file.tensors[name]
    _, fields = _EXACT[file.kind(name)]
    blocks = tensor.data.reshape(*tensor.data.shape[:-1], -1, GGML_QUANT_SIZES[tensor.tensor_type][1])
    only_codes = blocks.copy()  # with scales of 1, so that gguf, which knows the order of the bits, gives the codes
    for field in fields:
        field.of(only_codes)[...] = 1
    codes = dequantize(only_codes.reshape(tensor.data.shape), tensor.tensor_type)
    first, *others = (field.of(blocks) for field in fields)
    scale = math.prod((field.astype(np.float32) for field in others), start=first)
    return torch.from_numpy(codes.astype(np.int8)), torch.from_numpy(scale.reshape(*blocks.shape[:-2], -1).copy())
