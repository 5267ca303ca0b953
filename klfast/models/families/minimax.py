"""MiniMax (transformers.models.minimax): lightning attention and attention in turn, with experts.

A mask is right for the prompt only: for the tokens after it transformers asks the cache of the first layer how long the
text is, and that is empty if the layer is lightning attention (modeling_minimax.py, MiniMaxCache, 5.23.0).
"""

from __future__ import annotations

from klfast.models.families.base import Blocks, Family, plain

FAMILY = Family(model_type="minimax", blocks=Blocks("layers"), logits=plain, reads_padding=True)
