"""Llama and its likes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from klfast.export.gguf.architecture import Architecture, Shape
from klfast.export.gguf.families import common

if TYPE_CHECKING:
    import gguf


def _describe(writer: gguf.GGUFWriter, config: Any, shapes: Mapping[str, Shape]) -> None:
    common.sizes(writer, config, shapes)
    common.heads(writer, config, shapes)
    common.rope(writer, config)


def _window_misfit(config: Any) -> str | None:
    """Say that attention is to a window: llama.cpp's architectures here attend to all of a text."""
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    longest = config.max_position_embeddings
    if window is None or window >= longest:
        return common.rope_misfit(config)
    return f"attends to a whole text, this model to {window} tokens of {longest}"


def _smollm3_misfit(config: Any) -> str | None:
    """Say that other layers than each fourth lack rotary embeddings (llama.cpp's src/models/smollm3.cpp)."""
    expected = [int((layer + 1) % 4 != 0) for layer in range(config.num_hidden_layers)]
    if list(config.no_rope_layers) != expected:
        return "has no rotary embeddings in each fourth layer, this model in others"
    return _window_misfit(config)


def _llama_misfit(config: Any) -> str | None:
    return None if config.rope_parameters["rope_type"] == "llama3" else common.rope_misfit(config)


def _slowed(config: Any) -> Mapping[str, torch.Tensor]:
    """Return by how much Llama 3 slows each rotary frequency, as transformers computes it."""
    rope = config.rope_parameters
    if rope["rope_type"] != "llama3":
        return {}
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    slowed, _ = ROPE_INIT_FUNCTIONS["llama3"](config, device=torch.device("cpu"))
    exponents = torch.arange(len(slowed), dtype=torch.float32) / len(slowed)
    return {"rope_freqs.weight": rope["rope_theta"] ** -exponents / slowed}


LLAMA = Architecture(
    "LLAMA",
    _describe,
    common.interleaved_heads,
    biases=common.ATTENTION_BIASES + common.DENSE_BIASES,
    misfit=_llama_misfit,
    extra=_slowed,
)
MISTRAL = replace(LLAMA, misfit=_window_misfit)
QWEN2 = Architecture("QWEN2", _describe, biases=common.ATTENTION_BIASES, misfit=_window_misfit)
QWEN3 = replace(QWEN2, kind="QWEN3")
SMOLLM3 = Architecture(
    "SMOLLM3", _describe, common.interleaved_heads, biases=common.ATTENTION_BIASES, misfit=_smollm3_misfit
)
