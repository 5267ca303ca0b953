"""GGUF files with random weights, of the sizes of a transformers model, for llama.cpp.

Names, shapes and metadata are those of ``klfast export``. Types are those that llama-quantize picks for Q4_0
(src/llama-quant.cpp of llama-cpp-python 0.3.36): the head, or the embedding that serves as one, is Q6_K.

``python -m bench.gguf_models qwen3.5-0.8b FILE`` writes one.
"""

from __future__ import annotations

import atexit
import functools
import re
import shutil
import sys
import tempfile
from pathlib import Path

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind
from gguf import GGUFWriter
from torch import nn

from klfast.benchkit.runner import UnavailableError
from klfast.core.errors import InvalidInputError
from klfast.export.gguf.contents import architecture_of, contents

from . import models

_STD = 0.02  # of the weights
# Where a block has its scale (float16), and the one that gives random codes this standard deviation.
_SCALES = {Kind.Q4_0: (0, _STD / 4.6), Kind.Q8_0: (0, _STD / 74), Kind.Q6_K: (208, _STD / (18.5 * 74))}


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
    try:
        architecture = architecture_of(model)
        shapes = {one.name: one.shape for one in contents(model, architecture)}
    except InvalidInputError as error:
        raise UnavailableError(str(error)) from None
    writer = GGUFWriter(path, architecture.name)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_0)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_tokenizer_model("none")
    writer.add_token_list([str(token) for token in range(config.vocab_size)])  # transformers counts them
    architecture.describe(writer, config, shapes)
    numbers = np.random.default_rng(0)
    for name, shape in shapes.items():
        kind = _kind(name, shape, tied="output.weight" not in shapes)
        writer.add_tensor(name, _values(numbers, name, shape, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


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
