"""Lowerings of gated feed-forward networks."""

from __future__ import annotations

from typing import Any

from torch import nn

from klfast.engine.builder import Builder
from klfast.engine.columns import Columns
from klfast.models.families.lowering.activations import activation_gate
from klfast.models.families.lowering.projections import project_adapted


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
