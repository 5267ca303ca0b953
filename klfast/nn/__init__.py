"""Drop-in modules with a quantized weight: QuantLinear, and QuantEmbedding for embeddings tied to a quantized head."""

from klfast.nn.embedding import QuantEmbedding
from klfast.nn.linear import QuantLinear

__all__ = ["QuantEmbedding", "QuantLinear"]
