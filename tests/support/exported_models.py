"""Tiny models whose configurations llama.cpp can say, with quantized layers of every kind that GGUF holds exactly."""

import tiny_models
import torch

import klfast
from klfast.models.matrices import matrices

FAMILIES = (
    *("mamba", "mamba2", "falcon_mamba", "jamba", "granite_hybrid", "falcon_h1", "nemotron_h"),
    *("qwen3_5", "lfm2", "bamba", "llama", "mistral", "qwen2", "qwen3", "smollm3"),
    *(WITH_EXPERTS := ("granite_hybrid_moe", "nemotron_h_moe", "qwen3_5_moe", "lfm2_moe", "jamba_moe")),
)
EXACT = ("int4-g32-sym", "int8-g32-sym", "int4-channel-sym", "int6-g32-asym", "int4-g32-asym", "int6-g64-sym")
_QWEN = {
    "linear_value_head_dim": 32,
    "linear_key_head_dim": 32,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.75},
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
}
_SAID = {
    "mamba": {"use_bias": False},
    "falcon_mamba": {"mixer_rms_eps": 1e-5},
    "nemotron_h": {"time_step_min": 1e-9},
    "nemotron_h_moe": {"time_step_min": 1e-9},
    "mistral": {"sliding_window": None},
    "qwen2": {"use_sliding_window": False, "layer_types": ["full_attention"] * 3},
    "qwen3_5": _QWEN,
    "qwen3_5_moe": _QWEN,
    "smollm3": {"use_sliding_window": False, "no_rope_layers": [1, 1, 1], "layer_types": ["full_attention"] * 3},
}


def exportable(family, tied=False, vocabulary=tiny_models.VOCABULARY):
    """Return a tiny model with vectors far from their symmetries, too."""
    config = tiny_models.CONFIGS[family]()
    for name, value in _SAID.get(family, {}).items():
        setattr(config, name, value)
    model = tiny_models.made(config, family, tied=tied, vocabulary=vocabulary)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1 and "A_log" not in name:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
        for name, buffer in model.named_buffers():
            if name.endswith("bias"):  # of routers
                buffer.add_(torch.randn_like(buffer), alpha=0.1)
    return model


def quantized(model, specs=EXACT):
    """Quantize a model's matrices with rows of whole blocks, with ``specs`` in turns; return it."""
    names = [name for name, one in matrices(model).items() if one.shape[1] % 32 == 0]
    chosen = {name: specs[i % len(specs)] for i, name in enumerate(names)}
    return klfast.quantize_model(model, klfast.Plan(chosen, "uniform"))
