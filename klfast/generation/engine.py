"""``engine_of``: the native engine of a model, where it has one."""

from __future__ import annotations

import weakref

import torch
from torch import nn

from klfast.core.arguments import integer
from klfast.core.errors import CannotLowerError, InvalidInputError
from klfast.core.torch_internals import has_global_hooks
from klfast.dispatch import pins
from klfast.engine.builder import Builder
from klfast.engine.engine import Engine
from klfast.models.adapters import unwrapped
from klfast.models.families import family_of, norm_of, text_config
from klfast.models.families.base import plain

ROWS = 512  # tokens of a prompt that go through the model together
_MOST_ROWS = 1 << 20

_engines: weakref.WeakKeyDictionary[nn.Module, Engine] = weakref.WeakKeyDictionary()


def engine_of(model: nn.Module) -> Engine:
    """Return the engine of a causal language model, made at the first call and again once the model has changed.

    Raises:
        CannotLowerError: no engine runs it; the message is a clause that says why.
    """
    if pins.pinned() in ("reference", "triton"):
        raise CannotLowerError(f"klfast.using pins the {pins.pinned()} implementations")
    model = unwrapped(model)
    engine = _engines.get(model)
    if engine is None or has_global_hooks() or not engine.is_current():
        _engines.pop(model, None)
        engine = _engines[model] = lower(model)
    return engine


@torch.no_grad()  # parameters that want gradients are taken where nobody records any
def lower(model: nn.Module, rows: int = ROWS) -> Engine:
    """Lower a causal language model to a native engine, which ``generate`` also takes where there is one.

    ``engine(ids, state)`` feeds tokens, int64 [B, T], and returns the logits after the last ones, float32 [B, V];
    ``state = engine.state(B)`` is what it carries, which can be copied (``state.copy()``: a way back) and saved
    (``klfast.save_state``). The engine reads the model's weights where they lie and keeps them alive. It is for the
    weights as they are now: after a layer was replaced or moved, a setting was changed, or a small tensor of which the
    engine has a copy (such as ``A_log``, or a convolution's weight) was written to, ``engine.is_current()`` is False.

    Args:
        model: on the CPU, float32, bfloat16 or float16, with quantized layers or not.
        rows: tokens of a prompt that go through the model together, 1 to 2^20, and most sequences if fewer than 16;
            memory of intermediate results grows with it.

    Raises:
        CannotLowerError: no engine runs it; the message is a clause that says why.
        InvalidInputError: the number of rows is none.
        MemoryError: there is no memory for so many rows.
    """
    if (rows := integer("rows", rows, 1)) > _MOST_ROWS:
        raise InvalidInputError(f"rows must be at most {_MOST_ROWS}, got {rows}")
    model = unwrapped(model)
    family = family_of(model)
    if family.lower is None:
        kind = getattr(text_config(model), "model_type", type(model).__name__)
        raise CannotLowerError(f"the engine does not know models of type {kind}")
    if has_global_hooks():
        raise CannotLowerError("torch has hooks for all modules")
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    build = Builder(model, dtype, rows, norm_of)
    rule = (family.logits or plain)(text_config(model))
    return Engine(build, family.lower(build, model), rule.scale, rule.softcap)
