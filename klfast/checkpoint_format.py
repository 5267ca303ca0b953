"""What stands in a saved folder beside the tensors: compressed-tensors' ``quantization_config`` and klfast's manifest.

config.json's ``quantization_config`` follows the ``pack-quantized`` format of the compressed-tensors package: one config
group for each distinct spec, its targets the full names of the layers. klfast.json holds what the format cannot say
(the dtype that each layer's weight had, how its activations are treated) and the size and SHA-256 of each file.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePath

import torch

from klfast.errors import CheckpointError, InvalidInputError
from klfast.files import parse_json, write_atomic
from klfast.types import QuantSpec, dtype_name, storable_spec

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


def read_specs(config: Mapping) -> dict[str, QuantSpec]:
    """The spec of each layer that a ``quantization_config`` names; the inverse of ``quantization_config``."""
    specs: dict[str, QuantSpec] = {}
    for group in config["config_groups"].values():
        weights = group["weights"]
        spec = QuantSpec(weights["num_bits"], weights["group_size"] or -1, weights["symmetric"])
        specs.update(dict.fromkeys(group["targets"], spec))
    return specs


def write_manifest(folder: Path, **facts: object) -> None:
    """Write klfast.json: ``facts``, and size and digest of each other file in the folder or in a folder of it."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / MANIFEST)
    sizes = {path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": _sha256(path)} for path in paths}
    content = {"format_version": FORMAT_VERSION, **facts, "files": sizes}
    write_atomic(folder / MANIFEST, json.dumps(content, indent=1) + "\n")


def read_manifest(folder: Path, verify: bool, *, weights: bool = True) -> dict:
    """Read klfast.json and check that each file it lists is there, complete and, with ``verify``, unchanged.

    ``weights=False`` passes over the safetensors files, which take long to read.

    Raises:
        CheckpointError: no such folder, no klfast.json, a later format, a file that is missing or not as it was saved.
    """
    if not folder.is_dir():
        raise CheckpointError(f"there is no folder {folder}")
    if not (folder / MANIFEST).is_file():
        raise CheckpointError(f"{folder} holds no {MANIFEST}, so klfast.save_quantized did not write it; load it with transformers and quantize it")
    manifest = read_json(folder / MANIFEST)
    try:
        version, files = manifest["format_version"], [(str(name), int(f["bytes"]), str(f["sha256"])) for name, f in manifest["files"].items()]
    except (KeyError, TypeError, AttributeError, ValueError):
        raise CheckpointError(f"{folder / MANIFEST} is damaged; save the model again") from None
    if version != FORMAT_VERSION:
        raise CheckpointError(f"{folder / MANIFEST} has format version {version}, this klfast reads {FORMAT_VERSION}; use the klfast that wrote it")
    for name, size, digest in files:
        path = folder / name
        if path.suffix == ".safetensors" and not weights:
            continue
        if PurePath(name).is_absolute() or ".." in PurePath(name).parts:
            raise CheckpointError(f"{folder / MANIFEST} is damaged: it lists {name!r}, outside of the folder; save the model again")
        if not path.is_file():
            raise CheckpointError(f"{path} is missing; copy the whole folder again")
        if path.stat().st_size != size:
            raise CheckpointError(f"{path} has {path.stat().st_size} bytes where {size} were saved; copy it again")
        if verify and _sha256(path) != digest:
            raise CheckpointError(f"{path} is not as it was saved (its SHA-256 differs); copy it again, or save the model anew")
    return manifest


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
                raise CheckpointError(f"{damaged}: the {key} of {name} is {value!r}, not one of {', '.join(known)}; copy it again, or save the model anew")
        facts[name] = (_DTYPES[fact["dtype"]], fact["activation"])
    return facts


def read_json(path: Path) -> dict:
    """A JSON object from a file of the checkpoint; CheckpointError if it is not one."""
    try:
        content = parse_json(path.read_bytes())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON ({getattr(error, 'strerror', None) or error}); copy it again") from None
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
        raise CheckpointError(f"{path} is no generation config ({type(error).__name__}); copy it again, or remove it where it was added") from error


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
