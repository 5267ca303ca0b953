"""GGUF files with random weights, of the sizes of a transformers model, for llama.cpp.

Names, shapes and metadata are those that llama.cpp's converter gives the model (its folder conversion/, as of
llama-cpp-python 0.3.36). Types are those that llama-quantize picks for Q4_0 (src/llama-quant.cpp there): the head, or
the embedding that serves as one, is Q6_K. The converter's reordering of rows and columns is left out: in random weights
it changes nothing.

``python -m bench.gguf_models qwen3.5-0.8b FILE`` writes one.
"""

from __future__ import annotations

import atexit
import functools
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind
from gguf import GGUFWriter
from torch import nn
from transformers import PretrainedConfig

from klfast.benchkit.runner import UnavailableError

from . import models

_STD = 0.02  # of the weights
# Where a block has its scale (float16), and the one that gives random codes this standard deviation.
_SCALES = {Kind.Q4_0: (0, _STD / 4.6), Kind.Q8_0: (0, _STD / 74), Kind.Q6_K: (208, _STD / (18.5 * 74))}
# Names that the converter changes before it looks them up; of several, each gets its share of the rows.
_RENAMED = {
    ".dt_bias": (".dt_proj.bias",),
    "shared_mlp.input_linear": ("mlp.gate_proj", "mlp.up_proj"),
    "shared_mlp.output_linear": ("mlp.down_proj",),
}


def _attention(writer: GGUFWriter, config: PretrainedConfig, kv_heads: int | list[int]) -> None:
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(int(head * config.rope_parameters.get("partial_rotary_factor", 1)))


def _kv_heads(config: PretrainedConfig) -> list[int]:
    """Return the heads of keys and values in each layer; layers without attention have 0."""
    return [config.num_key_value_heads * (kind in ("attention", "full_attention")) for kind in config.layer_types]


def _ssm(writer: GGUFWriter, kernel: int, state: int, rank: int, inner: int, groups: int = 0) -> None:
    writer.add_ssm_conv_kernel(kernel)
    writer.add_ssm_state_size(state)
    writer.add_ssm_time_step_rank(rank)
    writer.add_ssm_inner_size(inner)
    if groups:
        writer.add_ssm_group_count(groups)


