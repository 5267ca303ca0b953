"""Tiny models of hybrid families that klfast reads through transformers alone, with random weights."""

import torch
import transformers

VOCABULARY = 61
_SHARED = dict(
    vocab_size=VOCABULARY,
    hidden_size=64,
    intermediate_size=96,
    num_attention_heads=4,
    num_key_value_heads=2,
    bos_token_id=None,
    eos_token_id=None,
    pad_token_id=None,
    max_position_embeddings=128,
)
_MAMBA = dict(mamba_n_heads=8, mamba_d_head=16, mamba_n_groups=2, mamba_d_state=16, mamba_expand=2, mamba_chunk_size=16)
CONFIGS = {
    "falcon_h1": lambda: transformers.FalconH1Config(
        **_SHARED,
        **_MAMBA,
        num_hidden_layers=2,
        mamba_d_ssm=128,
        head_dim=16,
        ssm_multipliers=[0.5, 0.25, 0.75, 1.5, 2.0],
    ),
    "granite_moe_hybrid": lambda: transformers.GraniteMoeHybridConfig(
        **_SHARED,
        **_MAMBA,
        num_hidden_layers=2,
        layer_types=["mamba", "attention"],
        shared_intermediate_size=48,
        num_local_experts=4,
        num_experts_per_tok=2,
        position_embedding_type="rope",
    ),
    "bamba": lambda: transformers.BambaConfig(**_SHARED, **_MAMBA, num_hidden_layers=2, attn_layer_indices=[1]),
    "jamba": lambda: transformers.JambaConfig(
        **_SHARED,
        num_hidden_layers=2,
        attn_layer_period=2,
        attn_layer_offset=1,
        expert_layer_period=2,
        expert_layer_offset=1,
        num_experts=4,
        mamba_d_state=8,
        mamba_dt_rank=8,
    ),
    "zamba2": lambda: transformers.Zamba2Config(
        **{**_SHARED, "num_key_value_heads": 4},
        num_hidden_layers=4,
        layers_block_type=["mamba", "hybrid"] * 2,
        mamba_d_state=16,
        mamba_headdim=32,
        mamba_ngroups=1,
        n_mamba_heads=4,
        num_mem_blocks=1,
        chunk_size=16,
        adapter_rank=8,
        hybrid_layer_ids=[1, 3],
    ),
    "nemotron_h": lambda: transformers.NemotronHConfig(
        **_SHARED,
        layers_block_type=["mamba", "attention", "moe"],
        head_dim=16,
        ssm_state_size=16,
        mamba_num_heads=8,
        mamba_head_dim=16,
        n_groups=2,
        chunk_size=16,
        n_routed_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        moe_shared_expert_intermediate_size=32,
        n_group=1,
        topk_group=1,
    ),
    "qwen3_next": lambda: transformers.Qwen3NextConfig(
        **_SHARED,
        num_hidden_layers=2,
        layer_types=["linear_attention", "full_attention"],
        head_dim=16,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=16,
        linear_value_head_dim=16,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        shared_expert_intermediate_size=32,
    ),
    "lfm2": lambda: transformers.Lfm2Config(
        **_SHARED, num_hidden_layers=2, layer_types=["conv", "full_attention"], block_auto_adjust_ff_dim=False
    ),
}


def tiny(family, tied=None, seed=0):
    """A model of that family in eval mode, its head tied as the family has it, or as ``tied`` says."""
    torch.manual_seed(seed)
    config = CONFIGS[family]()
    if tied is not None:
        config.tie_word_embeddings = tied
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() >= 2 and "conv" not in name and "A_log" not in name:
                parameter.normal_(std=0.15)
    return model
