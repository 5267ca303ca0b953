"""The registry of tiny causal language models with random weights, for all tests.

``FAMILIES`` have a record (klfast.models.families) and go through every suite, ``VARIANTS`` have one and go through
some. ``OTHERS`` are read by what klfast detects. A new family is tested if it is listed in ``FAMILIES`` with its
configuration in ``CONFIGS``, and in ``ACCELERATED`` if it has mixers; in ``MIXERS`` if these are of a new kind.
"""

import copy
import inspect

import torch
import transformers
from transformers.models.falcon_h1.modeling_falcon_h1 import FalconH1RMSNormGated
from transformers.models.kimi_linear.modeling_kimi_linear import chunk_kimi_delta_attention

from klfast.models.hymba import HymbaConfig

VOCABULARY = 61
DELTA = ("qwen3_5", "qwen3_next", "olmo_hybrid", "kimi_linear")
FAMILIES = (
    *("mamba", "mamba2", "falcon_mamba", "hymba", "llama", "granite_hybrid", "falcon_h1", "bamba", "lfm2"),
    *DELTA,
    *("nemotron_h", "jamba", "zamba", "zamba2"),
)
HEADS = [  # families, with a head of its own or tied; transformers never ties those of Kimi-Linear and Nemotron-H
    *((family, False) for family in FAMILIES),
    *((family, True) for family in FAMILIES if family not in ("kimi_linear", "nemotron_h")),
]
SOME_TIED = [  # for what depends on the family and on the kind of head, but not on both
    *((family, False) for family in FAMILIES),
    *((family, True) for family in ("mamba2", "hymba", "llama", "zamba2")),
]
WITH_EXPERTS = ("qwen3_next", "kimi_linear")
STATE_SPACE = ("mamba", "mamba2", "falcon_mamba")  # without attention
_SMALL = dict(vocab_size=VOCABULARY, hidden_size=64, num_hidden_layers=2)
_SSM = dict(**_SMALL, state_size=8)
_ATTENTION = dict(**_SMALL, intermediate_size=96, num_attention_heads=4, num_key_value_heads=2)
_MAMBA2 = dict(
    mamba_n_heads=8, mamba_d_head=16, mamba_n_groups=2, mamba_d_state=16, mamba_expand=2, mamba_chunk_size=16
)
_GRANITE = dict(
    shared_intermediate_size=48,
    embedding_multiplier=3.0,
    attention_multiplier=0.2,
    residual_multiplier=0.6,
    logits_scaling=3.0,
)
_FALCON = dict(
    mamba_d_ssm=128,
    head_dim=16,
    ssm_multipliers=[0.5, 0.25, 0.75, 1.5, 2.0],
    embedding_multiplier=2.0,
    lm_head_multiplier=0.7,
    ssm_in_multiplier=1.25,
    ssm_out_multiplier=0.8,
    attention_in_multiplier=1.5,
    attention_out_multiplier=0.9,
    key_multiplier=0.6,
    mlp_multipliers=[0.9, 0.7],
)
_DELTA_LAYERS = dict(num_hidden_layers=3, layer_types=["linear_attention", "full_attention", "linear_attention"])
_DELTA = dict(
    **_DELTA_LAYERS,
    linear_num_value_heads=9,  # compressed-tensors cannot read zero points of less than 9 rows
    linear_num_key_heads=3,
    linear_key_head_dim=12,
    linear_value_head_dim=20,
    linear_conv_kernel_dim=3,
)
_EXPERTS = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32)
_SHORT_CONV = dict(
    num_hidden_layers=3, layer_types=["conv", "full_attention", "conv"], conv_L_cache=4, initializer_range=0.5
)
_LFM3 = dict(
    num_hidden_layers=4,
    layer_types=["conv", "full_attention", "sliding_attention", "conv"],
    conv_L_cache=7,
    **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id")),  # the default ones are beyond the vocabulary
)
_NEMOTRON = dict(
    head_dim=16,
    ssm_state_size=13,
    mamba_num_heads=8,
    mamba_head_dim=16,
    n_groups=2,
    conv_kernel=3,
    chunk_size=7,
    time_step_min=0.02,
)
_JAMBA = dict(
    num_hidden_layers=3, attn_layer_period=2, attn_layer_offset=1, mamba_d_state=13, mamba_d_conv=3, mamba_dt_rank=5
)
_ZAMBA = dict(
    num_hidden_layers=4,
    layers_block_type=["mamba", "hybrid"] * 2,
    num_key_value_heads=4,
    mamba_d_state=13,
    mamba_d_conv=3,
)
_ZAMBA2 = dict(mamba_ngroups=2, n_mamba_heads=4, chunk_size=7, time_step_min=0.02, adapter_rank=16)
HYMBA_RELEASE = dict(  # every feature of the released model
    vocab_size=VOCABULARY,
    hidden_size=40,
    intermediate_size=48,
    num_hidden_layers=5,
    num_attention_heads=10,
    num_key_value_heads=5,
    mamba_d_state=16,
    num_memory_tokens=3,
    sliding_window=6,
    global_attn_idx=[0, 4],
    kv_reuse_group=[[1, 2, 3]],
    max_position_embeddings=128,
    orig_max_position_embeddings=32,
    eos_token_id=None,
)

