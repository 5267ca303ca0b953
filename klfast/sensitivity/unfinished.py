"""File with the state of a sweep's current step, so that an interruption loses little work even in a long step."""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass, field

import torch

from klfast.core import signed_tensors
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
    finals = len(unfinished.finals)
    facts = {
        "after": after,
        "block": unfinished.block,
        "costs": unfinished.costs,
        "finals": finals,
        "carry": len(parts) - finals,
    }
    signed_tensors.write(path, facts, parts)


def read(path: str | os.PathLike[str], after: str, device: torch.device) -> Unfinished | None:
    """Return the state that ``write`` wrote; None if it was written after other measurements.

    Warns and returns None if it is damaged.
    """
    if not os.path.exists(path):
        return None
    try:
        facts, tensors = signed_tensors.read(path)
        if facts["after"] != after:
            return None
        parts = {name: part.to(device) for name, part in tensors.items()}
        carry = [parts[f"carry.{i}"] for i in range(facts["carry"])]
        finals = [parts[f"final.{i}"] for i in range(facts["finals"])]
        return Unfinished(finals, Carry(carry[0], tuple(carry[1:])), facts["block"], facts["costs"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        warnings.warn(f"{os.fspath(path)} is damaged ({error}); its step is measured again", stacklevel=2)
        return None
