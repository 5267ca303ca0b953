"""What stands in a saved folder beside the tensors: compressed-tensors' ``quantization_config`` and klfast's manifest.

config.json's ``quantization_config`` follows the ``pack-quantized`` format of the compressed-tensors package: one config
group for each distinct spec, its targets the full names of the layers. klfast.json holds what the format cannot say
(the dtype that each layer's weight had, how its activations are treated) and the size and SHA-256 of each file.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePath

import torch
from torch import nn

from klfast.core.dtypes import dtype_name
from klfast.core.errors import CheckpointError, InvalidInputError, shortened
from klfast.core.io import parse_json, write_atomic
from klfast.nn import QuantLinear
from klfast.quant.types import QuantSpec, storable_spec

MANIFEST = "klfast.json"
FORMAT_VERSION = 1
_DTYPES = {dtype_name(dtype): dtype for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16)}
_ACTIVATIONS = ("exact", "int8")


def quantization_config(layers: Mapping[str, tuple[QuantSpec, int]], unquantized: Iterable[str]) -> dict[str, object]:
    """The ``quantization_config`` of a model.

    Args:
        layers: spec and in_features of each quantized layer, by name.
        unquantized: names of the linear layers left alone.

    Raises:
        InvalidInputError: a layer whose groups the format cannot store.
    """
    groups: dict[QuantSpec, list[str]] = {}
    for name, (spec, in_features) in layers.items():
        stored = storable_spec(spec, in_features)
        if stored.group_length(in_features) != spec.group_length(in_features):
            raise InvalidInputError(
                f"{name}: the file format has no shorter last group, which {spec} needs at {in_features} inputs; "
                f"plan {stored} for it (klfast.plan does)"
            )
        groups.setdefault(stored, []).append(name)
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {
            f"group_{i}": {
                "targets": names,
                "format": "pack-quantized",
                "weights": {
                    "num_bits": spec.bits,
                    "type": "int",
                    "symmetric": spec.symmetric,
                    "strategy": "channel" if spec.group_size == -1 else "group",
                    "group_size": None if spec.group_size == -1 else spec.group_size,
                    "dynamic": False,
                },
                "input_activations": None,
                "output_activations": None,
            }
            for i, (spec, names) in enumerate(groups.items())
        },
        "ignore": list(unquantized),
        "kv_cache_scheme": None,
    }


def model_quantization_config(model: nn.Module) -> dict[str, object]:
    """The ``quantization_config`` (a dict, as in config.json) of a model that holds QuantLinear layers.

    Raises:
        InvalidInputError: nothing is quantized; groups that the format cannot store.
    """
    layers = quantized_layers(model)
    specs = {name: (module.spec, module.in_features) for name, module in layers.items()}
    return quantization_config(specs, [name for name in linear_names(model) if name not in layers])


def quantized_layers(model: nn.Module) -> dict[str, QuantLinear]:
    """The QuantLinear layers of a model, under every name that they have; InvalidInputError if there are none."""
    layers = {name: module for name, module in linear_names(model).items() if isinstance(module, QuantLinear)}
    if not layers:
        raise InvalidInputError(
            "no layer of the model is quantized; use klfast.quantize_model first, or the model's own save_pretrained"
        )
    return layers


def linear_names(model: nn.Module) -> dict[str, nn.Module]:
    """The linear layers under every name that they have: a layer that several blocks share has several."""
    return {
        name: module
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, (nn.Linear, QuantLinear))
    }


def read_specs(folder: Path) -> dict[str, QuantSpec]:
    """The spec of each layer that the ``quantization_config`` of a folder's config.json names; the inverse of ``quantization_config``.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    config, specs = read_json(folder / "config.json"), {}
    try:
        for group in config["quantization_config"]["config_groups"].values():
            weights = group["weights"]
            size = -1 if weights["group_size"] is None else weights["group_size"]
            spec = QuantSpec(weights["num_bits"], size, weights["symmetric"])
            specs.update(dict.fromkeys(group["targets"], spec))
    except (KeyError, TypeError, AttributeError, ValueError, OverflowError) as error:
        reason = f"it lacks {error}" if isinstance(error, KeyError) else shortened(str(error), 200)
        raise CheckpointError(
            f"{folder}: the description of the quantized layers is damaged ({reason}); save the model again"
        ) from None
    return specs


