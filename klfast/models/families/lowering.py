"""Lowerings that several families share: models of recurrent blocks, Mamba's and Mamba-2's mixers, heads."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn

from klfast.core.errors import CannotLowerError
from klfast.engine.builder import MOST_SEQUENCES, Builder, NormSpec
from klfast.engine.columns import Columns

Mixer = Callable[[Builder, Any, Columns, Columns], None]  # (build, module, x, out)


def require_silu(activation: object) -> None:
    """Require that an activation, by its name, function or module, is SiLU."""
    name = activation if isinstance(activation, str) else getattr(activation, "__name__", type(activation).__name__)
    if str(name).lower() not in ("silu", "swish", "siluactivation"):
        raise CannotLowerError(f"an activation is {name}")


def rms_norm(build: Builder, module: Any, *classes: str, x: Columns, out: Columns) -> None:
    """Lower transformers' usual RMS norm."""
    build.expect(module, *classes)
    build.normalise(module, NormSpec(module.variance_epsilon), x, out)


def head(build: Builder, layer: nn.Linear, x: Columns) -> Columns:
    """Lower a head; returns the columns of its logits."""
    logits = build.buffer("logits", layer.out_features, torch.float32, rows=MOST_SEQUENCES)
    build.project_last(layer, x, logits)
    return logits


def recurrent(build: Builder, model: Any, block_class: str, norm_class: str, mixer: Mixer) -> Columns:
    """Lower a model of blocks x + mixer(norm(x)), as Mamba and Mamba-2 are."""
    base, hidden = model.backbone, model.config.hidden_size
    residual = torch.float32 if model.config.residual_in_fp32 else build.dtype
    # The residual stream, and its copy in the dtype of activations, from which norms are taken.
    x, narrow = build.buffer("residual", hidden, residual), build.buffer("narrow", hidden)
    normed, update = build.buffer("normed", hidden), build.buffer("update", hidden)
    build.embed(base.embeddings, x)
    before = x
    for block in base.layers:
        build.expect(block, block_class)
        rms_norm(build, block.norm, norm_class, x=before, out=normed)
        mixer(build, block.mixer, normed, update)
        build.combine("add", x, update, x, narrow=narrow)
        before = narrow
    rms_norm(build, base.norm_f, norm_class, x=narrow, out=normed)
    return head(build, model.lm_head, normed)


def mamba1(build: Builder, mixer: Any, x: Columns, out: Columns) -> None:
    """Lower a Mamba mixer (transformers.models.mamba)."""
    build.expect(mixer, "MambaMixer")
    require_silu(mixer.activation)
    inner, rank, states = mixer.intermediate_size, mixer.time_step_rank, mixer.ssm_state_size
    xz, u, y = build.buffer("mamba.xz", 2 * inner), build.buffer("mamba.u", inner), build.buffer("mamba.y", inner)
    parts, dt = build.buffer("mamba.parts", rank + 2 * states), build.buffer("mamba.dt", inner)
    build.project(mixer.in_proj, x, xz)
    x_part, z = xz.split(inner, inner)
    build.convolve(mixer.conv1d, True, x_part, u)
    build.project(mixer.x_proj, u, parts)
    step, B, C = parts.split(rank, states, states)
    build.project(mixer.dt_proj, step, dt, weight_only=True)
    A_log, D = build.parameters(mixer, "A_log", "D")
    [dt_bias] = build.parameters(mixer.dt_proj, "bias")
    build.selective_scan(build.name(mixer), _rate(A_log), D, dt_bias, u, dt, B, C, z, y)
    build.project(mixer.out_proj, y, out)


def mamba2(build: Builder, mixer: Any, x: Columns, out: Columns, *classes: str) -> None:
    """Lower a Mamba-2 mixer (transformers.models.mamba2), or one of ``classes``, which follow it."""
    build.expect(mixer, "Mamba2Mixer", *classes)
    require_silu(mixer.activation)
    inner, heads, states = mixer.intermediate_size, mixer.num_heads, mixer.n_groups * mixer.ssm_state_size
    projected = build.buffer("mamba2.projected", 2 * inner + 2 * states + heads)
    mixed, y = build.buffer("mamba2.mixed", inner + 2 * states), build.buffer("mamba2.y", inner)
    build.project(mixer.in_proj, x, projected)
    z, xBC, dt = projected.split(inner, inner + 2 * states, heads)
    build.convolve(mixer.conv1d, True, xBC, mixed)
    u, B, C = mixed.split(inner, states, states)
    A_log, D, dt_bias = build.parameters(mixer, "A_log", "D", "dt_bias")
    name, limit = build.name(mixer), mixer.time_step_limit
    build.head_scan(name, _rate(A_log), D, dt_bias, mixer.head_dim, mixer.n_groups, limit, u, dt, B, C, y)
    norm = NormSpec(mixer.norm.variance_epsilon, getattr(mixer.norm, "group_size", None))
    build.normalise(mixer.norm, norm, y, y, gate=z)
    build.project(mixer.out_proj, y, out)


class DecoderNames(NamedTuple):
    """Names of a decoder's parts: two norms of a block, the last norm and the rotary embedding, None without."""

    first_norm: str = "input_layernorm"
    second_norm: str = "post_attention_layernorm"
    last_norm: str = "norm"
    rotary: str | None = "rotary_emb"


