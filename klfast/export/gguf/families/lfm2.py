"""LFM2."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from klfast.export.gguf.architecture import Architecture, Shape
from klfast.export.gguf.change import DEPTHWISE, Change
from klfast.export.gguf.families import common

if TYPE_CHECKING:
    import gguf


def _describe(writer: gguf.GGUFWriter, config: Any, shapes: Mapping[str, Shape]) -> None:
    common.sizes(writer, config, shapes)
    common.heads(writer, config, shapes)
    common.rope(writer, config)
    writer.add_shortconv_l_cache(config.conv_L_cache)


def _changes(config: Any) -> Mapping[str, Change]:
    return {"shortconv.conv.weight": DEPTHWISE}


LFM2 = Architecture("LFM2", _describe, _changes, misfit=common.rope_misfit)
