"""QuantEmbedding: an embedding tied to a quantized head."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from klfast.core.errors import InvalidInputError
from klfast.nn.lazy_weight import ReadOnlyWeight, TiedWeight
from klfast.nn.linear import QuantLinear
from klfast.quant import layouts
from klfast.quant.types import Layout


class QuantEmbedding(ReadOnlyWeight):
    """The input embedding of a model whose quantized head it is tied to: it reads its rows from the head's tensor.

    ids int64 [...] to [..., in_features of the head] in the model's dtype. It has no tensors of its own: the head holds
    them, is saved for both, and takes the embedding along when it moves to another device.
    """

    def __init__(self, head: QuantLinear) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = head.out_features, head.in_features
        self._head = (head,)  # in a tuple, so that nn.Module does not list the head twice

    @property
    def head(self) -> QuantLinear:
        return self._head[0]

    @property
    def weight(self) -> torch.Tensor:
        return self.head.weight if torch.compiler.is_compiling() else TiedWeight(self.head.quantized, self.head.dtype)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        # As packing.dequantize does it, but for these rows alone and in few calls: one token costs little else.
        head, k, bits = self.head, self.embedding_dim, self.head.spec.bits
        if head.weight_packed.is_meta and not ids.is_meta:
            raise InvalidInputError(
                "QuantEmbedding reads its rows from the quantized head, whose tensors are on the meta device: not loaded, or offloaded "
                "(accelerate's offload_buffers); keep the head's buffers in memory"
            )
        if head.layout is Layout.TILED:
            found = layouts.rows(head.quantized, ids.reshape(-1)).dequantize(torch.float32)
            return found.view(*ids.shape, k).to(head.dtype)
        words, scale, zero_point = head.weight_packed, head.weight_scale, head.weight_zero_point
        stored = F.embedding(ids, words).view(torch.uint8)  # q - q_min, as the zero point is stored, too
        if bits == 4:
            stored = torch.stack((stored & 15, stored >> 4), -1).flatten(-2)
        stored = stored[..., :k]
        if ragged := -k % (length := head.spec.group_length(k)):
            stored = F.pad(stored, (0, ragged))
        if zero_point is None:
            zero = float(1 << (bits - 1))
        else:
            per_word = 32 // bits
            zero = (F.embedding(ids // per_word, zero_point) >> (ids % per_word * bits).unsqueeze(-1)) & (
                (1 << bits) - 1
            )
            zero = zero.float().unsqueeze(-1)
        groups = stored.view(*ids.shape, scale.shape[1], length)
        rows = (groups - zero) * F.embedding(ids, scale).float().unsqueeze(-1)
        return rows.flatten(-2)[..., :k].to(head.dtype)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, spec={self.head.spec}"
