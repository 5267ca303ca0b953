"""Saving of quantized models in the ``pack-quantized`` format of compressed-tensors."""

from __future__ import annotations

import copy
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn

from klfast import __version__
from klfast.checkpoint import expert_files
from klfast.checkpoint.compressed_tensors import model_quantization_config, quantized_layers
from klfast.checkpoint.manifest import MANIFEST, write_manifest
from klfast.checkpoint.rescaling import as_stored
from klfast.checkpoint.tensors import Tensors, empty_model, fill, initialise_buffers, set_tied_in_config, tied_places
from klfast.checkpoint.transformers_view import describes_transformers, not_transformers
from klfast.core.dtypes import dtype_name
from klfast.core.errors import CheckpointError, InvalidInputError
from klfast.core.io import folder_atomic, recover, require_utf8, require_writable, write_atomic
from klfast.models.families import text_config
from klfast.models.head import is_head_tied
from klfast.nn import QuantLinear

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class _Saves(Protocol):
    def save_pretrained(self, folder: Path, /) -> object: ...


def save_quantized(
    model: nn.Module,
    directory: str | os.PathLike[str],
    tokenizer: _Saves | None = None,
    *,
    overwrite: bool = False,
    max_shard_size: int | str = "5GB",
) -> None:
    """Save a model with QuantLinear layers or QuantExperts.

    The folder contains config.json, model.safetensors (or shards of it and their index), generation_config.json, the
    tokenizer's files and klfast.json (digests of all of these; files may be added later, but none of these altered). It
    appears under its name only when it is complete. ``load_quantized`` restores it bit for bit: models that it could
    not read are refused before anything is written. A weight that the model ties is stored once, one that merely
    happens to be shared under each of its names; config.json records whether the head is tied in memory.

    Other readers: the compressed-tensors package (0.20) decompresses each layer bit for bit as
    ``QuantizedTensor.dequantize`` does, and loads whole models. ``from_pretrained`` of transformers reads every folder
    once klfast is imported (``klfast.register_quantizer``). Alone (5.23) it reads symmetric specs, but not asymmetric
    ones, nor a Mamba with a quantized out_proj or dt_proj, whose missing ``.weight`` its initialisers touch. A
    quantized head that is tied to the input embedding is stored once, under the head's name: without klfast, readers
    miss the embedding. For a folder that other software is to serve, leave the head out of the plan, or untie it before
    quantizing: the embedding is then stored in full, too. GPT-2's Conv1D are stored as linear layers, [out, in]:
    without klfast, transformers leaves random weights in their places, with a report.

    Experts are stored matrix by matrix (``experts.0.gate_proj`` ...), as in published checkpoints. Without klfast,
    transformers reads them, into dense weights, if all experts of the model have symmetric specs of as many bits. Those
    of Granite-4.0-H, whose checkpoints hold them stacked, are stored so, which only klfast reads; where the experts of
    a stack have different precisions, only klfast reads them, and with ``load_quantized`` alone.

    Args:
        model: from ``klfast.quantize_model`` or ``klfast.load_quantized``.
        directory: the folder to create; its parent must exist.
        tokenizer: anything with ``save_pretrained``.
        overwrite: replace the folder if ``save_quantized`` wrote it.
        max_shard_size: bytes, or text such as "5GB".

    Raises:
        InvalidInputError: nothing is quantized, the format cannot store a layer's groups, the folder exists, tensors
            are on the meta device, or the configuration does not describe the model.
        OSError: the folder cannot be written, or the disk is full. Nothing is left behind.
    """
    layers = quantized_layers(model)
    target = Path(directory).resolve()
    require_target(target, overwrite)
    _require_numbers(model)
    described = cast("PreTrainedModel", model)
    if not describes_transformers(described.config):
        raise InvalidInputError(not_transformers(model))
    config: Any = copy.deepcopy(described.config)
    split_as = expert_files.saved_as(model, layers)
    described_as: Any = model_quantization_config(model, expert_files.targets(model, layers, split_as))
    described_as["ignore"] += expert_files.ignored(model, split_as)
    config.quantization_config = described_as
    config.architectures = [type(model).__name__]
    config.update(as_stored(config.to_dict()))
    config.dtype = dtype_name(described.dtype)
    set_tied_in_config(config, is_head_tied(model))
    facts = {name: _facts(module) for name, module in layers.items()}
    with folder_atomic(target) as folder:
        save_settings(config, "config", folder)
        stored = _readable_state(model, layers, folder)
        _write_tensors(expert_files.split(model, stored, layers, split_as), folder, max_shard_size)
        generation_config: _Saves | None = getattr(model, "generation_config", None)
        if generation_config is not None:
            save_settings(generation_config, "generation_config", folder)
        if tokenizer is not None:
            save_tokenizer(tokenizer, folder)
        more = {"experts": split_as} if split_as else {}
        write_manifest(folder, klfast_version=__version__, torch_version=torch.__version__, layers=facts, **more)


