"""Tiny causal language models with random weights, one of each family that klfast knows, for the tests."""

import torch
import transformers

from klfast.models.hymba import HymbaConfig

VOCABULARY = 61
FAMILIES = ("mamba", "mamba2", "falcon_mamba", "hymba", "llama")
_SSM = dict(vocab_size=VOCABULARY, hidden_size=64, num_hidden_layers=2, state_size=8)
_CONFIGS = {
    "mamba": lambda: transformers.MambaConfig(**_SSM, use_bias=True),
    "mamba2": lambda: transformers.Mamba2Config(
        **_SSM | dict(state_size=16), num_heads=4, head_dim=32, n_groups=2, chunk_size=16
    ),
    "falcon_mamba": lambda: transformers.FalconMambaConfig(**_SSM),
    "hymba": lambda: HymbaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_memory_tokens=3,
        sliding_window=6,
        global_attn_idx=[0],
        kv_reuse_group=[[1, 2]],
    ),
    "llama": lambda: transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    ),
}


def tiny(family, tied=False, dtype=torch.float32, seed=0):
    """A model of that family in eval mode; weights well away from their initial symmetries."""
    torch.manual_seed(seed)
    config = _CONFIGS[family]()
    config.tie_word_embeddings = tied
    config.eos_token_id = config.bos_token_id = config.pad_token_id = None
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() >= 2 and "conv" not in name and "A_log" not in name:
                parameter.normal_(std=0.15)
    return model


def batch(rows=2, tokens=12, seed=1):
    return torch.randint(0, VOCABULARY, (rows, tokens), generator=torch.Generator().manual_seed(seed))
