"""The record of a model family: all that klfast has to know of it beyond what it finds out by itself.

Parts of a model (mixers, norms, fused projections) are described by class name; facts about the whole model (blocks,
head, cache) by the model type of its configuration. What a record leaves at its default is found out from the model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import nn

from klfast.nn.mamba_step import Parts

Rows = Mapping[str, tuple[int, int]]  # the uses of a matrix's rows: {use: (first, end)}


@dataclass(frozen=True)
class Mixer:
    """A class of transformers' recurrent layers.

    Attributes:
        functions: the functions of its module that its forward calls and klfast replaces; names of
            ``klfast.acceleration.transformers_functions.REPLACEMENTS``.
        parts: what one decoding step on the CPU is fused from, given the mixer; it returns None where the mixer's parts
            have been changed. None for a class that decodes function by function.
        left_weight: the linear layer whose weight the forward multiplies from the left (``weight @ x``), if it does.
    """

    functions: tuple[str, ...]
    parts: Callable[[nn.Module], Parts | None] | None = None
    left_weight: str | None = None


class Norm(NamedTuple):
    """The root-mean-square normalisation that a module computes: weight v / sqrt(mean(v^2) + eps).

    Attributes:
        weight: [D].
        eps: what is added to the mean.
        group_size: channels that share a mean; None for all.
        gate_first: with a gate z, v is x silu(z); else the result is multiplied by silu(z).
        keeps_dtype: the result has x's dtype; else the wider of x's and the weight's.
    """

    weight: torch.Tensor
    eps: float
    group_size: int | None = None
    gate_first: bool = True
    keeps_dtype: bool = False


@dataclass(frozen=True)
class Blocks:
    """Where a model's blocks are, and what crosses from one to the next.

    Attributes:
        path: of their list within the base model; None for the list with the most parameters.
        carry: the keyword argument of a block that takes what the block before returned as the second entry of its
            tuple (tensors, batch first, or None); None where hidden states alone cross.
    """

    path: str | None = None
    carry: str | None = None


@dataclass(frozen=True)
class LogitRule:
    """Logits from the head's product y = h W^T + b: ``scale * y``, or ``softcap * tanh(scale * y / softcap)``."""

    scale: float = 1.0
    softcap: float | None = None


@dataclass(frozen=True)
class CacheUse:
    """How a model's forward takes its cache.

    Attributes:
        argument: the parameter's name; None to read it off the forward's signature.
        masks_prompt_only: the mask of padding is for the prompt alone, not for the tokens after it, as in models
            without attention; None to tell it by the parameter's name.
    """

    argument: str | None = None
    masks_prompt_only: bool | None = None


@dataclass(frozen=True)
class Family:
    """What klfast knows of a family.

    Attributes:
        model_type: that of the (text) configuration.
        mixers: recurrent layers that ``accelerate`` gives klfast's functions, by class name.
        norms: normalisations that it replaces, by class name: what such a module computes.
        rows: classes that hold fused projections: for such a module {name of the linear layer: the uses of its rows}.
        matrices: parameters that are multiplied by and lie in no nn.Linear, by the name of the class that holds them.
            They are counted as weights that klfast cannot quantize yet.
        blocks: the chain of blocks.
        logits: what the model does to its head's product, given the text configuration; it is compared with the
            model's logits before it is believed. None to try what the configuration's attributes suggest.
        cache: the cache argument.
        widens_logits: the model's forward makes float32 of its logits; then its accelerated head does so.
        own_code: the model is klfast's own and calls klfast's ops itself; only linear layers are left to accelerate.
    """

    model_type: str
    mixers: Mapping[str, Mixer] = field(default_factory=dict)
    norms: Mapping[str, Callable[[nn.Module], Norm]] = field(default_factory=dict)
    rows: Mapping[str, Callable[[nn.Module], Mapping[str, Rows]]] = field(default_factory=dict)
    matrices: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    blocks: Blocks = Blocks()
    logits: Callable[[object], LogitRule] | None = None
    cache: CacheUse = CacheUse()
    widens_logits: bool = False
    own_code: bool = False


def plain(config: object) -> LogitRule:
    """Logits that are the head's product and nothing more."""
    return LogitRule()


def split(**sizes: int) -> dict[str, tuple[int, int]]:
    """Row ranges of uses that follow one another, from their numbers of rows: {use: (first, end)}."""
    ranges, first = {}, 0
    for use, size in sizes.items():
        ranges[use] = (first, first + size)
        first += size
    return ranges
