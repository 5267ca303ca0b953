"""Readers of the JSON files in a model's folder."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

from klfast.core.errors import CheckpointError
from klfast.core.io import parse_json

if TYPE_CHECKING:
    from transformers import GenerationConfig


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file of the checkpoint; raise CheckpointError if it is not one."""
    try:
        content = parse_json(path.read_bytes())
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path} cannot be read as JSON ({getattr(error, 'strerror', None) or error}); copy it again"
        ) from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} is not a JSON object; copy it again")
    return content


def read_generation_config(folder: Path, kind: type[GenerationConfig]) -> GenerationConfig | None:
    """Return the folder's generation_config.json as a ``kind``; None without such a file.

    Raises:
        CheckpointError: it is damaged. (transformers silently ignores that when it loads a model.)
    """
    path = folder / "generation_config.json"
    if not path.is_file():
        return None
    try:
        found: GenerationConfig = kind.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # transformers may raise anything
        reason = f"{path} is not a generation config ({type(error).__name__})"
        raise CheckpointError(f"{reason}; copy it again, or remove it if it was added") from error
    return found


def is_pointer(path: Path) -> bool:
    """Return True if a file is a pointer of git-lfs to one that was not fetched."""
    try:
        with open(path, "rb") if path.is_file() else io.BytesIO() as file:
            return file.read(40).startswith(b"version https://git-lfs")
    except OSError:
        return False