CONFIGS = {
    "mamba": lambda: transformers.MambaConfig(**_SSM, use_bias=True),
    "mamba2": lambda: transformers.Mamba2Config(
        **_SSM | dict(state_size=16), num_heads=4, head_dim=32, n_groups=2, chunk_size=16
    ),
    "falcon_mamba": lambda: transformers.FalconMambaConfig(**_SSM),
    "hymba": lambda: HymbaConfig(
        **_ATTENTION | dict(num_hidden_layers=3),
        num_memory_tokens=3,
        sliding_window=6,
        global_attn_idx=[0],
        kv_reuse_group=[[1, 2]],
    ),
    "hymba_release": lambda: HymbaConfig(**HYMBA_RELEASE),
    "llama": lambda: transformers.LlamaConfig(**_ATTENTION),
    "granite_hybrid": lambda: transformers.GraniteMoeHybridConfig(  # Granite-4.0-H: dense, without rotary positions
        **_ATTENTION | _MAMBA2 | _GRANITE | dict(num_hidden_layers=3),
        layer_types=["mamba", "attention", "mamba"],
        num_local_experts=0,
        num_experts_per_tok=0,
        position_embedding_type="nope",
    ),
    "granite_hybrid_moe": lambda: transformers.GraniteMoeHybridConfig(
        **_ATTENTION | _MAMBA2 | _GRANITE,
        layer_types=["attention", "mamba"],
        num_local_experts=4,
        num_experts_per_tok=2,
        position_embedding_type="rope",
    ),
    "falcon_h1": lambda: transformers.FalconH1Config(**_ATTENTION | _MAMBA2 | _FALCON),
    "falcon_h1_norm": lambda: transformers.FalconH1Config(
        **_ATTENTION | _MAMBA2 | _FALCON, mamba_rms_norm=True, mamba_norm_before_gate=True
    ),
    "falcon_h1_gated_norm": lambda: transformers.FalconH1Config(
        **_ATTENTION | _MAMBA2 | _FALCON, mamba_rms_norm=True, mamba_norm_before_gate=False
    ),
    "bamba": lambda: transformers.BambaConfig(
        **_ATTENTION | _MAMBA2 | dict(num_hidden_layers=5, mamba_d_state=13, mamba_d_conv=3, mamba_chunk_size=7),
        attn_layer_indices=[1, 3],
    ),
    "nemotron_h": lambda: transformers.NemotronHConfig(**_ATTENTION | _NEMOTRON, hybrid_override_pattern="M*-M"),
    "nemotron_h_moe": lambda: transformers.NemotronHConfig(
        **_ATTENTION | _NEMOTRON,
        hybrid_override_pattern="*EM",
        n_routed_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        moe_shared_expert_intermediate_size=32,
        moe_latent_size=48,
        routed_scaling_factor=1.5,
    ),
    "jamba": lambda: transformers.JambaConfig(**_ATTENTION | _JAMBA, num_experts=1),
    "jamba_moe": lambda: transformers.JambaConfig(
        **_ATTENTION | _JAMBA,
        expert_layer_period=2,
        expert_layer_offset=1,
        num_experts=3,
        num_experts_per_tok=3,  # all of them: with fewer, rounding to bfloat16 changes the choice
    ),
    "zamba": lambda: transformers.ZambaConfig(**_ATTENTION | _ZAMBA, n_mamba_heads=2, mamba_dt_rank=5),
    "zamba2": lambda: transformers.Zamba2Config(**_ATTENTION | _ZAMBA | _ZAMBA2),
    "zamba2_adapters": lambda: transformers.Zamba2Config(  # two shared transformer blocks, the second used once
        **_ATTENTION | _ZAMBA | _ZAMBA2 | dict(layers_block_type=["mamba", "hybrid", "hybrid", "hybrid"]),
        num_mem_blocks=2,
        use_shared_attention_adapter=True,
        use_mem_rope=True,
    ),
    "cohere": lambda: transformers.CohereConfig(**_ATTENTION, logit_scale=0.3),
    "gemma2": lambda: transformers.Gemma2Config(
        **_ATTENTION, head_dim=16, final_logit_softcapping=2.5, sliding_window=6
    ),
    "gemma3": lambda: transformers.Gemma3TextConfig(
        **_ATTENTION, head_dim=16, sliding_window=6, layer_types=["sliding_attention", "full_attention"]
    ),
    "gpt2": lambda: transformers.GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=2),
    "gpt_neox": lambda: transformers.GPTNeoXConfig(**_SMALL, intermediate_size=96, num_attention_heads=4),
    "granite": lambda: transformers.GraniteConfig(**_ATTENTION, logits_scaling=3.0, embedding_multiplier=3.0),
    "hyperclovax": lambda: transformers.HyperCLOVAXConfig(**_ATTENTION, logits_scaling=0.3),
    "kimi_linear": lambda: transformers.KimiLinearConfig(
        **_ATTENTION | _DELTA_LAYERS | _EXPERTS | dict(num_key_value_heads=4),
        mlp_layer_types=["dense", "sparse", "dense"],
        num_local_experts=4,
        kv_lora_rank=24,
        qk_rope_head_dim=8,
        qk_nope_head_dim=16,
        v_head_dim=20,
        linear_head_dim=20,
        linear_num_heads=9,
        linear_conv_kernel_dim=3,
    ),
    "lfm2": lambda: transformers.Lfm2Config(**_ATTENTION | _SHORT_CONV, block_auto_adjust_ff_dim=False),
    "lfm2_moe": lambda: transformers.Lfm2MoeConfig(**_ATTENTION | _SHORT_CONV | _EXPERTS, num_dense_layers=1),
    "lfm3": lambda: transformers.Lfm3Config(**_ATTENTION | _SHORT_CONV | _LFM3, head_dim=12, sliding_window=6),
    "mistral": lambda: transformers.MistralConfig(**_ATTENTION, head_dim=12, sliding_window=6),
    "llama_eager": lambda: transformers.LlamaConfig(**_ATTENTION, attn_implementation="eager"),
    "minimax": lambda: transformers.MiniMaxConfig(
        **_ATTENTION,
        layer_types=["linear_attention", "full_attention"],
        num_local_experts=2,
        num_experts_per_tok=1,
        block_size=4,
    ),
    "olmo_hybrid": lambda: transformers.OlmoHybridConfig(**_ATTENTION | _DELTA),
    "phi": lambda: transformers.PhiConfig(**_ATTENTION),
    "qwen2": lambda: transformers.Qwen2Config(
        **_ATTENTION | dict(num_hidden_layers=3), use_sliding_window=True, sliding_window=6, max_window_layers=1
    ),
    "qwen3": lambda: transformers.Qwen3Config(**_ATTENTION, head_dim=16),
    "qwen3_5": lambda: transformers.Qwen3_5TextConfig(**_ATTENTION | _DELTA, head_dim=16),
    "qwen3_5_moe": lambda: transformers.Qwen3_5MoeTextConfig(
        **_ATTENTION | _DELTA | _EXPERTS, head_dim=16, shared_expert_intermediate_size=32
    ),
    "qwen3_next": lambda: transformers.Qwen3NextConfig(
        **_ATTENTION | _DELTA | _EXPERTS, head_dim=16, shared_expert_intermediate_size=32
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
        rescale_every=0,
    ),
    "smollm3": lambda: transformers.SmolLM3Config(
        **_ATTENTION | dict(num_hidden_layers=3), no_rope_layers=[1, 0, 1], use_sliding_window=True, sliding_window=5
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
}
_MISSING = () if hasattr(transformers, "Lfm3Config") else ("lfm3",)  # since 5.23
for _name in _MISSING:
    del CONFIGS[_name]
