"""Tiny models in GGUF files, stored as llama.cpp's converter stores them (convert_hf_to_gguf.py)."""

import fnmatch
import re

import gguf
import numpy as np
import torch
import transformers
from gguf import GGMLQuantizationType as Kind
from gguf import GGUFValueType
from tokenizers import pre_tokenizers

from bench.gguf_models import random_blocks

START, END = 258, 259  # the tokens that begin and end a text
TOKENS = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "th", "the", "<|start|>", "<|end|>"]
_SMALL = dict(vocab_size=len(TOKENS), hidden_size=256, num_hidden_layers=2)
_ATTENTION = dict(
    **_SMALL, intermediate_size=512, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=96
)
_MAMBA = dict(**_SMALL, state_size=8, time_step_rank=32)
_ROPE = {"rope_type": "default", "rope_theta": 500.0}
_PARTIAL = {"partial_rotary_factor": 0.25, "mrope_section": [2, 3, 3], "mrope_interleaved": True}
_DELTA_NETS = dict(
    head_dim=64,
    layer_types=["linear_attention", "full_attention"],
    full_attention_interval=2,
    linear_num_key_heads=2,
    linear_num_value_heads=4,
    linear_key_head_dim=32,
    linear_value_head_dim=64,
    rope_parameters=_ROPE | _PARTIAL,
)
CONFIGS = {
    "llama": lambda: transformers.LlamaConfig(**_ATTENTION, rope_parameters=_ROPE),
    "mamba": lambda: transformers.MambaConfig(**_MAMBA),
    "falcon_mamba": lambda: transformers.FalconMambaConfig(**_MAMBA),
    "lfm2": lambda: transformers.Lfm2Config(
        **_ATTENTION, layer_types=["conv", "full_attention"], block_auto_adjust_ff_dim=False, rope_parameters=_ROPE
    ),
    "qwen35": lambda: transformers.Qwen3_5TextConfig(**_ATTENTION, **_DELTA_NETS),
    "qwen35moe": lambda: transformers.Qwen3_5MoeTextConfig(
        **_ATTENTION,
        **_DELTA_NETS,
        num_experts=3,
        num_experts_per_tok=2,
        moe_intermediate_size=256,
        shared_expert_intermediate_size=256,
    ),
    "gpt2": lambda: transformers.GPT2Config(vocab_size=len(TOKENS), n_embd=256, n_layer=2, n_head=4),
    "qwen3moe": lambda: transformers.Qwen3MoeConfig(  # transformers does not read the experts' width and takes 768
        **_ATTENTION,
        head_dim=64,
        rope_parameters=_ROPE,
        num_experts=3,
        num_experts_per_tok=2,
        moe_intermediate_size=768,
        norm_topk_prob=True,
    ),
}
_NAMES = {
    r"^(model|backbone)\.(embed_tokens|embeddings)": "token_embd",
    r"^lm_head": "output",
    r"^(model\.norm|backbone\.norm_f)": "output_norm",
    r"^(model|backbone)\.layers": "blk",
    r"self_attn\.([qkv])_proj": r"attn_\1",
    r"self_attn\.(o|out)_proj": "attn_output",
    r"self_attn\.([qk])_(norm|layernorm)": r"attn_\1_norm",
    r"mlp\.(gate|up|down)_proj": r"ffn_\1",
}
_MAMBA_NAMES = {
    r"\.norm\.weight": ".attn_norm.weight",
    r"mixer\.(in|out|x|dt)_proj": r"ssm_\1",
    r"mixer\.conv1d": "ssm_conv1d",
    r"mixer\.A_log": "ssm_a",
    r"mixer\.D": "ssm_d",
}
_EXPERT_NAMES = {
    r"mlp\.gate\.": "ffn_gate_inp.",
    r"mlp\.shared_expert_gate\.": "ffn_gate_inp_shexp.",
    r"mlp\.shared_expert\.(\w+)_proj": r"ffn_\1_shexp",
    r"mlp\.experts\.(\w+)_proj": r"ffn_\1_exps.weight",
}
_QWEN35_NAMES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "post_attention_norm",
    r"linear_attn\.in_proj_qkv": "attn_qkv",
    r"linear_attn\.in_proj_z": "attn_gate",
    r"linear_attn\.in_proj_a": "ssm_alpha",
    r"linear_attn\.in_proj_b": "ssm_beta",
    r"linear_attn\.(conv1d|norm)": r"ssm_\1",
    r"linear_attn\.out_proj": "ssm_out",
    r"linear_attn\.A_log": "ssm_a",
    r"linear_attn\.dt_bias": "ssm_dt.bias",
}
_NAMES_OF = {
    "llama": {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"},
    "mamba": _MAMBA_NAMES,
    "falcon_mamba": _MAMBA_NAMES,
    "lfm2": {
        r"^model\.embedding_norm": "token_embd_norm",
        "operator_norm": "attn_norm",
        r"feed_forward\.w1": "ffn_gate",
        r"feed_forward\.w2": "ffn_down",
        r"feed_forward\.w3": "ffn_up",
        r"conv\.(in|out)_proj": r"shortconv.\1_proj",
        r"conv\.conv": "shortconv.conv",
    },
    "gpt2": {
        r"^transformer\.wte": "token_embd",
        r"^transformer\.wpe": "position_embd",
        r"^transformer\.ln_f": "output_norm",
        r"^transformer\.h": "blk",
        "ln_1": "attn_norm",
        "ln_2": "ffn_norm",
        r"attn\.c_attn": "attn_qkv",
        r"attn\.c_proj": "attn_output",
        r"mlp\.c_fc": "ffn_up",
        r"mlp\.c_proj": "ffn_down",
    },
    "qwen3moe": {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", **_EXPERT_NAMES},
    "qwen35": _QWEN35_NAMES,
    "qwen35moe": _QWEN35_NAMES | _EXPERT_NAMES,
}


def tiny(family, tied=False):
    """Return a model with rows long enough for GGUF's blocks and large weights, in eval mode."""
    torch.manual_seed(3)
    config = CONFIGS[family]()
    config.tie_word_embeddings = tied
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
            elif parameter.dim() > 1 and "A_log" not in name and "conv" not in name:
                parameter.normal_(std=0.08)
    return model


def ids(rows=2, tokens=11):
    return torch.randint(0, len(TOKENS), (rows, tokens), generator=torch.Generator().manual_seed(4))


@torch.no_grad()
def write(path, family, model, kinds=(), metadata=(), **more):
    """Write a model to a file, and give the model the numbers that the file holds.

    ``kinds`` has the type of the matrices whose names in the file fit a pattern, the last one that fits; the others are
    F32. ``metadata`` replaces keys, None removes them; ``more`` are further tensors.
    """
    writer = gguf.GGUFWriter(path, "mamba" if family == "falcon_mamba" else family)
    for key, value in {**_metadata(family, model.config), **dict(metadata)}.items():
        if value is not None:
            is_list = isinstance(value, list)
            writer.add_key_value(key, value, _type(value), sub_type=_type(value[0]) if is_list else None)
    for name, tensor in _parts(family, model):
        fitting = [one for pattern, one in dict(kinds).items() if fnmatch.fnmatch(name, pattern)]
        is_matrix = tensor.dim() > 1 and not name.endswith(("ssm_a", "conv1d.weight", "shortconv.conv.weight"))
        kind = Kind[fitting[-1]] if fitting and is_matrix else Kind.F32
        dimension, order = _order(family, name, tensor.shape, model.config)
        data = encode(_changed(family, name, tensor.index_select(dimension, order)).float().numpy(), kind)
        writer.add_tensor(name, data, raw_dtype=kind)
        if kind is not Kind.F32:
            tensor.index_copy_(dimension, order, torch.from_numpy(gguf.quants.dequantize(data, kind).copy()))
    for name, values in more.items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _parts(family, model):
    """Yield the name in the file of each tensor, and the tensor; the experts' first projection is two."""
    for parameter, tensor in model.state_dict().items():
        if parameter == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        name = stored_name(family, parameter)
        if "gate_up" in name:
            yield from zip((name.replace("gate_up", one) for one in ("gate", "up")), tensor.chunk(2, 1), strict=True)
        else:
            yield name, tensor.T if family == "gpt2" and re.search(r"c_\w+\.weight", parameter) else tensor


def stored_name(family, parameter):
    """Return the name in the file."""
    for pattern, replacement in (_NAMES | _NAMES_OF[family]).items():
        parameter = re.sub(pattern, replacement, parameter)
    return parameter


def encode(values, kind):
    """Return values in a type of GGUF; for those that gguf only reads, random blocks with values of a similar size."""
    try:
        return gguf.quants.quantize(values, kind)
    except NotImplementedError:
        scales = {Kind.IQ4_NL: [(0, -1e-3)], Kind.Q4_K: [(0, 2e-4), (2, 1e-4)], Kind.Q6_K: [(208, -3e-5)]}
        return random_blocks(np.random.default_rng(values.shape), values.shape, kind, *scales[kind])


def _changed(family, name, values):
    """Return values as the file has them."""
    if name.endswith("ssm_a"):
        return -values.exp()
    if "conv1d.weight" in name or "shortconv.conv" in name:
        return values.squeeze(1)
    if family.startswith("qwen35") and name.endswith("norm.weight") and "ssm_norm" not in name:
        return values + 1
    return values


def _order(family, name, shape, config):
    """Return a dimension, and the order in which the file has a tensor's rows (0) or columns (1)."""
    if family == "llama" and (found := re.search(r"attn_([qk])\.", name)):  # halves of each head are interleaved
        heads = config.num_attention_heads if found[1] == "q" else config.num_key_value_heads
        return 0, torch.arange(shape[0]).view(heads, 2, -1).transpose(1, 2).flatten()
    if family.startswith("qwen35") and (found := re.search(r"attn_qkv|attn_gate|ssm_(?!norm)[a-z0-9]+", name)):
        # Value heads that share a key head are apart, in tiles, instead of together. They come after queries and keys.
        keys, values = config.linear_num_key_heads, config.linear_num_value_heads
        first = 2 * keys * config.linear_key_head_dim if found[0] in ("attn_qkv", "ssm_conv1d") else 0
        dimension = 1 if found[0] == "ssm_out" else 0
        tiles = torch.arange(first, shape[dimension]).view(keys, values // keys, -1).transpose(0, 1).flatten()
        return dimension, torch.cat((torch.arange(first), tiles))
    return 0, torch.arange(shape[0])


def _metadata(family, config):
    name = "mamba" if family == "falcon_mamba" else family
    keys = {
        "block_count": config.num_hidden_layers,
        "embedding_length": config.hidden_size,
        "context_length": 96,
        "attention.layer_norm_rms_epsilon": float(
            getattr(config, "rms_norm_eps", None) or getattr(config, "norm_eps", None) or config.layer_norm_epsilon
        ),
        "vocab_size": config.vocab_size,
    }
    if "mamba" in family:
        keys |= {
            "ssm.conv_kernel": config.conv_kernel,
            "ssm.inner_size": config.intermediate_size,
            "ssm.state_size": config.state_size,
            "ssm.time_step_rank": config.time_step_rank,
            "ssm.dt_b_c_rms": family == "falcon_mamba",
        }
    elif family == "gpt2":
        keys["attention.head_count"] = config.n_head
    else:
        heads = config.num_key_value_heads
        keys |= {
            "feed_forward_length": config.intermediate_size,
            "attention.head_count": config.num_attention_heads,
            "attention.head_count_kv": [0, heads] if family == "lfm2" else heads,
            "attention.key_length": 64,
            "rope.dimension_count": 16 if family.startswith("qwen35") else 64,
            "rope.freq_base": 500.0,
        }
    if family.endswith("moe"):
        keys |= {"expert_count": config.num_experts, "expert_used_count": config.num_experts_per_tok}
    if family == "qwen35moe":
        keys |= {"expert_feed_forward_length": 256, "expert_shared_feed_forward_length": 256}
    if family == "lfm2":
        keys["shortconv.l_cache"] = config.conv_L_cache
    if family.startswith("qwen35"):
        keys |= {
            "ssm.conv_kernel": config.linear_conv_kernel_dim,
            "ssm.state_size": config.linear_key_head_dim,
            "ssm.group_count": config.linear_num_key_heads,
            "ssm.time_step_rank": config.linear_num_value_heads,
            "ssm.inner_size": config.linear_num_value_heads * config.linear_value_head_dim,
            "full_attention_interval": 2,
            "rope.dimension_sections": [2, 3, 3, 0],
        }
    return {f"{name}.{key}": value for key, value in keys.items()} | {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": TOKENS,
        "tokenizer.ggml.token_type": [1] * START + [3, 3],
        "tokenizer.ggml.merges": ["t h", "th e"],
        "tokenizer.ggml.bos_token_id": START,
        "tokenizer.ggml.eos_token_id": END,
        "tokenizer.ggml.add_bos_token": False,
    }


def _type(value):
    kinds = {bool: "BOOL", int: "UINT32", float: "FLOAT32", str: "STRING", list: "ARRAY"}
    return GGUFValueType[kinds[type(value)]]
