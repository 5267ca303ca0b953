"""Drop-in modules with a quantized weight: QuantLinear, and QuantEmbedding for embeddings tied to a quantized head.

QuantConv1D is a QuantLinear in the place of GPT-2's Conv1D.
"""

from klfast.nn.conv1d import QuantConv1D
from klfast.nn.embedding import QuantEmbedding
from klfast.nn.linear import QuantLinear

__all__ = ["QuantConv1D", "QuantEmbedding", "QuantLinear"]
