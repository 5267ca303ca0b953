"""Resolution of a model's name to a folder: a bundled model, a local folder, or the hub's cache."""

from __future__ import annotations

import glob
import os
from pathlib import Path

from klfast.checkpoint.json_files import read_json
from klfast.checkpoint.loading_errors import one_line_errors
from klfast.checkpoint.manifest import MANIFEST
from klfast.checkpoint.model_folder import (
    ADAPTER,
    MAMBA_SSM_WEIGHTS,
    foreign,
    is_mamba_ssm,
    read_config,
    require_model,
    weight_names,
)
from klfast.core.bundled import ASSETS, bundled_models
from klfast.core.errors import CheckpointError, InvalidInputError
from klfast.core.io import recover, require_utf8

_SMALL_FILES = ["*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken"]


def resolve(
    name_or_path: str | os.PathLike[str], *, weights: bool, local_files_only: bool, trust_remote_code: bool
) -> Path:
    """Return the folder of a model's name, inspected by ``model_folder.require_model``.

    A model on the hub is first fetched into its cache, including the safetensors files if ``weights``. With
    ``local_files_only`` the network is not used.
    """
    name = os.fspath(name_or_path)
    if not isinstance(name, str) or not name or "\0" in name:
        raise InvalidInputError(f"{name!r} is not a model's name; give a folder, a hub id or a bundled name")
    if name in bundled_models():
        return ASSETS / "models" / name
    path = Path(os.path.expanduser(name))
    recover(path)
    if path.is_dir():
        require_utf8(path)
        require_model(path)
        return path
    if path.exists():
        what = foreign(name)
        raise InvalidInputError(
            f"{name} is {what}" if what else f"{name} is a file; give the folder of a transformers model"
        )
    if _is_path(name) or "/" not in name or name.count("/") > 1:
        hint = f"the bundled models are {', '.join(bundled_models()) or 'not installed'}; a hub id reads owner/name"
        raise InvalidInputError(f"there is no model folder {name!r} ({hint})")
    with one_line_errors(name, "model" if weights else "tokenizer"):
        folder = _from_hub(name, weights, local_files_only, trust_remote_code)
    require_model(folder)
    return folder


def gguf_file(name_or_path: str | os.PathLike[str], *, local_files_only: bool) -> Path | None:
    """Return the path of a GGUF file, local or on the hub ("owner/name/file.gguf"); None for any other name."""
    name = os.fspath(name_or_path)
    if not isinstance(name, str) or not name.lower().endswith(".gguf"):
        return None
    path = Path(os.path.expanduser(name))
    if path.exists():
        return path if path.is_file() else None
    if _is_path(name) or name.count("/") < 2:
        raise InvalidInputError(f"there is no file {name!r}; one on the hub reads owner/name/file.gguf")
    from huggingface_hub import hf_hub_download

    owner, model, file = name.split("/", 2)
    with one_line_errors(name, "model"):
        return Path(hf_hub_download(f"{owner}/{model}", file, local_files_only=local_files_only))


def _is_path(name: str) -> bool:
    return name.startswith((".", "/", "~", os.sep)) or "\\" in name


def _from_hub(name: str, weights: bool, local_files_only: bool, trust_remote_code: bool) -> Path:
    """Fetch the files of a hub id that klfast and transformers read; return the snapshot."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    if local_files_only:
        return _cached(name)
    wanted = [*_SMALL_FILES, "*.py"] if trust_remote_code else _SMALL_FILES
    try:
        folder = Path(
            snapshot_download(name, allow_patterns=wanted, ignore_patterns=["*/*.json", "*/*.txt", "*/*.model"])
        )
        if weights and not (folder / ADAPTER).exists():
            files = _weight_files(folder)
            snapshot_download(name, revision=folder.name, allow_patterns=[glob.escape(file) for file in files])
        return folder
    except LocalEntryNotFoundError:  # no network, but the cache may suffice
        return _cached(name)


def _weight_files(folder: Path) -> list[str]:
    """Return the names of the files to fetch besides a snapshot's small ones."""
    if (folder / MANIFEST).is_file():
        return _manifest_files(folder)
    config = folder / "config.json"
    return [MAMBA_SSM_WEIGHTS] if config.is_file() and is_mamba_ssm(read_config(folder)) else weight_names(folder)


def _manifest_files(folder: Path) -> list[str]:
    files = read_json(folder / MANIFEST).get("files")
    if not isinstance(files, dict):
        raise CheckpointError(f"{folder / MANIFEST} is damaged; fetch it again")
    return list(files)


def _cached(name: str) -> Path:
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import LocalEntryNotFoundError

    for file in ("config.json", ADAPTER):
        if isinstance(found := try_to_load_from_cache(name, file), str):
            return Path(found).parent
    raise LocalEntryNotFoundError(f"{name} is not in the cache")
