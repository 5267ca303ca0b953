"""What a sweep is given: calibration windows, specs and layers, checked and put in order."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Sequence

import torch
from torch import nn

from klfast.errors import InvalidInputError
from klfast.models.layers import linear, linears
from klfast.nn import QuantLinear
from klfast.types import QuantSpec


def vocabulary(model: nn.Module) -> int:
    """How many token ids the model embeds."""
    embedding = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    if not isinstance(embedding, nn.Embedding):
        raise InvalidInputError(f"{type(model).__name__} has no input embedding; klfast sweeps causal language models")
    return embedding.num_embeddings


def micro_batches(batches: Iterable[torch.Tensor] | torch.Tensor, vocab: int, max_tokens: int) -> list[torch.Tensor]:
    """All windows, in order, as int64 [B, T] of at most ``max_tokens`` tokens each (but at least one window)."""
    if isinstance(batches, torch.Tensor):
        batches = [batches]
    windows: list[torch.Tensor] = []
    for number, ids in enumerate(batches):
        windows += _windows(ids, number, vocab)
    if not windows:
        raise InvalidInputError("there are no calibration windows: batches is empty; give at least one window of 2 tokens")
    found: list[list[torch.Tensor]] = []
    for window in windows:
        room = found and found[-1][0].shape == window.shape and (len(found[-1]) + 1) * len(window) <= max_tokens
        if room:
            found[-1].append(window)
        else:
            found.append([window])
    return [torch.stack(group) for group in found]


def _windows(ids: object, number: int, vocab: int) -> list[torch.Tensor]:
    if not isinstance(ids, torch.Tensor) or ids.dtype != torch.int64 or ids.dim() != 2:
        found = f"{ids.dtype} {list(ids.shape)}" if isinstance(ids, torch.Tensor) else type(ids).__name__
        raise InvalidInputError(f"batch {number} must be an int64 tensor [B, T] of token ids, got {found}")
    if not len(ids):
        return []
    if ids.shape[1] < 2:
        raise InvalidInputError(f"batch {number} has windows of {ids.shape[1]} tokens; they need at least 2, one to see and one to predict")
    low, high = (int(bound) for bound in ids.aminmax())
    if low < 0 or high >= vocab:
        raise InvalidInputError(f"batch {number} holds token id {low if low < 0 else high}; the model's ids lie between 0 and {vocab - 1}")
    return list(ids)


def digest(batches: Sequence[torch.Tensor]) -> str:
    """SHA-256 of all windows."""
    sha = hashlib.sha256()
    for ids in batches:
        for window in ids.cpu():
            sha.update(f"{len(window)} ".encode())
            sha.update(window.contiguous().numpy().tobytes())
    return sha.hexdigest()


def parse_specs(specs: Sequence[QuantSpec | str]) -> list[QuantSpec]:
    """Specs given as such or by name, each once."""
    if isinstance(specs, (str, QuantSpec)):
        specs = [specs]
    found = [QuantSpec.parse(spec) if isinstance(spec, str) else spec for spec in specs]
    if not found:
        raise InvalidInputError("there are no specs to sweep; give for instance specs=('int4-g64-sym',)")
    if wrong := [spec for spec in found if not isinstance(spec, QuantSpec)]:
        raise InvalidInputError(f"specs must be QuantSpecs or their names, got {type(wrong[0]).__name__}")
    return list(dict.fromkeys(found))


def choose_layers(model: nn.Module, layers: Iterable[str] | None) -> list[str]:
    """Names of the linear layers to sweep, in module order: all of them, or ``layers``."""
    found = linears(model)
    if quantized := [name for name, module in found.items() if isinstance(module, QuantLinear)]:
        raise InvalidInputError(f"{quantized[0]} is quantized already; sweep the full-precision model")
    if layers is None:
        return list(found)
    wanted = [layers] if isinstance(layers, str) else list(layers)
    if not wanted:
        raise InvalidInputError("layers is empty; name at least one linear layer, or pass None for all")
    for name in wanted:
        linear(model, name)
    return [name for name in found if name in set(wanted)]


def refuse_damaged(names: Iterable[str], norms: Iterable[float]) -> None:
    """Raise if the norm of a linear layer's weight is not finite: neither the sweep nor its files can hold such a model."""
    for name, norm in zip(names, norms, strict=True):
        if not math.isfinite(norm):
            raise InvalidInputError(f"the weight of {name} holds a NaN, an infinity or numbers too large to add up; repair the checkpoint before sweeping it")


def refuse_shared(model: nn.Module, names: Sequence[str]) -> None:
    """Raise if a layer to sweep is, or shares its weight with, another one. (The embedding may share the head's.)"""
    owners: dict[int, str] = {}
    chosen = set(names)
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, nn.Linear):
            other = owners.setdefault(id(module.weight), name)
            if other != name and chosen & {name, other}:
                raise InvalidInputError(f"{other} and {name} share one weight; leave them out of `layers`")
