"""Loading of models and tokenizers by name: a bundled model, a local folder or file, or a hub id."""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from klfast.acceleration.patch import accelerate_or_warn
from klfast.checkpoint.gguf.load import gguf_weights, load_gguf
from klfast.checkpoint.gguf.tokenizer import read_tokenizer
from klfast.checkpoint.json_files import read_generation_config
from klfast.checkpoint.loading_errors import one_line_errors
from klfast.checkpoint.mamba_ssm_folder import load_mamba_ssm
from klfast.checkpoint.manifest import MANIFEST, read_manifest
from klfast.checkpoint.model_config import bounded, check_config, register_own
from klfast.checkpoint.model_folder import (
    TOKENIZERS,
    check_explicit_file,
    is_mamba_ssm,
    read_config,
    read_headers,
    require_known,
)
from klfast.checkpoint.packed_folder import packed_or_refused
from klfast.checkpoint.rescaling import as_stored
from klfast.checkpoint.sources import gguf_file, resolve
from klfast.checkpoint.tokenizer_size import warn_beyond
from klfast.core.bundled import ASSETS, bundled_models
from klfast.core.errors import CheckpointError
from klfast.core.io import parse_json
from klfast.core.placement import DTYPES, as_device, as_dtype
from klfast.nn import QuantLinear

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["ASSETS", "DTYPES", "as_dtype", "bundled_models", "find_tokenizer", "load_model", "load_tokenizer"]

# Name endings of the tensors of a quantized weight: GPTQ and AWQ, compressed-tensors, bitsandbytes, mlx.
_PACKED = (".qweight", ".qzeros", ".weight_packed", ".absmax", ".weight.quant_map", ".scales")


def load_model(
    name_or_path: str | os.PathLike[str],
    dtype: str | torch.dtype = "float32",
    *,
    device: torch.device | str = "cpu",
    local_files_only: bool = False,
    trust_remote_code: bool = False,
    gguf: str = "int8-g32-asym",
) -> nn.Module:
    """Load a causal language model in evaluation mode, with klfast's native SSM functions (``klfast.accelerate``).

    Args:
        name_or_path: the name of a bundled model ("hymba", "mamba", "mamba2"; write "./mamba2" for a folder of that
            name), a local folder, a GGUF file, or a hub id (of a GGUF file: owner/name/file.gguf). A folder written by
            ``klfast.save_quantized`` gives the quantized model, and so does one in the format ``pack-quantized`` of
            compressed-tensors (W4A16, W8A16; it takes that package). Mamba and Mamba-2 may be in the format of the
            package mamba_ssm.
        dtype: "float32", "bfloat16", "float16", also as torch's dtypes, or "auto" for the stored one (of a quantized
            GGUF file: float32). The unquantized tensors of a quantized folder are cast likewise.
        device: the model's device, such as "cpu", "cuda" or "xpu".
        local_files_only: look up a hub id only in the local cache.
        trust_remote_code: run Python code that comes with the model. Only for sources that you trust.
        gguf: how to hold the quantized matrices of a GGUF file. Layers that a format of klfast holds as they are stay
            so (Q4_0, Q5_0, Q6_K, Q8_0 and IQ4_NL); the others are quantized anew to this spec, which one warning
            counts. "exact" rounds no number again: it expands the others to ``dtype``. "dense" expands all, for sweeps
            and plans.

    Raises:
        InvalidInputError: an unknown dtype or device, no such folder; the package that reads the format (gguf,
            compressed-tensors) is missing.
        KernelUnavailableError: PyTorch finds no such device.
        CheckpointError: a file is missing, truncated or does not fit the model; there is no causal language model that
            transformers knows, or no safetensors; a weight is stored as integers; the hub cannot be reached.
    """
    target, place = as_dtype(dtype), as_device(device)
    weights = gguf_weights(gguf)
    if (file := gguf_file(name_or_path, local_files_only=local_files_only)) is not None:
        return load_gguf(file, target, place, weights)
    folder = resolve(name_or_path, weights=True, local_files_only=local_files_only, trust_remote_code=trust_remote_code)
    source, config = str(folder), read_config(folder)
    if is_mamba_ssm(config):
        return load_mamba_ssm(folder, config, target, place)
    quantization = config.get("quantization_config")
    quantization = quantization if isinstance(quantization, dict) else {}
    packed = quantization.get("format") == "pack-quantized"
    if packed and (folder / MANIFEST).is_file():
        from klfast.checkpoint.load import load_quantized

        return load_quantized(folder, place, None if target == "auto" else target)

    from transformers import AutoModelForCausalLM, GenerationConfig

    register_own(config)
    if not (trust_remote_code and "auto_map" in config):
        require_known(config, source)
    check_explicit_file(config, folder)
    stored = read_headers(folder)
    check_config(config, folder / "config.json", len(stored))
    read_generation_config(folder, GenerationConfig)
    quantized_by = str(quantization.get("quant_method", "another tool")) if quantization else None
    with (
        packed_or_refused(folder) if packed else nullcontext(),
        one_line_errors(source, "model", quantized_by),
        bounded(folder / "config.json", len(stored)),
    ):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source,
            dtype=target,
            use_safetensors=True,
            local_files_only=local_files_only,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # _require_all_tensors names them
            **as_stored(config),
        )
    model, report = loaded
    _require_all_tensors(source, model, report, stored)
    if not quantization:  # other quantizers store integers by design
        _check_stored_dtypes(model, stored)
    if packed:
        model.requires_grad_(False)
    return accelerate_or_warn(model.eval().to(place))


