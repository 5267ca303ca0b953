"""Mamba and Mamba-2 with random weights: prefill and decode, against plain transformers and llama.cpp."""

from __future__ import annotations

from collections.abc import Iterator

from klfast.benchkit.runner import Group
from klfast.benchkit.settings import Settings

from . import models
from .whole_models import VARIANTS, batches, contenders

_LARGE = {"prefill": ("bf16", "int4, int8 activations"), "decode": tuple(VARIANTS)[2:]}  # which fit side by side


def groups(settings: Settings) -> Iterator[Group]:
    names, length, new = (models.QUICK_MODELS, 64, 4) if settings.quick else (models.MODELS, 512, 32)
    stages = {"prefill": length, "decode": new}
    for name in filter(settings.takes, names):
        for stage in stages:
            yield _group(name, stage, stages[stage], settings, tuple(VARIANTS), ("bf16", "fp32"))
    largest = next(iter(names)) if settings.quick else models.LARGE
    if not settings.takes(largest):
        return
    if not settings.quick:
        for stage, variants in _LARGE.items():
            yield _group(largest, stage, stages[stage], settings, variants, ("bf16",))
    yield Group(
        f"{largest} decode {new} tokens of each sequence",
        {"model": largest, "stage": "decode", "tokens": new},
        batches(largest, new, settings, ("int4", "int4, int8 activations"), (1, 8, 16)),
    )


def _group(
    name: str, stage: str, tokens: int, settings: Settings, variants: tuple[str, ...], plain: tuple[str, ...]
) -> Group:
    return Group(
        f"{name} {stage} {tokens} tokens",
        {"model": name, "stage": stage, "tokens": tokens},
        contenders(name, stage, tokens, settings, variants, plain),
    )


def test_decode(group, name, run, benchmark):
    run.time("decode", group, name, benchmark)
