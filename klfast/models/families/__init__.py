"""Model families: one file each, with its variants; looked up by model type, their parts by class.

To add one, write its file (see base.py for the fields), list it in ``FAMILIES``, and add a tiny model of it to
tests/support/tiny_models.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

from torch import nn

from klfast.models.families import (
    bamba,
    falcon_h1,
    falcon_mamba,
    generic,
    granite_hybrid,
    hymba,
    jamba,
    kimi_linear,
    lfm2,
    lfm3,
    llama,
    mamba,
    mamba2,
    minimax,
    nemotron_h,
    olmo_hybrid,
    qwen3_5,
    qwen3_next,
    rwkv,
    zamba,
    zamba2,
)
from klfast.models.families.base import Family, Mixer, Rows
from klfast.nn.norm import Norm

FAMILIES: tuple[Family, ...] = (
    mamba.FAMILY,
    mamba2.FAMILY,
    falcon_mamba.FAMILY,
    hymba.FAMILY,
    granite_hybrid.FAMILY,
    falcon_h1.FAMILY,
    bamba.FAMILY,
    qwen3_5.FAMILY,
    qwen3_5.MOE,
    qwen3_next.FAMILY,
    olmo_hybrid.FAMILY,
    kimi_linear.FAMILY,
    lfm2.FAMILY,
    lfm2.MOE,
    lfm3.FAMILY,
    nemotron_h.FAMILY,
    jamba.FAMILY,
    zamba.FAMILY,
    zamba2.FAMILY,
    rwkv.FAMILY,
    minimax.FAMILY,
    *llama.FAMILIES,
)
GENERIC = generic.FAMILY
FUSED = tuple(dict.fromkeys(group for family in (*FAMILIES, GENERIC) for group in family.fused))
_BY_TYPE = {family.model_type: family for family in FAMILIES}
_MIXERS = {name: mixer for family in FAMILIES for name, mixer in family.mixers.items()}
_NORMS = {name: norm for family in FAMILIES for name, norm in family.norms.items()}
_ROWS = {name: rows for family in FAMILIES for name, rows in family.rows.items()}


def text_config(model: nn.Module) -> object | None:
    """Return the configuration of the model, or of its language model if it has several parts; None without one."""
    config: Any = getattr(model, "config", None)
    found: object | None = config
    if hasattr(config, "get_text_config"):
        with suppress(ValueError):  # it has several
            found = config.get_text_config(decoder=True)
    return found


def family_of(model: nn.Module) -> Family:
    """Return the record of a model; the generic one if klfast does not know its type."""
    return _BY_TYPE.get(getattr(text_config(model), "model_type", ""), GENERIC)


def mixer_of(module_class: type) -> Mixer | None:
    """Return the record of a class of transformers' recurrent layers in any model; None if it is unknown."""
    return _MIXERS.get(module_class.__name__) if _is_transformers(module_class) else None


def norm_of(module_class: type) -> Callable[[Any], Norm] | None:
    """Return the function that reads the parameters of a norm of this class; None if klfast does not replace it."""
    return _NORMS.get(module_class.__name__) if _is_transformers(module_class) else None


def rows_of(module: nn.Module) -> Mapping[str, Rows]:
    """Return {name of a linear layer in this module: the uses of its rows}; empty if none of them is fused."""
    kind = type(module)
    known = _is_transformers(kind) or kind.__module__.startswith("klfast.models.")
    return _ROWS[kind.__name__](module) if known and kind.__name__ in _ROWS else {}


def _is_transformers(module_class: type) -> bool:
    return module_class.__module__.startswith("transformers.")
