"""File with the state of a sweep's current step, so that an interruption loses little work even in a long step."""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from klfast.core.io import write_atomic
from klfast.models.block_chain import Carry


@dataclass(frozen=True)
class Unfinished:
    """State within a step.

    Attributes:
        finals: the head's input, [B, T, H], of each candidate that has been through the network.
        carry: the input of block ``block`` of the candidates that are on their way.
        block: the block to continue with.
        costs: seconds by stage, and tokens that went through blocks ("block_tokens"), so far.
    """

    finals: list[torch.Tensor]
    carry: Carry
    block: int
    costs: dict[str, float] = field(default_factory=dict)


def write(path: str | os.PathLike[str], unfinished: Unfinished, after: str) -> None:
    """Write the state of a step; ``after`` identifies everything that was measured before the step."""
    parts = {f"final.{i}": final for i, final in enumerate(unfinished.finals)}
    parts |= {f"carry.{i}": part for i, part in enumerate((unfinished.carry.hidden, *unfinished.carry.extra))}
    tensors = {name: part.detach().cpu().contiguous() for name, part in parts.items()}
    finals = len(unfinished.finals)
    facts = {
        "after": after,
        "block": unfinished.block,
        "costs": unfinished.costs,
        "finals": finals,
        "carry": len(parts) - finals,
    }
    write_atomic(path, save(tensors, {"facts": json.dumps(facts), "sha256": _digest(facts, tensors)}))


def read(path: str | os.PathLike[str], after: str, device: torch.device) -> Unfinished | None:
    """Return the state that ``write`` wrote; None if it was written after other measurements.

    Warns and returns None if it is damaged.
    """
    if not os.path.exists(path):
        return None
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        facts = json.loads(metadata["facts"])
        if metadata["sha256"] != _digest(facts, tensors):
            raise ValueError("its content does not match its digest")
        if facts["after"] != after:
            return None
        parts = {name: part.to(device) for name, part in tensors.items()}
        carry = [parts[f"carry.{i}"] for i in range(facts["carry"])]
        finals = [parts[f"final.{i}"] for i in range(facts["finals"])]
        return Unfinished(finals, Carry(carry[0], tuple(carry[1:])), facts["block"], facts["costs"])
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        warnings.warn(f"{os.fspath(path)} is damaged ({error}); its step is measured again", stacklevel=2)
        return None


def _digest(facts: Mapping[str, object], tensors: Mapping[str, torch.Tensor]) -> str:
    sha = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        sha.update(f"{name} {tensor.dtype} {list(tensor.shape)} ".encode())
        sha.update(tensor.flatten().view(torch.uint8).numpy().data)
    return sha.hexdigest()
