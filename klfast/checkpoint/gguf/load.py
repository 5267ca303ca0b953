"""Loading of GGUF files: configuration, names and order by transformers, the numbers in klfast's formats."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal, cast

import torch
from torch import nn

from klfast.checkpoint.gguf.file import GgufFile
from klfast.checkpoint.gguf.source import REMEDY, Source, Weights
from klfast.checkpoint.load import filled
from klfast.checkpoint.loading_errors import first_sentence, one_line_errors
from klfast.checkpoint.model_config import check_config
from klfast.checkpoint.model_folder import require_known
from klfast.checkpoint.tensors import build_empty, buildable
from klfast.core.errors import CheckpointError, InvalidInputError
from klfast.quant.spec import QuantSpec

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def gguf_weights(text: str) -> Weights:
    """Return what the argument ``gguf`` of ``klfast.load_model`` asks for; raise InvalidInputError for nonsense."""
    if text in ("exact", "dense"):
        return cast(Weights, text)
    try:
        return QuantSpec.parse(text)
    except InvalidInputError:
        raise InvalidInputError(
            f'gguf must be "exact", "dense" or a spec such as "int8-g32-asym", got {text!r}'
        ) from None


def load_gguf(path: Path, dtype: torch.dtype | Literal["auto"], device: torch.device, weights: Weights) -> nn.Module:
    """Load the causal language model of a GGUF file, in evaluation mode, as ``klfast.load_model`` describes it."""
    file = GgufFile(path)
    with one_line_errors(str(path), "model"):
        config = _config(file)
        require_known(config.to_dict(), str(path))
        target = file.dtype if dtype == "auto" else dtype
        with buildable(path, REMEDY):
            model = build_empty(config, path, target, len(file.tensors))
        source = Source(file, model, target, weights)
        source.warn()
        facts = dict.fromkeys(source.specs, (target, "exact"))
        return filled(model, source.tensors(device), device, source.specs, facts)


def _config(file: GgufFile) -> PretrainedConfig:
    """Return transformers' configuration for a file, with the tokens at which its text begins and ends."""
    from transformers import AutoConfig, __version__

    name = file.architecture
    check_config({"layers": file.metadata.get(f"{name}.block_count")}, file.path, len(file.tensors))
    try:
        config = AutoConfig.from_pretrained(file.path.parent, gguf_file=file.path.name, local_files_only=True)
    except Exception as error:  # transformers may raise anything
        raise CheckpointError(
            f"{file.path}: transformers {__version__} finds no model in its metadata, architecture {name!r} "
            f"({first_sentence(str(error)) or type(error).__name__}); load the original model's folder instead"
        ) from error
    if file.metadata.get(f"{name}.ssm.dt_b_c_rms"):  # the mark of FalconMamba, which transformers does not look at
        config = AutoConfig.for_model(**config.to_dict() | {"model_type": "falcon_mamba"})
    tokens = {
        role: found
        for role in ("bos", "eos", "eot", "eom", "padding")
        if (found := file.metadata.get(f"tokenizer.ggml.{role}_token_id")) is not None
    }
    ends = list(dict.fromkeys(tokens[role] for role in ("eos", "eot", "eom") if role in tokens))
    config.bos_token_id, config.pad_token_id = tokens.get("bos"), tokens.get("padding")
    config.eos_token_id = ends if ends[1:] else ends[0] if ends else None
    return config
