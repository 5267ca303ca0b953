"""The families that llama.cpp has, by transformers' model types."""

from klfast.export.gguf.architecture import Architecture
from klfast.export.gguf.families.attention import LLAMA, MISTRAL, QWEN2, QWEN3, SMOLLM3
from klfast.export.gguf.families.lfm2 import LFM2
from klfast.export.gguf.families.mamba import FALCON_MAMBA, JAMBA, MAMBA
from klfast.export.gguf.families.mamba2 import FALCON_H1, GRANITE_HYBRID, MAMBA2, NEMOTRON_H
from klfast.export.gguf.families.qwen35 import QWEN35

ARCHITECTURES: dict[str, Architecture] = {
    "falcon_h1": FALCON_H1,
    "falcon_mamba": FALCON_MAMBA,
    "granitemoehybrid": GRANITE_HYBRID,
    "jamba": JAMBA,
    "lfm2": LFM2,
    "llama": LLAMA,
    "mamba": MAMBA,
    "mamba2": MAMBA2,
    "mistral": MISTRAL,
    "nemotron_h": NEMOTRON_H,
    "qwen2": QWEN2,
    "qwen3": QWEN3,
    "qwen3_5_text": QWEN35,
    "smollm3": SMOLLM3,
}
