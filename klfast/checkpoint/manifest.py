"""klfast.json in a saved folder: facts that the format of compressed-tensors cannot express.

These are the dtype that each layer's weight had, how it was rounded, how many of its rows are corrected, the treatment
of its activations, the names of experts' matrices, and each file's size and SHA-256.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path, PurePath
from typing import Any

import torch

from klfast.checkpoint.json_files import is_pointer, read_json
from klfast.core.arguments import ACTIVATIONS
from klfast.core.dtypes import dtype_name
from klfast.core.errors import CheckpointError, shortened
from klfast.core.io import write_atomic
from klfast.quant.spec import ROUNDINGS

MANIFEST = "klfast.json"
FORMAT_VERSION = 1
_DTYPES = {dtype_name(dtype): dtype for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16)}


def write_manifest(folder: Path, **facts: object) -> None:
    """Write klfast.json: ``facts``, and size and digest of every other file in the folder and its subfolders."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / MANIFEST)
    sizes = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": _sha256(path)} for path in paths
    }
    content = {"format_version": FORMAT_VERSION, **facts, "files": sizes}
    write_atomic(folder / MANIFEST, json.dumps(content, indent=1) + "\n")


def read_manifest(folder: Path, verify: bool, *, weights: bool = True) -> dict[str, Any]:
    """Read klfast.json and check that each file it lists is there, complete and, with ``verify``, unchanged.

    ``weights=False`` skips the safetensors files, which take long to read.

    Raises:
        CheckpointError: no such folder, no klfast.json or a damaged one, another format, or a file that is missing or
            differs from the saved one.
    """
    if not folder.is_dir():
        raise CheckpointError(f"there is no folder {folder}")
    if not (folder / MANIFEST).is_file():
        reason = f"{folder} has no {MANIFEST}, so klfast.save_quantized did not write it"
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
            f"{damaged}: it lists {shortened(repr(name), 80)}, outside the folder; save the model again"
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
        raise CheckpointError(f"{path} has {size} bytes, but {fact['bytes']} were saved; copy it again")
    if verify:
        _check_digest(path, fact, _sha256(path))


def _check_digest(path: Path, fact: Mapping[str, object], digest: str) -> None:
    if digest != fact["sha256"]:
        raise CheckpointError(
            f"{path} is not as it was saved (its SHA-256 differs); copy it again, or save the model again"
        )


@contextmanager
def verified(folder: Path, manifest: Mapping[str, Any]) -> Iterator[None]:
    """Compare the digests of all files that klfast.json lists, in threads beside the block's work.

    Raises:
        CheckpointError: a file differs from the saved one; also in the place of an error that the block raises.
    """
    facts: Mapping[str, Mapping[str, object]] = manifest["files"]
    stop = threading.Event()
    with ThreadPoolExecutor() as pool:
        digests = {name: pool.submit(_sha256, folder / name, stop) for name in facts}

        def compare() -> None:
            for name, digest in digests.items():
                _check_digest(folder / name, facts[name], digest.result())

        try:
            try:
                yield
            except Exception:
                compare()
                raise
            compare()
        finally:
            stop.set()  # after an error or Ctrl-C, the rest is not read


def read_layer_facts(folder: Path, manifest: Mapping[str, object]) -> dict[str, tuple[torch.dtype, str]]:
    """Return the dtype that each quantized layer's weight had, and its activation, from klfast.json's content.

    Raises:
        CheckpointError: klfast.json holds anything else for a layer.
    """
    damaged, layers = f"{folder / MANIFEST} is damaged", manifest.get("layers")
    if not isinstance(layers, dict):
        raise CheckpointError(f"{damaged}: it lists no layers; save the model again")
    facts = {}
    for name, fact in layers.items():
        for key, known in (("dtype", _DTYPES), ("activation", ACTIVATIONS)):
            value = fact.get(key) if isinstance(fact, dict) else None
            if not isinstance(value, str) or value not in known:
                found = f"the {key} of {shortened(name, 200)} is {shortened(repr(value), 80)}"
                raise CheckpointError(
                    f"{damaged}: {found}, not one of {', '.join(known)}; copy it again, or save the model again"
                )
        facts[name] = (_DTYPES[fact["dtype"]], fact["activation"])
    return facts


def read_roundings(folder: Path, manifest: Mapping[str, Any]) -> dict[str, str]:
    """Return how each quantized layer was rounded, from klfast.json's content; earlier versions of klfast did not say.

    Raises:
        CheckpointError: klfast.json names an unknown rounding.
    """
    found = {name: fact.get("rounding", ROUNDINGS[0]) for name, fact in manifest["layers"].items()}
    if wrong := [name for name, rounding in found.items() if rounding not in ROUNDINGS]:
        raise CheckpointError(
            f"{folder / MANIFEST} is damaged: the rounding of {shortened(wrong[0], 200)} is "
            f"{shortened(repr(found[wrong[0]]), 80)}, not one of {', '.join(ROUNDINGS)}; "
            "copy it again, or save the model again"
        )
    return found


def read_corrected(folder: Path, manifest: Mapping[str, Any]) -> dict[str, int]:
    """Return the number of corrected rows of each quantized layer that has some, from klfast.json's content.

    Raises:
        CheckpointError: klfast.json holds anything else for it.
    """
    found = {name: fact["corrected"] for name, fact in manifest["layers"].items() if "corrected" in fact}
    if wrong := [name for name, rows in found.items() if type(rows) is not int or rows < 1]:
        raise CheckpointError(
            f"{folder / MANIFEST} is damaged: {shortened(wrong[0], 200)} has "
            f"{shortened(repr(found[wrong[0]]), 80)} corrected rows; copy it again, or save the model again"
        )
    return found


def read_projections(folder: Path, manifest: Mapping[str, object]) -> dict[str, list[str]]:
    """Return the stacks of experts that are stored matrix by matrix (``expert_files.Projections``).

    Raises:
        CheckpointError: klfast.json holds anything else for them.
    """
    found = manifest.get("experts", {})
    if not isinstance(found, dict) or not all(
        isinstance(names, list) and names and all(isinstance(name, str) for name in names) for names in found.values()
    ):
        raise CheckpointError(f"{folder / MANIFEST} is damaged: its experts have no names; save the model again")
    return found


def _sha256(path: Path, stop: threading.Event | None = None) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while (block := file.read(1 << 20)) and not (stop and stop.is_set()):
            digest.update(block)
    return digest.hexdigest()
