"""Lowering of short convolutions."""

from __future__ import annotations

from typing import Any

from klfast.engine.builder import Builder
from klfast.engine.columns import Columns


def short_convolution(build: Builder, mixer: Any, x: Columns, out: Columns, *classes: str) -> None:
    """Lower the short convolution of LFM2, of one of ``classes``.

    It runs over B x without an activation, and its result is multiplied by C (modeling_lfm2.py, Lfm2ShortConv.forward,
    5.23.0).
    """
    build.expect(mixer, *classes)
    channels = mixer.conv.in_channels
    projected, y = build.buffer("conv.projected", 3 * channels), build.buffer("conv.y", channels)
    build.project(mixer.in_proj, x, projected)
    B, C, inner = projected.split(channels, channels, channels)
    build.combine("multiply", B, inner, y)
    build.convolve(mixer.conv, False, y, inner)
    build.combine("multiply", C, inner, y)
    build.project(mixer.out_proj, y, out)
