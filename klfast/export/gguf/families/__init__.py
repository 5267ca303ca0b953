"""The families that llama.cpp has, by transformers' model types."""

from collections.abc import Callable
from typing import Any

from klfast.export.gguf.architecture import Architecture
from klfast.export.gguf.families.attention import LLAMA, MISTRAL, QWEN2, QWEN3, SMOLLM3
from klfast.export.gguf.families.lfm2 import LFM2, LFM2_MOE
from klfast.export.gguf.families.mamba import FALCON_MAMBA, JAMBA, MAMBA
from klfast.export.gguf.families.mamba2 import (
    BAMBA,
    FALCON_H1,
    GRANITE_HYBRID,
    GRANITE_HYBRID_MOE,
    MAMBA2,
    NEMOTRON_H,
    NEMOTRON_H_MOE,
)
from klfast.export.gguf.families.qwen35 import QWEN35, QWEN35_MOE

ARCHITECTURES: dict[str, Architecture] = {
    "bamba": BAMBA,
    "falcon_h1": FALCON_H1,
    "falcon_mamba": FALCON_MAMBA,
    "granitemoehybrid": GRANITE_HYBRID,
    "jamba": JAMBA,
    "lfm2": LFM2,
    "lfm2_moe": LFM2_MOE,
    "llama": LLAMA,
    "mamba": MAMBA,
    "mamba2": MAMBA2,
    "mistral": MISTRAL,
    "nemotron_h": NEMOTRON_H,
    "qwen2": QWEN2,
    "qwen3": QWEN3,
    "qwen3_5_moe_text": QWEN35_MOE,
    "qwen3_5_text": QWEN35,
    "smollm3": SMOLLM3,
}

# Model types with experts and without: how to tell, and the architecture of those with.
WITH_EXPERTS: dict[str, tuple[Callable[[Any], bool], Architecture]] = {
    "granitemoehybrid": (lambda config: config.num_local_experts > 0, GRANITE_HYBRID_MOE),
    "nemotron_h": (lambda config: "moe" in config.layers_block_type, NEMOTRON_H_MOE),
}
