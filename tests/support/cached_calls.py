"""Calls of a model piece by piece on its cache, in any version of transformers."""

import torch

from klfast.models.calling import cache_argument, returned_cache


@torch.inference_mode()
def in_chunks(model, ids, lengths):
    """Return the logits [B, T, V] of ids [B, T], fed in pieces of these lengths, and the cache after them."""
    cache, logits, name = None, [], cache_argument(getattr(model, "_orig_mod", model))
    for piece in ids.split(lengths, dim=1):
        output = model(piece, use_cache=True, **{name: cache})
        cache = returned_cache(output)
        logits.append(output.logits)
    return torch.cat(logits, 1), cache
