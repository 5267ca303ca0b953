"""Caches of transformers that stay where they are: what a graph of a GPU's work needs."""

from __future__ import annotations

import copy
from typing import Any

from klfast.core.errors import CannotLowerError


def fixed_cache(cache: object, capacity: int) -> Any:
    """Return a copy of a cache of transformers whose tensors keep their sizes and addresses.

    The states of recurrent layers do so anyway. Keys and values get room for all tokens at once. Layers with a window
    are not taken: transformers counts their tokens in Python, and a graph would repeat the count of one step.

    Args:
        cache: of tokens fed already.
        capacity: most tokens of a sequence, these included.

    Raises:
        CannotLowerError: it has layers of another kind; the message is a clause that says so.
    """
    from transformers.cache_utils import Cache

    if not isinstance(cache, Cache):
        raise CannotLowerError(f"a {type(cache).__name__} grows, or keeps numbers in Python")
    return Cache(layers=[_fixed(layer, capacity) for layer in cache.layers])


def _fixed(layer: Any, capacity: int) -> Any:
    from transformers import cache_utils as kinds

    still = {kinds.LinearAttentionLayer, getattr(kinds, "DummyLayer", None)}  # the latter from transformers 5.23 on
    static: dict[type, Any] = {
        kinds.DynamicLayer: kinds.StaticLayer,
        kinds.LinearAttentionAndFullAttentionLayer: kinds.LinearAttentionAndStaticFullAttentionLayer,
    }
    if type(layer) in still:
        return copy.deepcopy(layer)
    if type(layer) not in static:
        raise CannotLowerError(f"a {type(layer).__name__} grows, or keeps numbers in Python")
    if layer.keys is None:
        raise CannotLowerError(f"a {type(layer).__name__} has no keys")
    fixed = static[type(layer)](max_cache_len=capacity)
    states = {name: value for name, value in vars(layer).items() if name not in ("keys", "values", "is_initialized")}
    vars(fixed).update(copy.deepcopy(states))
    fixed.update(layer.keys, layer.values)
    return fixed
