"""Lowerings that several families share: chains of blocks, mixers, attention, feed-forward networks, heads."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from klfast.core.errors import CannotLowerError
from klfast.engine.builder import MOST_SEQUENCES, Builder
from klfast.engine.columns import Columns

Lower = Callable[[Builder, Any, Columns, Columns], None]  # (build, module, x, out)


class Sublayer(NamedTuple):
    """What a block adds to the residual stream x: lower(x), with norms.

    Attributes:
        lower: lowers it, given the block.
        before: name of the norm of its input in the block; None without.
        after: name of the norm of its result; None without.
    """

    lower: Lower
    before: str | None
    after: str | None = None


_GATES = {
    "silu": "silu_gate",
    "swish": "silu_gate",
    "siluactivation": "silu_gate",
    "geluactivation": "gelu_gate",
    "gelutanh": "gelu_tanh_gate",
    "newgeluactivation": "gelu_tanh_gate",
}


def activation_gate(activation: object) -> str:
    """Return the combination of ``Builder.combine`` that multiplies an activation, of transformers', by another row."""
    name = _name(activation)
    if name.lower() not in _GATES:
        raise CannotLowerError(f"an activation is {name}")
    return _GATES[name.lower()]


def require_silu(activation: object) -> None:
    """Require that an activation, by its name, function or module, is SiLU."""
    _require(activation, "silu", "swish", "siluactivation")


def require_squared_relu(activation: object) -> None:
    """Require that an activation is the square of ReLU."""
    _require(activation, "relu2", "relusquaredactivation")


def _require(activation: object, *names: str) -> None:
    if (name := _name(activation)).lower() not in names:
        raise CannotLowerError(f"an activation is {name}")


def _name(activation: object) -> str:
    name = activation if isinstance(activation, str) else getattr(activation, "__name__", type(activation).__name__)
    return str(name)


def project_twice(build: Builder, first: nn.Linear, last: nn.Linear, x: Columns, out: Columns) -> None:
    """Lower last(first(x))."""
    inner = build.buffer("projected_once", first.out_features)
    build.project(first, x, inner)
    build.project(last, inner, out)


def project_adapted(build: Builder, layer: nn.Linear, adapter: Any, x: Columns, out: Columns) -> None:
    """Lower layer(x) + adapter(x), with an nn.Sequential of two linear layers; None for layer(x) alone."""
    build.project(layer, x, out)
    if adapter is None:
        return
    build.expect(adapter, "Sequential")
    update = build.buffer("adapter.update", out.width)
    first, last = adapter
    project_twice(build, first, last, x, update)
    build.combine("add", out, update, out)


def decoder(
    build: Builder,
    model: Any,
    blocks: Mapping[str, Sequence[Sublayer]],
    *,
    embedding: str = "embed_tokens",
    last_norm: str = "norm",
    embedding_scale: float = 1.0,
    residual_scale: float = 1.0,
    residual: torch.dtype | None = None,
) -> Columns:
    """Lower a model of blocks that add to a residual stream; returns the columns of its logits.

    Args:
        build: the program's builder.
        model: has lm_head and a base model with an embedding, layers and a last norm.
        blocks: what a block of each class adds, one after another.
        embedding, last_norm: names in the base model.
        embedding_scale: multiplies embeddings.
        residual_scale: multiplies what is added.
        residual: dtype of the stream; None for that of activations.
    """
    base, hidden = model.base_model, model.config.hidden_size
    stream = build.buffer("residual", hidden, residual)
    # What layers read: the stream, or a copy of it in the dtype of activations.
    x = stream if residual in (None, build.dtype) else build.buffer("narrow", hidden)
    normed, update = build.buffer("normed", hidden), build.buffer("update", hidden)
    build.embed(getattr(base, embedding), stream, embedding_scale)
    source = stream  # as good as its copy, which is not there yet
    for block in base.layers:
        build.expect(block, *blocks)
        for lower, before, after in blocks[type(block).__name__]:
            if before is not None:
                build.normalise(getattr(block, before), source, normed)
            lower(build, block, source if before is None else normed, update)
            if after is not None:
                build.normalise(getattr(block, after), update, update)
            narrow = None if x is stream else x
            build.combine("add", stream, update, stream, factor=residual_scale, narrow=narrow)
            source = x
    build.normalise(getattr(base, last_norm), x, normed)
    return head(build, model.lm_head, normed)


def head(build: Builder, layer: nn.Linear, x: Columns) -> Columns:
    """Lower a head; returns the columns of its logits."""
    logits = build.buffer("logits", layer.out_features, torch.float32, rows=MOST_SEQUENCES)
    build.project_last(layer, x, logits)
    return logits


def recurrent(build: Builder, model: Any, block_class: str, mixer: Lower) -> Columns:
    """Lower a model of blocks x + mixer(norm(x)), as Mamba and Mamba-2 are."""
    blocks = {block_class: [Sublayer(lambda build, block, x, out: mixer(build, block.mixer, x, out), "norm")]}
    residual = torch.float32 if model.config.residual_in_fp32 else None
    return decoder(build, model, blocks, embedding="embeddings", last_norm="norm_f", residual=residual)