_FALCON_NORMS = ("falcon_h1_norm", "falcon_h1_gated_norm")
LLAMA_LIKE = ("mistral", "qwen2", "qwen3", "smollm3")
_ALL_VARIANTS = (  # with a record
    *("hymba_release", "granite_hybrid_moe", "qwen3_5_moe", "lfm2_moe", *_FALCON_NORMS),
    *("nemotron_h_moe", "jamba_moe", "zamba2_adapters", "rwkv", "minimax", "lfm3"),
    *LLAMA_LIKE,
)
# In transformers 5.17 the norm of a single token loses a dimension, so that batches mix when they decode.
_WRONG = _FALCON_NORMS if FalconH1RMSNormGated(4)(torch.ones(1, 1, 4)).dim() != 3 else ()
VARIANTS = tuple(name for name in _ALL_VARIANTS if name not in (*_WRONG, *_MISSING))
ACCELERATED = (
    *STATE_SPACE,
    "granite_hybrid",
    "falcon_h1",
    "bamba",
    "lfm2",
    *DELTA,
    *("nemotron_h", "jamba", "zamba", "zamba2"),
    # Most of these have no mixers to accelerate; Zamba2's adapters concern its shared blocks.
    *(name for name in VARIANTS if name not in ("hymba_release", "rwkv", "minimax", "zamba2_adapters", *LLAMA_LIKE)),
)
# One of each kind of mixer: Mamba's, those with norms and in heads, Mamba-2's, a short convolution, two delta rules.
# What concerns tiers, copies or torch.compile, not a family's own forward, need not be asked of more.
MIXERS = ("mamba", "falcon_mamba", "zamba", "mamba2", "lfm2", "qwen3_5", "kimi_linear")
OTHERS = tuple(name for name in CONFIGS if name not in FAMILIES + _ALL_VARIANTS)

