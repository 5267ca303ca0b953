"""Drop-in modules with quantized weights: QuantLinear, QuantEmbedding for an embedding tied to a head, QuantExperts.

QuantConv1D is a QuantLinear in the place of GPT-2's Conv1D.
"""

from klfast.nn.conv1d import QuantConv1D
from klfast.nn.embedding import QuantEmbedding
from klfast.nn.experts import QuantExperts
from klfast.nn.linear import QuantLinear

__all__ = ["QuantConv1D", "QuantEmbedding", "QuantExperts", "QuantLinear"]
