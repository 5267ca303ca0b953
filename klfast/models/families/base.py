"""The record of a model family: the facts that klfast cannot detect from the model.

Parts of a model (mixers, norms, fused projections) are described by class name; facts about the whole model (blocks,
head, cache) by the model type of its configuration. Fields left at their defaults are detected from the model.

Functions in a record take a module or configuration of the class they are listed for, hence ``Any``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from klfast.engine.builder import Builder
from klfast.engine.columns import Columns
from klfast.nn.mamba_step import Parts
from klfast.nn.norm import Norm

Rows = Mapping[str, tuple[int, int]]  # the uses of a matrix's rows: {use: (first, end)}


FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


@dataclass(frozen=True)
class Mixer:
    """A class of transformers' recurrent layers.

    Attributes:
        functions: the functions of its module that its forward calls and klfast replaces; names of
            ``klfast.acceleration.transformers_functions.REPLACEMENTS``.
        parts: returns the parts of a mixer that one decoding step on the CPU is fused from, or None if they have been
            changed. None for a class that decodes function by function.
        left_weight: the linear layer whose weight the forward multiplies from the left (``weight @ x``), if any.
    """

    functions: tuple[str, ...]
    parts: Callable[[Any], Parts | None] | None = None
    left_weight: str | None = None


@dataclass(frozen=True)
class Blocks:
    """Where a model's blocks are, and which tensors cross from one to the next.

    Attributes:
        path: path of their list in the base model; None for the list with the most parameters.
        carry: the keyword argument of a block for the second entry of the tuple that the block before returned
            (tensors, batch first, or None); None if only hidden states cross.
    """

    path: str | None = None
    carry: str | None = None


@dataclass(frozen=True)
class LogitRule:
    """Logits from the head's product y = h W^T + b: ``scale * y``, or ``softcap * tanh(scale * y / softcap)``."""

    scale: float = 1.0
    softcap: float | None = None


@dataclass(frozen=True)
class Family:
    """The record of a family.

    Attributes:
        model_type: the (text) configuration's.
        mixers: recurrent layers in which ``accelerate`` installs klfast's functions, by class name.
        norms: normalisations that it replaces, by class name: functions that read a module's parameters.
        rows: classes with fused projections: functions of a module that return {linear layer's name: its rows' uses}.
        blocks: the chain of blocks.
        logits: the rule that the model applies to its head's product, given the text configuration; it is compared with
            the model's logits before it is used. None to try what the configuration's attributes suggest.
        masks_prompt_only: the padding mask is only for the prompt, not for the tokens after it, as in models without
            attention.
        reads_padding: padding changes the results, since the forward ignores its mask or applies it wrongly; that a
            forward takes no mask is detected.
        mixes_rows: after the prompt, the forward mixes the rows of a batch.
        widens_logits: the model's forward casts its logits to float32; then its accelerated head does so.
        lower: appends the instructions of a model to a program, and returns the columns of its logits, float32; it
            raises CannotLowerError for what no instruction computes. None if the engine does not run the family.
        fused: names of layers of one module that other engines make one matrix of, which has one precision.
        own_code: the model is klfast's own and calls klfast's ops itself; only its linear layers remain to accelerate.
    """

    model_type: str
    mixers: Mapping[str, Mixer] = field(default_factory=dict)
    norms: Mapping[str, Callable[[Any], Norm]] = field(default_factory=dict)
    rows: Mapping[str, Callable[[Any], Mapping[str, Rows]]] = field(default_factory=dict)
    blocks: Blocks = Blocks()
    logits: Callable[[Any], LogitRule] | None = None
    masks_prompt_only: bool = False
    reads_padding: bool = False
    mixes_rows: bool = False
    widens_logits: bool = False
    lower: Callable[[Builder, Any], Columns] | None = None
    fused: tuple[tuple[str, ...], ...] = FUSED
    own_code: bool = False


def plain(config: object) -> LogitRule:
    """Return the rule for logits that are just the head's product."""
    return LogitRule()


def split(**sizes: int) -> dict[str, tuple[int, int]]:
    """Return the row ranges of consecutive uses, {use: (first, end)}, from their numbers of rows."""
    ranges, first = {}, 0
    for use, size in sizes.items():
        ranges[use] = (first, first + size)
        first += size
    return ranges
