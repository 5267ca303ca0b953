"""Loading of folders that ``save_quantized`` wrote."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from klfast.acceleration.patch import accelerate_or_warn
from klfast.checkpoint import expert_files
from klfast.checkpoint.compressed_tensors import read_specs, with_corrected
from klfast.checkpoint.manifest import (
    read_corrected,
    read_layer_facts,
    read_manifest,
    read_projections,
    read_roundings,
    verified,
)
from klfast.checkpoint.tensors import Facts, Tensors, empty_model, fill, initialise_buffers
from klfast.checkpoint.transformers_view import tell_transformers
from klfast.core.io import recover, require_utf8
from klfast.core.placement import as_device, as_dtype
from klfast.models.expert_names import expert_in
from klfast.models.matrices import split_stacks
from klfast.quant.spec import QuantSpec

_NOTHING: Mapping[str, Any] = MappingProxyType({})


def load_quantized(
    directory: str | os.PathLike[str],
    device: torch.device | str = "cpu",
    dtype: torch.dtype | str | None = None,
    *,
    verify: bool = True,
) -> nn.Module:
    """Load a model saved by ``save_quantized``, in evaluation mode.

    The model is built without memory, then each tensor is read when its place is filled: the full-precision weight of a
    quantized layer never exists. Nothing is unpickled and no code from the folder runs.

    On the CPU, packed weights stay where they are mapped from the files: they are in memory once, and processes share
    them. Do not change these files in place while a model uses them; ``save_quantized`` puts new ones in their place.

    Args:
        directory: the folder.
        device: the tensors' device.
        dtype: float32, bfloat16 or float16 for unquantized tensors (scales stay as they are), by name or as torch's
            dtypes; None or "auto" for the saved model's.
        verify: compare each file's SHA-256 with the saved one.

    Returns:
        The transformers model, with QuantLinear layers and klfast's native SSM functions (``klfast.accelerate``); its
        parameters do not require gradients.

    Raises:
        InvalidInputError: another dtype; no such device.
        KernelUnavailableError: torch finds no device of that kind.
        CheckpointError: a file or tensor is missing, superfluous, truncated or altered, or ``save_quantized`` did not
            write the folder.
    """
    asked = as_dtype("auto" if dtype is None else dtype)
    target = None if asked == "auto" else asked
    place = as_device(device)
    folder = Path(directory)
    require_utf8(folder)
    recover(folder)
    manifest = read_manifest(folder, verify=False)
    with verified(folder, manifest) if verify else nullcontext():  # much of the time, transformers is imported
        facts, roundings = read_layer_facts(folder, manifest), read_roundings(folder, manifest)
        tensors = Tensors.of_files(
            folder, [name for name in manifest["files"] if name.endswith(".safetensors")], place, target
        )
        specs = expert_files.join(tensors, read_specs(folder), read_projections(folder, manifest))
        specs = with_corrected(specs, read_corrected(folder, manifest))
        model = empty_model(folder, target, len(tensors.names()))
    filled(model, tensors, place, specs, facts)
    split = split_stacks(model)
    for name in specs:
        if (of := expert_in(name)) and of[0] in split:
            split[of[0]].roundings[of[1]] = roundings[name]
        else:
            layer: Any = model.get_submodule(name)
            layer.rounding = roundings[name]
    return model


def filled(
    model: nn.Module,
    tensors: Tensors,
    device: torch.device,
    specs: Mapping[str, QuantSpec] = _NOTHING,
    facts: Facts = _NOTHING,
) -> nn.Module:
    """Fill an empty model as ``tensors.fill`` does, compute its other buffers and accelerate it, for evaluation.

    A model without quantized layers can be trained.
    """
    fill(model, tensors, specs, facts)
    initialise_buffers(model, device)
    if specs:
        tell_transformers(model)
    else:
        model.requires_grad_()
    return accelerate_or_warn(model.eval())
