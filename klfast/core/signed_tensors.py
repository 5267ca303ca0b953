"""Files of tensors and facts with a digest, so that damage is found when they are read."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from klfast.core.dtypes import as_bytes
from klfast.core.io import write_atomic


def write(path: str | os.PathLike[str], facts: Mapping[str, object], tensors: Mapping[str, torch.Tensor]) -> None:
    """Write tensors, and facts that JSON can hold, as a safetensors file."""
    stored = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_atomic(path, save(stored, {"facts": json.dumps(facts), "sha256": _digest(facts, stored)}))


def read(path: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Return the facts and the tensors that ``write`` wrote.

    Raises:
        ValueError: the file is damaged.
        OSError: it cannot be read.
    """
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        facts = json.loads(metadata["facts"])
    except (SafetensorError, KeyError) as error:
        raise ValueError(str(error)) from error
    if metadata.get("sha256") != _digest(facts, tensors):
        raise ValueError("its content does not match its digest")
    return facts, tensors


def _digest(facts: Mapping[str, object], tensors: Mapping[str, torch.Tensor]) -> str:
    sha = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        sha.update(f"{name} {tensor.dtype} {list(tensor.shape)} ".encode())
        sha.update(as_bytes(tensor).numpy().data)
    return sha.hexdigest()