def delta_net(build: Builder, mixer: Any, qkv: Columns, z: Columns, a: Columns, b: Columns, out: Columns) -> None:
    """Lower what follows the projections of a gated delta net (transformers.models.qwen3_5, qwen3_next)."""
    require_silu(mixer.activation)
    key, value, heads = mixer.key_dim, mixer.value_dim, mixer.num_v_heads
    mixed, y = build.buffer("delta.mixed", 2 * key + value), build.buffer("delta.y", value)
    build.convolve(mixer.conv1d, True, qkv, mixed)
    A_log, dt_bias = build.parameters(mixer, "A_log", "dt_bias")
    q, k, v = mixed.split(key, key, value)
    build.delta_rule(build.name(mixer), A_log, dt_bias, mixer.num_k_heads, q, k, v, a, b, y)
    norm = NormSpec(mixer.norm.variance_epsilon, norm_before_gate=True, gate_activation=mixer.norm.activation)
    build.normalise(mixer.norm, norm, y, y, gate=z, heads=heads)
    build.project(mixer.out_proj, y, out)


def decoder(
    build: Builder,
    model: Any,
    block_class: str,
    norm: Callable[[Any], NormSpec],
    mixer: Callable[[Builder, Any, Columns | None, Columns, Columns], None],
    mlp: Callable[[Builder, Any, Columns, Columns], None],
    names: DecoderNames,
    *,
    embedding_scale: float = 1.0,
    residual_scale: float = 1.0,
) -> Columns:
    """Lower a model of blocks x + mixer(norm(x)), then x + mlp(norm(x)).

    Args:
        build: the program's builder.
        model: has a base model ``model`` with embed_tokens and layers, and lm_head.
        block_class: of the layers.
        norm: reads the parameters of a norm.
        mixer: lowers a block's: (build, block, angles of the rotary embedding, x, out).
        mlp: lowers a block's feed-forward network: (build, block, x, out).
        names: of the parts.
        embedding_scale: multiplies embeddings.
        residual_scale: multiplies what is added to x.
    """
    base, hidden = model.model, model.config.hidden_size
    x, normed, update = (build.buffer(name, hidden) for name in ("residual", "normed", "update"))
    build.embed(base.embed_tokens, x, embedding_scale)
    angles = None if names.rotary is None else rotary(build, getattr(base, names.rotary))
    for block in base.layers:
        build.expect(block, block_class)
        for name, lower in (
            (names.first_norm, functools.partial(mixer, build, block, angles)),
            (names.second_norm, functools.partial(mlp, build, block)),
        ):
            build.normalise(getattr(block, name), norm(getattr(block, name)), x, normed)
            lower(normed, update)
            build.combine("add", x, update, x, factor=residual_scale)
    last = getattr(base, names.last_norm)
    build.normalise(last, norm(last), x, normed)
    return head(build, model.lm_head, normed)


def rotary(build: Builder, module: Any) -> Columns:
    """Lower transformers' usual rotary embedding; returns the columns of the tokens' angles."""
    if getattr(module, "rope_type", "default") != "default":
        raise CannotLowerError(f"{build.name(module)} is of type {module.rope_type}")
    build.tensors((module._buffers, "inv_freq"))
    angles = build.buffer("angles", 2 * len(module.inv_freq), torch.float32)
    build.angles(build.name(module), module.inv_freq.float(), float(module.attention_scaling), angles)
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
    norm: Callable[[Any], NormSpec] | None = None,
    gated: bool = False,
) -> None:
    """Lower grouped-query attention as transformers writes it.

    Args:
        build: the program's builder.
        module: has head_dim, scaling and the layers of ``names``.
        x, out: columns of the hidden size.
        angles: of the rotary embedding; None without.
        names: of its layers.
        norm: reads the parameters of the norms of queries and keys, a head each.
        gated: each head of q_proj has a gate behind its query; sigmoid(gate) multiplies the result.
    """
    layer_q, layer_k, layer_v, layer_out = (getattr(module, name) for name in names[:4])
    dim = module.head_dim
    heads, groups = layer_out.in_features // dim, layer_k.out_features // dim
    q, k, v = (build.buffer(f"attention.{name}", n * dim) for name, n in (("q", heads), ("k", groups), ("v", groups)))
    y = build.buffer("attention.y", heads * dim)
    gate = None
    if gated:
        both, gate = build.buffer("attention.gated", 2 * heads * dim), build.buffer("attention.gate", heads * dim)
        build.project(layer_q, x, both)
        build.pick_heads(heads, 0, both, q)
        build.pick_heads(heads, dim, both, gate)
    else:
        build.project(layer_q, x, q)
    build.project(layer_k, x, k)
    build.project(layer_v, x, v)
    for name, columns, count in ((names.q_norm, q, heads), (names.k_norm, k, groups)):
        if name is not None and norm is not None:
            build.normalise(getattr(module, name), norm(getattr(module, name)), columns, columns, heads=count)
        if angles is not None:
            build.rotate(count, angles, columns)
    name = build.name(module)
    build.attend(name, heads, module.scaling, q, build.remember(name, groups, k, v), y)
    if gate is not None:
        build.combine("sigmoid_gate", gate, y, y)
    build.project(layer_out, y, out)


def gated_mlp(build: Builder, gate: nn.Linear, up: nn.Linear, down: nn.Linear, x: Columns, out: Columns) -> None:
    """Lower down(silu(gate(x)) * up(x))."""
    one, other = (build.buffer(f"mlp.{name}", gate.out_features) for name in ("gate", "up"))
    build.project(gate, x, one)
    build.project(up, x, other)
    build.combine("silu_gate", one, other, one)
    build.project(down, one, out)


def silu_mlp(build: Builder, mlp: Any, x: Columns, out: Columns) -> None:
    """Lower transformers' usual feed-forward network."""
    require_silu(mlp.act_fn)
    gated_mlp(build, mlp.gate_proj, mlp.up_proj, mlp.down_proj, x, out)


def _rate(A_log: torch.Tensor) -> torch.Tensor:
    """Return A."""
    return -torch.exp(A_log.float())
