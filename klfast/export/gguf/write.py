"""A model as a GGUF file."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import nn

from klfast import __version__
from klfast.core.errors import InvalidInputError
from klfast.core.io import file_atomic
from klfast.export.gguf.blocks import ROUNDING
from klfast.export.gguf.contents import Content, architecture_of, contents
from klfast.export.gguf.tokenizer import write_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Written:
    """What a file holds.

    Attributes:
        architecture: llama.cpp's name of the family.
        kinds: how many tensors have each type.
        notes: what differs from the model, a sentence each.
    """

    architecture: str
    kinds: dict[str, int]
    notes: tuple[str, ...]


def export_gguf(
    model: nn.Module,
    path: str | os.PathLike[str],
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    name: str | None = None,
    regroup: bool = False,
    pre_tokenizer: str | None = None,
) -> Written:
    """Write a model as a GGUF file for llama.cpp, quantized layers with their own codes.

    The file appears under its name only when it is complete; an existing one is replaced. Layers in int4 become Q4_0
    (with zero points Q4_1), in int6 and int8 Q8_0. No code is rounded again; scales are float16, as they are, and a
    group of 64 or 128 has its scale in each of its blocks of 32. Other matrices keep their 16 bits, or are F32.

    Args:
        model: of a family that llama.cpp has, on the CPU.
        path: the file.
        tokenizer: of transformers, with a BPE; without one the file has no vocabulary, only token ids.
        name: the model's name in the metadata.
        regroup: round layers anew, to Q4_0 or Q8_0, whose groups no type of GGUF has; else they are an error.
        pre_tokenizer: llama.cpp's name of the tokenizer's way to split text, if klfast does not know it.

    Raises:
        InvalidInputError: the package gguf is missing; llama.cpp lacks the family or has no place for a tensor; no type
            holds a layer's groups; the tokenizer cannot be said in GGUF.
        OSError: the file cannot be written. Nothing is left behind.
    """
    require_package()
    import gguf

    config: Any = model.config
    architecture = architecture_of(model)
    found = contents(model, architecture, regroup=regroup)
    with file_atomic(path) as beside:
        writer = gguf.GGUFWriter(beside, architecture.name)
        try:
            if name is not None:
                writer.add_name(name)
            writer.add_quantized_by(f"klfast {__version__}")
            writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
            writer.add_file_type(_file_type(found))
            architecture.describe(writer, config, {one.name: one.shape for one in found})
            notes = write_tokenizer(writer, tokenizer, model, pre_tokenizer)
            _write_tensors(writer, found)
        finally:
            writer.close()
    remark = architecture.remark(config)
    notes = [*_notes(found), *notes, *([] if remark is None else [remark])]
    return Written(architecture.name, dict(Counter(one.kind for one in found)), tuple(notes))


def require_package() -> None:
    """Raise InvalidInputError if the package gguf is missing."""
    try:
        import gguf  # noqa: F401
    except ImportError:
        raise InvalidInputError(
            "GGUF files need the package gguf, which is not installed: pip install 'klfast[gguf]'"
        ) from None


def _write_tensors(writer: Any, found: list[Content]) -> None:
    """Write header, metadata and tensors, which are encoded one at a time."""
    import gguf

    for one in found:
        kind = gguf.GGMLQuantizationType[one.kind]
        per_block, size = gguf.GGML_QUANT_SIZES[kind]
        count = int(np.prod(one.shape)) // per_block * size
        writer.add_tensor_info(one.name, one.shape, np.dtype(np.float32), count, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for one in found:
        writer.write_tensor_data(one.data())


def _file_type(found: list[Content]) -> int:
    """Return what most weights are, which llama.cpp only shows."""
    import gguf

    sizes: Counter[str] = Counter()
    for one in found:
        sizes[one.kind] += int(np.prod(one.shape))
    kind = sizes.most_common(1)[0][0]
    return int(gguf.LlamaFileType["ALL_F32" if kind == "F32" else f"MOSTLY_{kind}"])


def _notes(found: list[Content]) -> list[str]:
    """Say which layers have other numbers, or more bits, than the plan's, and whose scales are coarser."""
    groups: dict[tuple[str, str], list[str]] = {}
    for one in found:
        if one.anew:
            groups.setdefault((one.anew, one.kind), []).append(one.layer)
    return [
        f"{_counted(layers)} with {why} {'is' if len(layers) == 1 else 'are'} "
        + (kind if kind == "F16" else f"rounded anew to {kind}")
        for (why, kind), layers in groups.items()
    ] + _notes_of_scales(found)


def _notes_of_scales(found: list[Content]) -> list[str]:
    losses = {one.layer: one.scale_loss for one in found}
    coarser = {layer: loss for layer, loss in losses.items() if loss > ROUNDING}
    if not coarser:
        return []
    most = f"{max(coarser.values()):.2g} of its norm"
    return [
        f"{_counted(list(coarser))}: scales are below float16's normal numbers, which changes a row by up to {most}"
    ]


def _counted(layers: list[str]) -> str:
    """Return one layer's name, or the number of several with the first of them."""
    return layers[0] if len(layers) == 1 else f"{len(layers)} layers ({layers[0]} ...)"