def _facts(layer: QuantLinear) -> dict[str, object]:
    """Return what klfast.json says of a layer."""
    return {
        "dtype": dtype_name(layer.dtype),
        "activation": layer.activation,
        "rounding": layer.rounding,
        **({"corrected": layer.spec.corrected} if layer.spec.corrected else {}),
    }


def _require_numbers(model: nn.Module) -> None:
    for name, tensor in model.state_dict(keep_vars=True).items():
        if not isinstance(tensor, torch.Tensor):
            raise InvalidInputError(
                f"{name} of the model is a {type(tensor).__name__}, which the file format cannot hold"
            )
        if tensor.is_meta:
            raise InvalidInputError(
                f"{name} is on the meta device and has no values; load the weights, or undo the offloading, first"
            )


def save_settings(settings: _Saves, what: str, folder: Path) -> None:
    """Write config.json or generation_config.json."""
    try:
        settings.save_pretrained(folder)
    except OSError:
        raise
    except Exception as error:  # transformers checks some settings only when they are saved
        reason = " ".join(str(error).split())
        raise InvalidInputError(
            f"transformers refuses to save model.{what} ({reason}); correct it and save again"
        ) from error


def save_tokenizer(tokenizer: _Saves, folder: Path) -> None:
    """Write a tokenizer's files."""
    with _in_rust(folder):
        tokenizer.save_pretrained(folder)


@contextmanager
def _in_rust(path: Path) -> Iterator[None]:
    """Raise OSError for errors of the system that safetensors and tokenizers only mention in their own."""
    try:
        yield
    except Exception as error:
        if code := re.search(r"\(os error (\d+)\)", str(error)):
            raise OSError(int(code[1]), os.strerror(int(code[1])), str(path)) from error
        raise


def _readable_state(model: nn.Module, layers: Mapping[str, QuantLinear], folder: Path) -> dict[str, torch.Tensor]:
    """Return the tensors to store, from which the model in the folder's config.json is rebuilt.

    Raises:
        InvalidInputError: ``load_quantized`` could not rebuild this model.
    """
    state = expert_files.one_by_one(model, model.state_dict(), layers)
    try:
        built = empty_model(folder, None, len(state))
        stored = _without_tied(state, tied_places(built), layers)
        specs = {name: module.spec for name, module in layers.items()}
        dtypes = {name: (module.dtype, module.activation) for name, module in layers.items()}
        fill(built, Tensors(folder, {name: _shadow(name, tensor) for name, tensor in stored.items()}), specs, dtypes)
        initialise_buffers(built, torch.device("cpu"))
    except CheckpointError as error:
        if text_config(model) is not model.config:
            raise InvalidInputError(
                f"{type(model).__name__} is more than a language model, and folders hold quantized only that; quantize "
                "and save the one that klfast.load_model reads from the same folder"
            ) from error
        reason = str(error).removesuffix("; save the model again").replace(str(folder), folder.name.split(".")[1])
        raise InvalidInputError(
            f"the saved model could not be loaded, since its configuration does not describe it ({reason})"
        ) from error
    modules: dict[str, Any] = dict(built.named_modules(remove_duplicate=False))
    for name, module in layers.items():
        if name in modules and modules[name].activation != module.activation:
            raise InvalidInputError(
                f"{name} shares its weight with a layer whose activation differs; give both the same"
            )
    return stored


