"""Mamba-130M and Mamba2-130M with random weights: prefill and decode, against plain transformers and llama.cpp."""

from __future__ import annotations

from collections.abc import Iterator

from klfast.benchkit.runner import Group
from klfast.benchkit.settings import Settings

from . import models
from .whole_models import VARIANTS, contenders


def groups(settings: Settings) -> Iterator[Group]:
    names, length, new = (models.QUICK_MODELS, 64, 4) if settings.quick else (models.MODELS, 512, 32)
    for name in names:
        for stage, tokens in (("prefill", length), ("decode", new)):
            yield Group(
                f"{name} {stage} {tokens} tokens",
                {"model": name, "stage": stage, "tokens": tokens},
                contenders(name, stage, tokens, settings, tuple(VARIANTS), ("bf16", "fp32")),
            )


def test_decode(group, name, run, benchmark):
    run.time("decode", group, name, benchmark)