def mamba1(
    build: Builder,
    mixer: Any,
    x: Columns,
    out: Columns,
    *classes: str,
    norm: Callable[[Builder, nn.Module, Columns], None] | None = None,
) -> None:
    """Lower a Mamba mixer (transformers.models.mamba), or one of ``classes``, which follow it.

    ``norm`` lowers the norms of dt, B and C, in place; None without them.
    """
    build.expect(mixer, "MambaMixer", *classes)
    require_silu(mixer.activation)
    inner, rank, states = mixer.intermediate_size, mixer.time_step_rank, mixer.ssm_state_size
    xz, u, y = build.buffer("mamba.xz", 2 * inner), build.buffer("mamba.u", inner), build.buffer("mamba.y", inner)
    parts, dt = build.buffer("mamba.parts", rank + 2 * states), build.buffer("mamba.dt", inner)
    build.project(mixer.in_proj, x, xz)
    x_part, z = xz.split(inner, inner)
    build.convolve(mixer.conv1d, True, x_part, u)
    build.project(mixer.x_proj, u, parts)
    step, B, C = parts.split(rank, states, states)
    if norm is not None:
        for name, columns in (("dt_layernorm", step), ("b_layernorm", B), ("c_layernorm", C)):
            norm(build, getattr(mixer, name), columns)
    build.project(mixer.dt_proj, step, dt, weight_only=True)
    A_log, D = build.parameters(mixer, "A_log", "D")
    [dt_bias] = build.parameters(mixer.dt_proj, "bias")
    build.selective_scan(build.name(mixer), rate(A_log), D, dt_bias, u, dt, B, C, z, y)
    build.project(mixer.out_proj, y, out)


def mamba2(
    build: Builder, mixer: Any, x: Columns, out: Columns, *classes: str, factors: torch.Tensor | None = None
) -> None:
    """Lower a Mamba-2 mixer (transformers.models.mamba2), or one of ``classes``, which follow it.

    Without a norm (an nn.Identity) the scan applies the gate. ``factors`` multiply in_proj's results.
    """
    build.expect(mixer, "Mamba2Mixer", *classes)
    require_silu(mixer.activation)
    inner, heads, states = mixer.intermediate_size, mixer.num_heads, mixer.n_groups * mixer.ssm_state_size
    projected = build.buffer("mamba2.projected", 2 * inner + 2 * states + heads)
    mixed, y = build.buffer("mamba2.mixed", inner + 2 * states), build.buffer("mamba2.y", inner)
    build.project(mixer.in_proj, x, projected)
    if factors is not None:
        build.scale(factors, projected, projected)
    z, xBC, dt = projected.split(inner, inner + 2 * states, heads)
    build.convolve(mixer.conv1d, True, xBC, mixed)
    u, B, C = mixed.split(inner, states, states)
    A_log, D, dt_bias = build.parameters(mixer, "A_log", "D", "dt_bias")
    name, limit = build.name(mixer), mixer.time_step_limit
    gate = z if isinstance(mixer.norm, nn.Identity) else None
    build.head_scan(name, rate(A_log), D, dt_bias, mixer.head_dim, mixer.n_groups, limit, u, dt, B, C, y, gate)
    if gate is None:
        build.normalise(mixer.norm, y, y, z)
    build.project(mixer.out_proj, y, out)


class DeltaNames(NamedTuple):
    """Names of a gated delta net's layers: those of z, a and b, the norm of heads and the output."""

    z: str = "in_proj_z"
    a: str = "in_proj_a"
    b: str = "in_proj_b"
    norm: str = "norm"
    out: str = "out_proj"


def delta_net(
    build: Builder,
    mixer: Any,
    x: Columns,
    out: Columns,
    *,
    fused: str | None,
    names: DeltaNames = DeltaNames(),  # noqa: B008 (a tuple)
    largest_beta: float = 1.0,
) -> None:
    """Lower a gated delta net.

    Args:
        build: the program's builder.
        mixer: has key_dim, value_dim, num_k_heads, num_v_heads, conv1d and the layers of ``names``.
        x, out: columns of the hidden size.
        fused: name of the layer of queries, keys and values; None for q_proj, k_proj and v_proj.
        names: of its layers.
        largest_beta: beta is largest_beta sigmoid(b).
    """
    require_silu(mixer.activation)
    widths, heads = (mixer.key_dim, mixer.key_dim, mixer.value_dim), mixer.num_v_heads
    mixed = build.buffer("delta.mixed", sum(widths))
    if fused is not None:
        qkv = build.buffer("delta.qkv", sum(widths))
        build.project(getattr(mixer, fused), x, qkv)
        build.convolve(mixer.conv1d, True, qkv, mixed)
    else:
        delta_qkv(build, mixer, x, mixed, widths)
    z = build.buffer("delta.z", mixer.value_dim)
    a, b = build.buffer("delta.a", heads), build.buffer("delta.b", heads)
    for name, columns in ((names.z, z), (names.a, a), (names.b, b)):
        build.project(getattr(mixer, name), x, columns)
    delta_heads(build, mixer, mixed, z, a, b, out, names=names, largest_beta=largest_beta)