def write_manifest(folder: Path, **facts: object) -> None:
    """Write klfast.json: ``facts``, and size and digest of each other file in the folder or in a folder of it."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / MANIFEST)
    sizes = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": _sha256(path)} for path in paths
    }
    content = {"format_version": FORMAT_VERSION, **facts, "files": sizes}
    write_atomic(folder / MANIFEST, json.dumps(content, indent=1) + "\n")


def read_manifest(folder: Path, verify: bool, *, weights: bool = True) -> dict:
    """Read klfast.json and check that each file it lists is there, complete and, with ``verify``, unchanged.

    ``weights=False`` passes over the safetensors files, which take long to read.

    Raises:
        CheckpointError: no such folder, no klfast.json or a damaged one, another format, a file that is missing or not as
            it was saved.
    """
    if not folder.is_dir():
        raise CheckpointError(f"there is no folder {folder}")
    if not (folder / MANIFEST).is_file():
        reason = f"{folder} holds no {MANIFEST}, so klfast.save_quantized did not write it"
        raise CheckpointError(f"{reason}; copy the whole folder, or quantize the full-precision model")
    manifest = read_json(folder / MANIFEST)
    version, files = manifest.get("format_version"), manifest.get("files")
    if version != FORMAT_VERSION and isinstance(version, int):
        reason = f"{folder / MANIFEST} has format version {version}, this klfast reads {FORMAT_VERSION}"
        raise CheckpointError(f"{reason}; use the klfast that wrote it")
    if version != FORMAT_VERSION or not isinstance(files, dict) or "config.json" not in files:
        raise CheckpointError(f"{folder / MANIFEST} is damaged; save the model again")
    for name, fact in files.items():
        _check_file(folder, name, fact, verify, weights)
    return manifest


def _check_file(folder: Path, name: str, fact: object, verify: bool, weights: bool) -> None:
    path, damaged = folder / name, f"{folder / MANIFEST} is damaged"
    if not isinstance(fact, dict) or type(fact.get("bytes")) is not int or not isinstance(fact.get("sha256"), str):
        raise CheckpointError(
            f"{damaged}: size and digest of {shortened(repr(name), 80)} are missing; save the model again"
        )
    if PurePath(name).is_absolute() or ".." in PurePath(name).parts:
        raise CheckpointError(
            f"{damaged}: it lists {shortened(repr(name), 80)}, outside of the folder; save the model again"
        )
    if path.suffix == ".safetensors" and not weights:
        return
    try:
        size = path.stat().st_size if path.is_file() else None
    except OSError:  # a name that no file can have
        size = None
    if size is None:
        raise CheckpointError(f"{shortened(str(path))} is missing; copy the whole folder again")
    if is_pointer(path):
        raise CheckpointError(
            f"{path} is a pointer of git-lfs, not the file itself; run `git lfs pull` in the folder or fetch it again"
        )
    if size != fact["bytes"]:
        raise CheckpointError(f"{path} has {size} bytes where {fact['bytes']} were saved; copy it again")
    if verify and _sha256(path) != fact["sha256"]:
        raise CheckpointError(
            f"{path} is not as it was saved (its SHA-256 differs); copy it again, or save the model again"
        )


def read_layer_facts(folder: Path, manifest: Mapping) -> dict[str, tuple[torch.dtype, str]]:
    """The dtype that each quantized layer's weight had, and its activation, from klfast.json's content.

    Raises:
        CheckpointError: a layer for which klfast.json holds anything else.
    """
    damaged, layers = f"{folder / MANIFEST} is damaged", manifest.get("layers")
    if not isinstance(layers, dict):
        raise CheckpointError(f"{damaged}: it lists no layers; save the model again")
    facts = {}
    for name, fact in layers.items():
        for key, known in (("dtype", _DTYPES), ("activation", _ACTIVATIONS)):
            value = fact.get(key) if isinstance(fact, dict) else None
            if not isinstance(value, str) or value not in known:
                found = f"the {key} of {shortened(name, 200)} is {shortened(repr(value), 80)}"
                raise CheckpointError(
                    f"{damaged}: {found}, not one of {', '.join(known)}; copy it again, or save the model again"
                )
        facts[name] = (_DTYPES[fact["dtype"]], fact["activation"])
    return facts


def read_json(path: Path) -> dict:
    """A JSON object from a file of the checkpoint; CheckpointError if it is not one."""
    try:
        content = parse_json(path.read_bytes())
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path} cannot be read as JSON ({getattr(error, 'strerror', None) or error}); copy it again"
        ) from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds no JSON object; copy it again")
    return content


def read_generation_config(folder: Path, kind: type) -> object | None:
    """The folder's generation_config.json as ``kind`` (transformers' GenerationConfig); None without such a file.

    Raises:
        CheckpointError: it is damaged. (transformers' own loading of a model passes over it in silence.)
    """
    path = folder / "generation_config.json"
    if not path.is_file():
        return None
    try:
        return kind.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # transformers raises anything
        reason = f"{path} is no generation config ({type(error).__name__})"
        raise CheckpointError(f"{reason}; copy it again, or remove it where it was added") from error


def is_pointer(path: Path) -> bool:
    """Whether a file is what git-lfs leaves in the place of one that was not fetched."""
    try:
        with open(path, "rb") if path.is_file() else io.BytesIO() as file:
            return file.read(40).startswith(b"version https://git-lfs")
    except OSError:
        return False


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
