"""RWKV-4 (transformers.models.rwkv): its state is the cache, and its forward ignores a mask.

After the prompt it mixes the rows of a batch: RwkvSelfAttention.extract_key_value adds the last token's states, [B, H],
to hidden states [B, 1, H], which makes [B, B, H] (modeling_rwkv.py, 5.23.0; RwkvFeedForward.forward likewise).
"""

from __future__ import annotations

from klfast.models.families.base import Blocks, Family, plain

FAMILY = Family(model_type="rwkv", blocks=Blocks("blocks"), logits=plain, reads_padding=True, mixes_rows=True)