def find_tokenizer(
    name_or_path: str | os.PathLike[str], *, local_files_only: bool = False, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase | None:
    """Load a model's tokenizer as ``load_tokenizer`` does, but return None for a model without one."""
    from transformers import AutoTokenizer

    if (file := gguf_file(name_or_path, local_files_only=local_files_only)) is not None:
        with one_line_errors(str(file), "tokenizer"):
            return _usable(read_tokenizer(file), file)
    folder = resolve(
        name_or_path, weights=False, local_files_only=local_files_only, trust_remote_code=trust_remote_code
    )
    if not any((folder / name).is_file() for name in TOKENIZERS):
        return None
    if (folder / MANIFEST).is_file():
        read_manifest(folder, verify=True, weights=False)
    with one_line_errors(str(folder), "tokenizer"):
        config: Any = parse_json((folder / "config.json").read_bytes())
        register_own(config)  # AutoTokenizer may use AutoConfig
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            str(folder), local_files_only=local_files_only, trust_remote_code=trust_remote_code
        )
        found = _usable(tokenizer, folder / "tokenizer_config.json")
    if found is not None:
        warn_beyond(found, config, folder)
    return found


def _usable(tokenizer: PreTrainedTokenizerBase | None, path: Path) -> PreTrainedTokenizerBase | None:
    """Return a tokenizer, from ``path``; raise if its settings are damaged."""
    if tokenizer is not None:
        longest = tokenizer.model_max_length
        if isinstance(longest, bool) or not isinstance(longest, (int, float)) or not longest > 0:
            raise CheckpointError(
                f"{path}: model_max_length must be a positive number, got {longest!r}; fetch or save it again"
            )
        tokenizer.decode(tokenizer("A first text.")["input_ids"])  # some damage shows only here
    return tokenizer


def load_tokenizer(
    name_or_path: str | os.PathLike[str], *, local_files_only: bool = False, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """Load a model's tokenizer; arguments and errors as for ``load_model``.

    In a folder of ``klfast.save_quantized``, every file except the weights is compared with its digest first.
    """
    tokenizer = find_tokenizer(name_or_path, local_files_only=local_files_only, trust_remote_code=trust_remote_code)
    if tokenizer is None:
        raise CheckpointError(f"{os.fspath(name_or_path)} has no tokenizer; copy the model's tokenizer files into it")
    return tokenizer


def _require_all_tensors(source: str, model: nn.Module, report: dict[str, Any], stored: Iterable[str]) -> None:
    """Raise CheckpointError, naming a tensor, unless the files hold all of the model's: transformers invents others."""
    runs_packed = any(isinstance(module, QuantLinear) for module in model.modules())
    packed = [name for name in stored if name.endswith(_PACKED) and not runs_packed]
    if packed and (report["mismatched_keys"] or report["missing_keys"]):
        reason = f"{source} holds weights that another tool has quantized, such as {packed[0]}"
        raise CheckpointError(f"{reason}; load the full-precision model instead")
    if mismatched := sorted(report["mismatched_keys"]):
        name, found, expected = mismatched[0]
        raise CheckpointError(
            f"{source}: {name} must have shape {list(expected)}, got {list(found)}; fetch or save it again"
        )
    if missing := sorted(report["missing_keys"]):
        raise CheckpointError(
            f"{source} lacks {len(missing)} of the model's tensors, such as {missing[0]}; fetch or save it again"
        )
    unexpected = sorted(report["unexpected_keys"])
    if unexpected and type(model).__module__.startswith("klfast."):  # other families' files have harmless ones
        reason = f"holds {len(unexpected)} tensors that the model does not have, such as {unexpected[0]}"
        raise CheckpointError(f"{source} {reason}; fetch or save it again")


def _check_stored_dtypes(model: nn.Module, stored: dict[str, tuple[Path, str]]) -> None:
    """Raise CheckpointError if a float tensor of the model is stored as integers, which transformers would cast."""
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    floats = {name.removeprefix(prefix) for name, tensor in model.state_dict().items() if tensor.is_floating_point()}
    for name, (file, dtype) in stored.items():
        if name.removeprefix(prefix) in floats and dtype not in ("F64", "F32", "BF16", "F16"):
            reason = f"{file} stores {name} as {dtype}, but the model has floating-point numbers"
            raise CheckpointError(f"{reason}; fetch it again, or save the model with float weights")
