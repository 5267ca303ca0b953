"""Configurations of hybrid models with the sizes of the released ones; those that would not fit have fewer layers.

The sizes follow Qwen/Qwen3.5-0.8B and -2B, ibm-granite/granite-4.0-h-350m and -1b, tiiuae/Falcon-H1-0.5B-Base,
nvidia/Nemotron-H-4B, Zyphra/Zamba2-1.2B, ai21labs/AI21-Jamba2-3B, ibm-ai-platform/Bamba-9B, LiquidAI/LFM2-350M and
-1.2B at huggingface.co. Only those of Qwen3.5-0.8B and LFM2-350M were compared with copies of their config.json; the
others come from descriptions of the models.
"""

from __future__ import annotations

from collections.abc import Callable

import transformers
from torch import nn
from transformers import PretrainedConfig


def _every(n: int, layers: int, first: int, rare: str, usual: str) -> list[str]:
    """Return the types of layers, of which every nth from ``first`` on is rare."""
    return [rare if i >= first and (i - first) % n == 0 else usual for i in range(layers)]


def _qwen3_5(hidden: int, intermediate: int, layers: int, vocab: int = 248320, **sizes: int) -> PretrainedConfig:
    options = dict(num_attention_heads=8, num_key_value_heads=2, head_dim=256, linear_num_value_heads=16) | sizes
    return transformers.Qwen3_5TextConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        layer_types=_every(4, layers, 3, "full_attention", "linear_attention"),
        tie_word_embeddings=True,
        **options,
    )


def _granite(hidden: int, mlp: int, layers: int, head_dim: int, vocab: int = 100352) -> PretrainedConfig:
    return transformers.GraniteMoeHybridConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        shared_intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=12,
        num_key_value_heads=4,
        layer_types=_every(10, layers, min(5, layers - 1), "attention", "mamba"),
        mamba_n_heads=2 * hidden // head_dim,
        mamba_d_head=head_dim,
        mamba_d_state=128,
        mamba_n_groups=1,
        num_local_experts=0,
        num_experts_per_tok=0,
        position_embedding_type="nope",
        tie_word_embeddings=True,
    )


def _falcon_h1() -> PretrainedConfig:
    return transformers.FalconH1Config(
        vocab_size=32784,
        hidden_size=1024,
        intermediate_size=2048,
        num_hidden_layers=36,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=64,
        mamba_d_ssm=1536,
        mamba_n_heads=24,
        mamba_d_head=64,
        mamba_d_state=128,
        mamba_n_groups=1,
    )


def _nemotron_h() -> PretrainedConfig:
    return transformers.NemotronHConfig(
        vocab_size=131072,
        hidden_size=3072,
        intermediate_size=12288,
        num_hidden_layers=7,
        hybrid_override_pattern="M-M*-M-",
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        mamba_num_heads=112,
        mamba_head_dim=64,
        ssm_state_size=128,
        n_groups=8,
    )


def _zamba2() -> PretrainedConfig:
    return transformers.Zamba2Config(
        vocab_size=32000,
        hidden_size=2048,
        num_hidden_layers=38,
        layers_block_type=_every(6, 38, 5, "hybrid", "mamba"),
        intermediate_size=8192,
        num_attention_heads=32,
        num_key_value_heads=32,
        mamba_d_state=128,
        mamba_headdim=64,
        n_mamba_heads=64,
        num_mem_blocks=1,
    )


def _jamba() -> PretrainedConfig:
    return transformers.JambaConfig(
        vocab_size=65536,
        hidden_size=2560,
        intermediate_size=8192,
        num_hidden_layers=7,
        num_attention_heads=20,
        num_key_value_heads=1,
        num_experts=1,
        num_experts_per_tok=1,
        attn_layer_period=7,
        attn_layer_offset=3,
        mamba_dt_rank=160,
    )


def _bamba() -> PretrainedConfig:
    return transformers.BambaConfig(
        vocab_size=128256, num_hidden_layers=4, attn_layer_indices=[2], mamba_d_state=128, mamba_n_heads=128
    )


def _lfm2(hidden: int, intermediate: int, layers: int = 16, vocab: int = 65536) -> PretrainedConfig:
    attention = {2, 5, 8, 10, 12, 14}
    return transformers.Lfm2Config(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=min(8, hidden // 64),
        layer_types=["full_attention" if i in attention else "conv" for i in range(layers)],
    )


CONFIGS: dict[str, Callable[[], PretrainedConfig]] = {
    "qwen3.5-0.8b": lambda: _qwen3_5(1024, 3584, 24),
    "qwen3.5-2b": lambda: _qwen3_5(2048, 6144, 24),
    "granite-4.0-h-350m": lambda: _granite(768, 2048, 32, 32),
    "granite-4.0-h-1b": lambda: _granite(1536, 4096, 40, 64),
    "falcon-h1-0.5b": _falcon_h1,
    "nemotron-h-4b, 7 layers": _nemotron_h,
    "zamba2-1.2b": _zamba2,
    "jamba2-3b, 7 layers": _jamba,
    "bamba-9b, 4 layers": _bamba,
    "lfm2-350m": lambda: _lfm2(1024, 6656),
    "lfm2-1.2b": lambda: _lfm2(2048, 12288),
    "qwen3.5-tiny": lambda: _qwen3_5(64, 128, 4, 512, head_dim=16, linear_key_head_dim=16, linear_value_head_dim=16),
    "lfm2-tiny": lambda: _lfm2(128, 256, 4, 512),
}
QUICK_MODELS = tuple(name for name in CONFIGS if name.endswith("-tiny"))
MODELS = tuple(name for name in CONFIGS if name not in QUICK_MODELS)


def make(name: str) -> nn.Module:
    """Return transformers' model of this name in float32, with random weights."""
    config = CONFIGS[name]()
    config.eos_token_id = config.bos_token_id = config.pad_token_id = None
    return transformers.AutoModelForCausalLM.from_config(config)
