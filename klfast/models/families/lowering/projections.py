"""Lowerings of linear layers that follow one another, or add to one another."""

from __future__ import annotations

from typing import Any

from torch import nn

from klfast.engine.builder import Builder
from klfast.engine.columns import Columns


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
