"""Reading the JSON files of a model's folder."""

from __future__ import annotations

import io
from pathlib import Path

from klfast.core.errors import CheckpointError
from klfast.core.io import parse_json


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