# Kimi-Linear's own delta rule in chunks of 16 tokens, not 64: it fills up the last one, and takes a fifth of the time.
# In processes with the package kernels it is a module, and stays as it is.
_kimi = inspect.unwrap(chunk_kimi_delta_attention)
if inspect.isfunction(_kimi):
    _kimi.__defaults__ = tuple(16 if default == 64 else default for default in _kimi.__defaults__)


def tiny(name, tied=False, dtype=torch.float32, seed=0, vocabulary=VOCABULARY):
    """Return a model in eval mode, with weights far from their initial symmetries.

    Its head is tied as ``tied`` says; None leaves it to the family's configuration.
    """
    return made(CONFIGS[name](), name, tied, dtype, seed, vocabulary)


def made(config, name, tied=False, dtype=torch.float32, seed=0, vocabulary=VOCABULARY):
    """Return a model as ``tiny`` does, with a configuration changed by the caller."""
    torch.manual_seed(seed)
    config.vocab_size = vocabulary
    if tied is not None:
        config.tie_word_embeddings = tied
    config.eos_token_id = config.bos_token_id = config.pad_token_id = None
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    std = 0.1 if name.startswith("zamba2") else 0.15  # Zamba2's attention, sharp and wide, multiplies rounding
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter.dim() >= 2 and "conv" not in parameter_name.split(".")[-2] and "A_log" not in parameter_name:
                parameter.normal_(std=std)
    return model


def in_float64(model):
    """Return a copy of the model in float64, for the truth."""
    model = copy.deepcopy(model).double()
    if hasattr(model.config, "num_experts_per_tok"):
        model.set_experts_implementation("eager")  # torch's grouped product has no float64
    return model


def assert_no_further(found, plain, truth, slack=2e-5):
    """Compare the largest errors of two results: ``found``'s may be twice ``plain``'s, or ``slack`` of the truth."""
    errors = [(each.double() - truth).abs().max().item() for each in (found, plain)]
    assert errors[0] <= max(2 * errors[1], slack * truth.abs().max().item()), errors


def batch(rows=2, tokens=12, seed=1):
    return torch.randint(0, VOCABULARY, (rows, tokens), generator=torch.Generator().manual_seed(seed))


def left_padded(ids):
    """Return a mask for a batch of at least two rows, with 4 pads in the first row and 1 in the second."""
    mask = torch.ones_like(ids)
    mask[0, :4], mask[1, :1] = 0, 0
    return mask
