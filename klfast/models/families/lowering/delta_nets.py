"""Lowerings of gated delta nets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from klfast.engine.builder import Builder
from klfast.engine.columns import Columns
from klfast.models.families.lowering.activations import require_silu


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