def _qwen35(writer: GGUFWriter, config: PretrainedConfig) -> None:
    keys, values = config.linear_num_key_heads, config.linear_num_value_heads
    _attention(writer, config, config.num_key_value_heads)
    _ssm(
        writer,
        config.linear_conv_kernel_dim,
        config.linear_key_head_dim,
        values,
        values * config.linear_value_head_dim,
        keys,
    )
    writer.add_full_attention_interval(config.layer_types.index("full_attention") + 1)
    pairs = int(config.head_dim * config.rope_parameters["partial_rotary_factor"]) // 2
    third = -(-pairs // 3)
    writer.add_rope_dimension_sections([third, third, pairs - 2 * third, 0])


def _granite_hybrid(writer: GGUFWriter, config: PretrainedConfig) -> None:
    heads = config.mamba_n_heads
    _attention(writer, config, _kv_heads(config))
    _ssm(writer, config.mamba_d_conv, config.mamba_d_state, heads, heads * config.mamba_d_head, config.mamba_n_groups)
    writer.add_rope_scaling_finetuned(False)  # says that there are no rotary embeddings
    writer.add_attention_scale(config.attention_multiplier)
    writer.add_embedding_scale(config.embedding_multiplier)
    writer.add_residual_scale(config.residual_multiplier)
    writer.add_logit_scale(config.logits_scaling)


def _lfm2(writer: GGUFWriter, config: PretrainedConfig) -> None:
    _attention(writer, config, _kv_heads(config))
    writer.add_shortconv_l_cache(config.conv_L_cache)


def _mamba(writer: GGUFWriter, config: PretrainedConfig) -> None:
    writer.add_head_count(0)
    _ssm(writer, config.conv_kernel, config.state_size, config.time_step_rank, config.intermediate_size)


def _mamba2(writer: GGUFWriter, config: PretrainedConfig) -> None:
    heads = config.num_heads
    writer.add_head_count(0)
    _ssm(writer, config.conv_kernel, config.state_size, heads, heads * config.head_dim, config.n_groups)


# By model type: llama.cpp's architecture, and what it needs to know beside the sizes that all have.
_PEERS: dict[str, tuple[gguf.MODEL_ARCH, Callable[[GGUFWriter, PretrainedConfig], None]]] = {
    "qwen3_5_text": (gguf.MODEL_ARCH.QWEN35, _qwen35),
    "granitemoehybrid": (gguf.MODEL_ARCH.GRANITE_HYBRID, _granite_hybrid),
    "lfm2": (gguf.MODEL_ARCH.LFM2, _lfm2),
    "mamba": (gguf.MODEL_ARCH.MAMBA, _mamba),
    "mamba2": (gguf.MODEL_ARCH.MAMBA2, _mamba2),
}


def made(name: str) -> Path:
    """Return a file for the model of this name; it is kept until that for another model is made.

    Raises:
        UnavailableError: as ``write``.
    """
    path = _folder() / f"{name}-q4_0.gguf"
    if not path.exists():
        for earlier in _folder().iterdir():
            earlier.unlink()
        unfinished = path.with_suffix(".unfinished")
        write(unfinished, sizes(name))
        unfinished.rename(path)
    return path


@functools.cache
def _folder() -> Path:
    """Return a folder that lives as long as this process."""
    folder = Path(tempfile.mkdtemp(prefix="klfast-gguf-"))
    atexit.register(shutil.rmtree, folder)
    return folder


def sizes(name: str) -> nn.Module:
    """Return the model of this name without memory for its weights."""
    with torch.device("meta"):
        return models.plain(name)


def write(path: Path, model: nn.Module) -> None:
    """Write a file with the sizes of a transformers model, of which only configuration and shapes are used.

    Raises:
        UnavailableError: there is no such file for this kind of model.
    """
    config = model.config
    if config.model_type not in _PEERS:
        raise UnavailableError(f"no GGUF file is made for {config.model_type}, only for {', '.join(_PEERS)}")
    arch, describe = _PEERS[config.model_type]
    shapes = dict(_tensors(model, arch))
    writer = GGUFWriter(path, gguf.MODEL_ARCH_NAMES[arch])
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_0)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_tokenizer_model("none")
    writer.add_vocab_size(config.vocab_size)
    writer.add_token_list([str(token) for token in range(config.vocab_size)])  # transformers counts them
    writer.add_context_length(2**15)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(shapes.get("blk.0.ffn_gate.weight", (0,))[0])
    writer.add_layer_norm_rms_eps(
        next(getattr(config, key) for key in ("rms_norm_eps", "norm_eps", "layer_norm_epsilon") if hasattr(config, key))
    )
    describe(writer, config)
    numbers = np.random.default_rng(0)
    for name, shape in shapes.items():
        kind = _kind(name, shape, tied="output.weight" not in shapes)
        writer.add_tensor(name, _values(numbers, name, shape, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _tensors(model: nn.Module, arch: gguf.MODEL_ARCH) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield the name and the shape of each tensor of the file."""
    config = model.config
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    for parameter, tensor in model.state_dict().items():
        if parameter == "lm_head.weight" and config.tie_word_embeddings:
            continue
        old, parts = next((pair for pair in _RENAMED.items() if pair[0] in parameter), ("", ("",)))
        for part in parts:
            name = names.get_name(parameter.replace(old, part), try_suffixes=(".weight", ".bias"))
            assert name is not None, f"GGUF has no name for {parameter}"
            yield name, _shape(name, (tensor.shape[0] // len(parts), *tensor.shape[1:]), arch, config)


def _shape(name: str, shape: tuple[int, ...], arch: gguf.MODEL_ARCH, config: PretrainedConfig) -> tuple[int, ...]:
    """Return a tensor's shape in the file."""
    if len(shape) == 3:  # a depthwise convolution
        return shape[0], shape[2]
    if arch in (gguf.MODEL_ARCH.MAMBA2, gguf.MODEL_ARCH.GRANITE_HYBRID):
        if name.endswith(("ssm_a", "ssm_d")):
            return *shape, 1
        if name.endswith("ssm_norm.weight"):
            groups = config.n_groups if arch is gguf.MODEL_ARCH.MAMBA2 else config.mamba_n_groups
            return groups, shape[0] // groups
    return shape


def _kind(name: str, shape: tuple[int, ...], *, tied: bool) -> Kind:
    """Return the type that llama-quantize gives a tensor of a Q4_0 file."""
    if len(shape) < 2 or not name.endswith("weight") or re.search("_norm.weight|ssm_conv1d|shortconv.conv.", name):
        return Kind.F32
    if name == ("token_embd.weight" if tied else "output.weight"):
        return Kind.Q8_0 if shape[1] % 256 else Kind.Q6_K
    return Kind.F16 if shape[1] % 32 else Kind.Q4_0


def _values(numbers: np.random.Generator, name: str, shape: tuple[int, ...], kind: Kind) -> np.ndarray:
    """Return random values: norms are 1, decays negative, and weights small."""
    if kind in _SCALES:
        return random_blocks(numbers, shape, kind, _SCALES[kind])
    if name.endswith("norm.weight"):
        return np.ones(shape, np.float32)
    values = numbers.standard_normal(shape, np.float32)
    if name.endswith("ssm_a"):
        return -np.exp(values)
    return (_STD * values).astype(np.float16 if kind is Kind.F16 else np.float32)


def random_blocks(
    numbers: np.random.Generator, shape: tuple[int, ...], kind: Kind, *scales: tuple[int, float]
) -> np.ndarray:
    """Return random codes in a type of GGUF, as bytes; ``scales`` are places in a block and the float16 there."""
    per_block, size = gguf.GGML_QUANT_SIZES[kind]
    blocks = numbers.integers(0, 256, (*shape[:-1], shape[-1] // per_block, size), dtype=np.uint8)
    for first, scale in scales:
        blocks[..., first : first + 2].view(np.float16)[...] = scale
    return blocks.reshape(*shape[:-1], -1)


if __name__ == "__main__":
    name, file = sys.argv[1:]
    write(Path(file), sizes(name))
