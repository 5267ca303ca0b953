"""A causal language model as an OpenVINO graph."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import openvino as ov
import torch
from openvino import opset13 as op
from torch import nn

from klfast import __version__
from klfast.core.errors import CannotLowerError, InvalidInputError
from klfast.export.openvino.builder import GraphBuilder
from klfast.generation.engine import lower
from klfast.models.families import family_of, norm_of, text_config
from klfast.models.families.base import plain


class Graph(NamedTuple):
    """A model as a graph.

    Attributes:
        model: OpenVINO's.
        kinds: {name of a quantized layer: type of its codes}.
    """

    model: ov.Model
    kinds: dict[str, str]


@torch.no_grad()
def graph_of(model: nn.Module) -> Graph:
    """Return the graph of a model.

    Its inputs have optimum-intel's names: ``input_ids``, int64 [B, T]; ``attention_mask``, int64 [B, S], which must be
    ones, since texts have no padding (else logits are NaN); ``beam_idx``, int32 [B], the sequence of the call before
    that each one goes on from. Its result is ``logits``, float32 [B, T, V].

    Raises:
        InvalidInputError: klfast does not know how the model computes, or a part of it has been changed.
    """
    family, kind = family_of(model), getattr(text_config(model), "model_type", type(model).__name__)
    if family.lower is None:
        raise InvalidInputError(f"klfast writes no OpenVINO model of {kind}; its engine does not know the family")
    try:
        build = GraphBuilder(model, norm_of)
        logits = family.lower(build, model)
        if build.prefix:
            state = lower(model, rows=1).state()
            build = GraphBuilder(model, norm_of, state.since(0, 0))
            logits = family.lower(build, model)
    except CannotLowerError as error:
        raise InvalidInputError(f"klfast cannot write this {kind} for OpenVINO: {error}") from None
    rule = (family.logits or plain)(text_config(model))
    found = build.finish(_ruled(build.memory.read(logits), rule.scale, rule.softcap))
    found.set_rt_info(__version__, ["klfast", "version"])
    return Graph(found, build.kinds)


def _ruled(logits: Any, scale: float, softcap: float | None) -> Any:
    """Return scale y, or softcap tanh(scale y / softcap), of the head's product y."""
    if softcap is not None:
        return op.multiply(op.tanh(op.multiply(logits, np.float32(scale / softcap))), np.float32(softcap))
    return logits if scale == 1 else op.multiply(logits, np.float32(scale))
