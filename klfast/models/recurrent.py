"""Detection of recurrent layers: those that carry a state from token to token."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator

from torch import nn

# Names that transformers' mixers call: the state in a cache, and functions that have plain-torch versions.
_STATE = {"get_conv_state", "update_conv_state", "get_recurrent_state", "update_recurrent_state"}
_FUNCTION = re.compile(
    r"causal_conv1d|selective_scan|selective_state_update|chunk_scan|delta_rule|delta_attention|_kda$"
)
# Classes with their own code for the recurrence.
_OWN_CODE = {"RwkvSelfAttention", "RecurrentGemmaRglru", "MiniMaxLightningAttention", "xLSTMLayer", "mLSTMLayer"}


def recurrent_classes(model: nn.Module) -> set[type[nn.Module]]:
    """Return the classes of the model's recurrent layers: state-space models, linear attention, short convolutions.

    What lies within such a layer, like Kimi-Linear's forget gate, is a part of it.
    """
    return set(_outermost(model))


def _outermost(module: nn.Module) -> Iterator[type[nn.Module]]:
    if "A_log" in module._parameters or _is_recurrent(type(module)):
        yield type(module)
    else:
        for child in module.children():
            yield from _outermost(child)


def _is_recurrent(module_class: type[nn.Module]) -> bool:
    if module_class.__name__ in _OWN_CODE:
        return True
    if not module_class.__module__.startswith("transformers."):
        return False
    names = getattr(getattr(inspect.unwrap(module_class.forward), "__code__", None), "co_names", ())
    return any(name in _STATE or _FUNCTION.search(name) for name in names)
