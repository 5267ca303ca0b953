"""Tiny random models of transformers' other families: hybrids, recurrent ones and attention with other positions."""

import torch
import transformers
from families import VOCABULARY

_LLAMA = dict(
    vocab_size=VOCABULARY,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
)
_MAMBA2 = dict(mamba_n_heads=8, mamba_d_head=16, mamba_d_state=16, mamba_n_groups=1, mamba_chunk_size=8)
_DELTA = dict(
    layer_types=["linear_attention", "full_attention"],
    linear_num_value_heads=4,
    linear_num_key_heads=4,
    linear_key_head_dim=16,
    linear_value_head_dim=16,
)
_EXPERTS = dict(num_experts=2, num_experts_per_tok=1)
_ZAMBA = dict(
    vocab_size=VOCABULARY,
    hidden_size=64,
    num_hidden_layers=4,
    layers_block_type=["mamba", "hybrid", "mamba", "hybrid"],
    num_attention_heads=4,
    num_key_value_heads=4,
    intermediate_size=96,
    mamba_d_state=16,
)
_CONFIGS = {
    "bamba": lambda: transformers.BambaConfig(**_LLAMA | _MAMBA2 | dict(num_hidden_layers=3), attn_layer_indices=[1]),
    "falcon_h1": lambda: transformers.FalconH1Config(
        **_LLAMA | _MAMBA2 | dict(mamba_n_heads=4), mamba_d_ssm=64, head_dim=16
    ),
    "gemma3": lambda: transformers.Gemma3TextConfig(
        **_LLAMA, head_dim=16, sliding_window=6, layer_types=["sliding_attention", "full_attention"]
    ),
    "gpt2": lambda: transformers.GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=2),
    "granitemoehybrid": lambda: transformers.GraniteMoeHybridConfig(
        **_LLAMA | _MAMBA2,
        layer_types=["mamba", "attention"],
        num_local_experts=2,
        num_experts_per_tok=1,
        shared_intermediate_size=64,
    ),
    "jamba": lambda: transformers.JambaConfig(
        **_LLAMA | _EXPERTS | dict(num_hidden_layers=4),
        attn_layer_period=2,
        attn_layer_offset=1,
        expert_layer_period=2,
        expert_layer_offset=1,
        mamba_d_state=8,
        mamba_dt_rank=4,
        use_mamba_kernels=False,
    ),
    "lfm2": lambda: transformers.Lfm2Config(**_LLAMA, layer_types=["conv", "full_attention"], block_multiple_of=16),
    "minimax": lambda: transformers.MiniMaxConfig(
        **_LLAMA,
        layer_types=["linear_attention", "full_attention"],
        num_local_experts=2,
        num_experts_per_tok=1,
        block_size=4,
    ),
    "nemotron_h": lambda: transformers.NemotronHConfig(
        **_LLAMA | dict(num_hidden_layers=3),
        hybrid_override_pattern="M*-",
        mamba_num_heads=8,
        mamba_head_dim=16,
        ssm_state_size=16,
        n_groups=1,
        chunk_size=8,
        head_dim=16,
    ),
    "olmo_hybrid": lambda: transformers.OlmoHybridConfig(**_LLAMA | _DELTA),
    "qwen3_5": lambda: transformers.Qwen3_5TextConfig(**_LLAMA | _DELTA, head_dim=16),
    "qwen3_next": lambda: transformers.Qwen3NextConfig(
        **_LLAMA | _DELTA | _EXPERTS,
        head_dim=16,
        moe_intermediate_size=32,
        shared_expert_intermediate_size=32,
        decoder_sparse_step=1,
    ),
    "recurrent_gemma": lambda: transformers.RecurrentGemmaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        lru_width=64,
        attention_window_size=8,
        conv1d_width=4,
    ),
    "rwkv": lambda: transformers.RwkvConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        attention_hidden_size=64,
        num_hidden_layers=3,
        intermediate_size=96,
        context_length=64,
        rescale_every=2,
    ),
    "xlstm": lambda: transformers.xLSTMConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        embedding_dim=64,
        num_hidden_layers=2,
        num_blocks=2,
        num_heads=4,
        qk_dim_factor=1.0,
        chunk_size=8,
    ),
    "zamba": lambda: transformers.ZambaConfig(
        **_ZAMBA, attn_layer_period=2, attn_layer_offset=1, n_mamba_heads=2, mamba_dt_rank=4
    ),
    "zamba2": lambda: transformers.Zamba2Config(
        **_ZAMBA,
        mamba_headdim=16,
        n_mamba_heads=8,
        mamba_ngroups=1,
        chunk_size=8,
        num_mem_blocks=1,
        use_mem_rope=True,
        adapter_rank=8,
    ),
}
OTHER_FAMILIES = tuple(_CONFIGS)


def other(family):
    """A model of that family in eval mode; weights well away from their initial symmetries."""
    torch.manual_seed(0)
    config = _CONFIGS[family]()
    config.eos_token_id = config.bos_token_id = config.pad_token_id = None
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() >= 2 and "conv" not in name and "A_log" not in name:
                parameter.normal_(std=0.15)
    return model
