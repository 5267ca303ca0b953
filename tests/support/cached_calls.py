"""Calls of a model piece by piece on its cache, in any version of transformers."""

import torch
from transformers.modeling_outputs import CausalLMOutputWithPast

from klfast.models.calling import cache_argument, returned_cache

# generate's name for it: as in outputs, "cache" since transformers 5.24.
GENERATE_CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"


@torch.inference_mode()
def in_chunks(model, ids, lengths):
    """Return the logits [B, T, V] of ids [B, T], fed in pieces of these lengths, and the cache after them."""
    cache, logits, name = None, [], cache_argument(getattr(model, "_orig_mod", model))
    for piece in ids.split(lengths, dim=1):
        output = model(piece, use_cache=True, **{name: cache})
        cache = returned_cache(output)
        logits.append(output.logits)
    return torch.cat(logits, 1), cache
