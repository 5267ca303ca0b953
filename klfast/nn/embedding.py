"""QuantEmbedding: an embedding tied to a quantized head."""

from __future__ import annotations

import torch

from klfast.core.errors import InvalidInputError
from klfast.nn.lazy_weight import ReadOnlyWeight, TiedWeight
from klfast.nn.linear import QuantLinear

Scale = torch.Tensor | float  # a tensor without dimensions is rounded to the rows' dtype before it multiplies them


class QuantEmbedding(ReadOnlyWeight):
    """The input embedding of a model with a tied, quantized head, whose rows it reads and multiplies by ``scale``.

    Maps ids int64 [...] to [..., in_features of the head] in the model's dtype. It has no tensors of its own: they are
    the head's, and are saved and moved with it.
    """

    def __init__(self, head: QuantLinear, scale: Scale | None = None) -> None:
        super().__init__()
        self.scale = scale
        self.num_embeddings, self.embedding_dim = head.out_features, head.in_features
        self._head = (head,)  # in a tuple, so that nn.Module does not list the head twice

    @property
    def head(self) -> QuantLinear:
        """The tied head."""
        return self._head[0]

    @property
    def weight(self) -> torch.Tensor:
        """A stand-in for the dequantized weight."""
        return self.head.weight if torch.compiler.is_compiling() else TiedWeight(self.head.quantized, self.head.dtype)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Look up rows by id."""
        head = self.head
        if head.weight_shape.is_meta and not ids.is_meta:
            raise InvalidInputError(
                "QuantEmbedding reads its rows from the quantized head, whose tensors are on the meta device: not "
                "loaded, or offloaded (accelerate's offload_buffers); keep the head's buffers in memory"
            )
        return scaled(head.rows(ids).to(head.dtype), self.scale)

    def extra_repr(self) -> str:
        """Return the sizes, the spec and the scale, if any."""
        times = "" if self.scale is None else f", scale={float(self.scale):g}"
        return f"{self.num_embeddings}, {self.embedding_dim}, spec={self.head.spec}{times}"


def scaled(rows: torch.Tensor, scale: Scale | None) -> torch.Tensor:
    """Return an embedding's rows times its scale, if any."""
    if scale is None:
        return rows
    return rows * (scale.to(rows.device, rows.dtype) if isinstance(scale, torch.Tensor) else scale)