def _shadow(name: str, tensor: torch.Tensor) -> Callable[[], torch.Tensor]:
    """Return a reader of only a tensor's shape and dtype, and of weight_shape's values, which are compared."""
    return lambda: tensor.cpu() if name.endswith(".weight_shape") else torch.empty_like(tensor, device="meta")


def _without_tied(
    state: dict[str, torch.Tensor],
    places: Mapping[int, list[tuple[str, nn.Module, str]]],
    layers: Mapping[str, QuantLinear],
) -> dict[str, torch.Tensor]:
    """Return the model's state, with weights that both the model and the rebuilt one share included only once."""
    left_out: set[str] = set()
    for names in ([name for name, _, _ in same] for same in places.values() if len(same) > 1):
        quantized = [name.removesuffix(".weight") for name in names if name.removesuffix(".weight") in layers]
        parts = ((name, tuple(map(_memory, layers[name].quantized.parts))) for name in quantized)
        for _, *others in _same(parts):
            left_out.update(f"{name}.{part}" for name in others for part in (*layers[name].part_names, "weight_shape"))
        for _, *others in _same((name, _memory(state[name])) for name in names if name in state):
            left_out.update(others)
    return {name: tensor for name, tensor in state.items() if name not in left_out}


def _same(keyed: Iterable[tuple[str, tuple[object, ...]]]) -> list[list[str]]:
    """Group names by key."""
    found: dict[tuple[object, ...], list[str]] = {}
    for name, key in keyed:
        found.setdefault(key, []).append(name)
    return list(found.values())


def _memory(tensor: torch.Tensor) -> tuple[object, ...]:
    """Return a key that is equal for two tensors with the same values in the same memory."""
    where = tensor.untyped_storage().data_ptr() if tensor.numel() else 0
    return tensor.device, where, tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype


def _separate(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return each tensor contiguous and in its own storage, as safetensors requires; copied only if necessary."""
    separate: dict[str, torch.Tensor] = {}
    taken: set[int] = set()
    for name, tensor in tensors.items():
        plain = tensor.detach().resolve_conj().resolve_neg().contiguous()
        where = plain.untyped_storage().data_ptr()
        separate[name] = plain.clone() if where in taken else plain
        taken.add(where)
    return separate


def _write_tensors(tensors: dict[str, torch.Tensor], folder: Path, max_shard_size: int | str) -> None:
    """Write model.safetensors, or shards and their index."""
    from huggingface_hub import split_torch_state_dict_into_shards

    tensors = _separate(tensors)
    try:
        split = split_torch_state_dict_into_shards(tensors, max_shard_size=max_shard_size)
    except (ValueError, TypeError, ZeroDivisionError) as error:
        raise InvalidInputError(
            f'max_shard_size must be bytes or text such as "5GB", got {max_shard_size!r} ({error})'
        ) from error
    for file, names in split.filename_to_tensors.items():
        try:
            with _in_rust(folder / file):
                save_file({name: tensors[name] for name in names}, folder / file, metadata={"format": "pt"})
        except SafetensorError as error:
            raise CheckpointError(f"the weights cannot be written ({' '.join(str(error).split())})") from error
        shutil.copymode(folder / "config.json", folder / file)  # safetensors creates private files
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        write_atomic(folder / "model.safetensors.index.json", json.dumps(index, indent=1))


def require_target(
    directory: str | os.PathLike[str], overwrite: bool, *, writer: str = "save_quantized", mark: str = MANIFEST
) -> None:
    """Raise, before the work begins, unless ``writer`` can create the folder and is allowed to.

    ``mark`` names a file of the folders that it wrote.

    Raises:
        InvalidInputError, OSError: as for ``save_quantized``.
    """
    target = Path(directory).resolve()
    require_utf8(target)
    if not target.parent.is_dir():
        raise InvalidInputError(f"there is no folder {target.parent} to save into; create it first")
    if target.exists() and not target.is_dir():
        raise InvalidInputError(f"{target} is a file; name a folder")
    recover(target)
    if target.is_dir() and any(target.iterdir()):
        if not (target / mark).is_file():
            raise InvalidInputError(f"{target} holds something that {writer} did not write; name another folder")
        if not overwrite:
            raise InvalidInputError(f"{target} contains a saved model; name another folder or pass overwrite=True")
    require_writable(target, folder=True)
