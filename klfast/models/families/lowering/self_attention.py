"""Lowerings of attention and of rotary positions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from klfast.core.errors import CannotLowerError
from klfast.engine.builder import Builder
from klfast.engine.columns import Columns
from klfast.models.families.lowering.projections import project_adapted
from klfast.nn.untouched import is_known


def rotary(
    build: Builder, module: Any, rounded_to: torch.dtype | None = None, layer_type: str | None = None
) -> Columns:
    """Lower transformers' usual rotary embedding; returns the columns of the tokens' angles.

    They are rounded to a dtype; None for that of activations. ``layer_type`` is for an embedding with frequencies of
    its own for each type of layer. The types whose frequencies follow the text's length have no lowering
    (dynamic_rope_update in modeling_rope_utils.py, 5.24.0).
    """
    build.expect(module, f"{build.kind}RotaryEmbedding", f"{build.kind}TextRotaryEmbedding")
    kind = getattr(module, "rope_type", "default") if layer_type is None else module.rope_type[layer_type]
    prefix = "" if layer_type is None else f"{layer_type}_"
    if not isinstance(kind, str) or "dynamic" in kind or kind == "longrope":
        raise CannotLowerError(f"{build.name(module)} is of type {kind}")
    [frequencies] = build.tensors((module._buffers, f"{prefix}inv_freq"))
    angles = build.buffer(f"{prefix}angles", 2 * len(frequencies), torch.float32)
    factor = float(getattr(module, f"{prefix}attention_scaling"))
    build.angles(build.name(module), build.copied(frequencies).float(), factor, angles, rounded_to)
    return angles


def require_usual_attention(build: Builder, module: Any) -> None:
    """Require of an attention of transformers that it is causal, and computed by a function of transformers."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    name, how = build.name(module), module.config._attn_implementation
    if not getattr(module.config, "is_causal", True) or not getattr(module, "is_causal", True):
        raise CannotLowerError(f"{name} is not causal")
    function = ALL_ATTENTION_FUNCTIONS.get(how)  # None: the eager one of the model's own file
    if function is not None and not is_known(function):
        raise CannotLowerError(f"{name} calls the attention function {how!r}, which is not transformers' own")
    build.checks.append(lambda: ALL_ATTENTION_FUNCTIONS.get(how) is function)


class AttentionNames(NamedTuple):
    """Names of an attention's layers."""

    q: str = "q_proj"
    k: str = "k_proj"
    v: str = "v_proj"
    out: str = "o_proj"
    q_norm: str | None = None
    k_norm: str | None = None


def attention(
    build: Builder,
    module: Any,
    x: Columns,
    out: Columns,
    angles: Columns | None = None,
    *,
    names: AttentionNames = AttentionNames(),  # noqa: B008 (a tuple)
    gated: bool = False,
    head_gates: nn.Linear | None = None,
    key_scale: float = 1.0,
    window: int | None = None,
    adapters: Sequence[nn.Module | None] = (None, None, None),
) -> None:
    """Lower grouped-query attention as transformers writes it.

    Args:
        build: the program's builder.
        module: has head_dim, scaling and the layers of ``names``.
        x, out: columns of the hidden size.
        angles: of the rotary embedding; None without.
        names: of its layers.
        gated: each head of q_proj has a gate behind its query; sigmoid(gate) multiplies the result.
        head_gates: makes one gate a head of x; sigmoid(gate) multiplies the head's result. None without.
        key_scale: multiplies keys.
        window: number of tokens that a token sees, itself included; None for all before it.
        adapters: of q_proj, k_proj and v_proj, as ``project_adapted`` takes them.
    """
    require_usual_attention(build, module)
    layer_q, layer_k, layer_v, layer_out = (getattr(module, name) for name in names[:4])
    adapter_q, adapter_k, adapter_v = adapters
    dim = module.head_dim
    heads, groups = layer_out.in_features // dim, layer_k.out_features // dim
    q, k, v = (build.buffer(f"attention.{name}", n * dim) for name, n in (("q", heads), ("k", groups), ("v", groups)))
    y = build.buffer("attention.y", heads * dim)
    gate = None
    if gated:
        both, gate = build.buffer("attention.gated", 2 * heads * dim), build.buffer("attention.gate", heads * dim)
        project_adapted(build, layer_q, adapter_q, x, both)
        build.pick_heads(heads, 0, both, q)
        build.pick_heads(heads, dim, both, gate)
    else:
        project_adapted(build, layer_q, adapter_q, x, q)
    project_adapted(build, layer_k, adapter_k, x, k)
    project_adapted(build, layer_v, adapter_v, x, v)
    for name, columns, count in ((names.q_norm, q, heads), (names.k_norm, k, groups)):
        if name is not None:
            build.normalise(getattr(module, name), columns, columns)
        if angles is not None:
            build.rotate(count, angles, columns)
    name = build.name(module)
    cache, scale = build.remember(name, groups, k, v), module.scaling * key_scale
    build.attend(name, heads, scale, q, cache, y, window=None if window is None else window - 1)
    if gate is not None:
        build.combine("sigmoid_gate", gate, y, y)
    if head_gates is not None:
        each, gate = build.buffer("attention.head_gates", heads), build.buffer("attention.gate", heads * dim)
        build.project(head_gates, x, each)
        build.spread_heads(heads, each, gate)
        build.combine("sigmoid_gate", gate, y, y)
    build.project(layer_out, y, out)