def delta_qkv(build: Builder, mixer: Any, x: Columns, mixed: Columns, widths: Sequence[int]) -> None:
    """Lower q_proj, k_proj, v_proj of these widths, and the convolution that fills the whole buffer ``mixed``."""
    for name, part in zip("qkv", mixed.split(*widths), strict=True):
        projected = build.buffer(f"delta.{name}", part.width)
        build.project(getattr(mixer, f"{name}_proj"), x, projected)
        build.convolve(mixer.conv1d, True, projected, part, first=part.first)


def delta_heads(
    build: Builder,
    mixer: Any,
    mixed: Columns,
    z: Columns,
    a: Columns,
    b: Columns,
    out: Columns,
    *,
    names: DeltaNames = DeltaNames(),  # noqa: B008 (a tuple)
    largest_beta: float = 1.0,
) -> None:
    """Lower what follows the convolution of a gated delta net: ``mixed`` has its queries, keys and values."""
    A_log, dt_bias = build.parameters(mixer, "A_log", "dt_bias")
    q, k, v = mixed.split(mixer.key_dim, mixer.key_dim, mixer.value_dim)
    y = build.buffer("delta.y", mixer.value_dim)
    build.delta_rule(build.name(mixer), A_log, dt_bias, largest_beta, mixer.num_k_heads, q, k, v, a, b, y)
    build.normalise(getattr(mixer, names.norm), y, y, z)
    build.project(getattr(mixer, names.out), y, out)


def rotary(build: Builder, module: Any, rounded_to: torch.dtype | None = None) -> Columns:
    """Lower transformers' usual rotary embedding; returns the columns of the tokens' angles.

    They are rounded to a dtype; None for that of activations. The types whose frequencies follow the text's length have
    no lowering (dynamic_rope_update in modeling_rope_utils.py, 5.24.0).
    """
    kind = getattr(module, "rope_type", "default")
    if not isinstance(kind, str) or "dynamic" in kind or kind == "longrope":
        raise CannotLowerError(f"{build.name(module)} is of type {kind}")
    build.tensors((module._buffers, "inv_freq"))
    angles = build.buffer("angles", 2 * len(module.inv_freq), torch.float32)
    name, factor = build.name(module), float(module.attention_scaling)
    build.angles(name, module.inv_freq.float(), factor, angles, rounded_to)
    return angles


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
        key_scale: multiplies keys.
        window: number of tokens that a token sees, itself included; None for all before it.
        adapters: of q_proj, k_proj and v_proj, as ``project_adapted`` takes them.
    """
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
    build.project(layer_out, y, out)


def mlp(build: Builder, module: Any, x: Columns, out: Columns, *classes: str, gate_scale: float | None = None) -> None:
    """Lower an MLP as transformers names its layers, of one of ``classes``: down(act(gate_scale gate(x)) up(x))."""
    build.expect(module, *classes)
    layers, how = (module.gate_proj, module.up_proj, module.down_proj), activation_gate(module.act_fn)
    gated_mlp(build, *layers, x, out, how=how, gate_scale=gate_scale)


def gated_mlp(
    build: Builder,
    gate: nn.Linear,
    up: nn.Linear,
    down: nn.Linear,
    x: Columns,
    out: Columns,
    *,
    how: str = "silu_gate",
    gate_scale: float | None = None,
) -> None:
    """Lower down(act(gate_scale gate(x)) up(x)); ``how`` is an ``activation_gate``."""
    one, other = (build.buffer(f"mlp.{name}", gate.out_features) for name in ("gate", "up"))
    build.project(gate, x, one)
    build.project(up, x, other)
    if gate_scale is not None:
        build.scale(gate_scale, one, one)
    build.combine(how, one, other, one)
    build.project(down, one, out)


def fused_mlp(
    build: Builder,
    gate_up: nn.Linear,
    down: nn.Linear,
    activation: object,
    x: Columns,
    out: Columns,
    adapter: nn.Module | None = None,
) -> None:
    """Lower such an MLP whose gate and up are one layer, the gate's rows first, which may have an adapter."""
    width = down.in_features
    both, inner = build.buffer("mlp.both", 2 * width), build.buffer("mlp.inner", width)
    project_adapted(build, gate_up, adapter, x, both)
    gate, up = both.split(width, width)
    build.combine(activation_gate(activation), gate, up, inner)
    build.project(down, inner, out)


def rate(A_log: torch.Tensor) -> torch.Tensor:
    """Return A, float32."""
    return -torch.exp(A_log.float())
