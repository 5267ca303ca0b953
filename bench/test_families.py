"""Hybrid models of released sizes, random weights: prefill in bfloat16, decode in INT4, against their peers."""

from __future__ import annotations

from collections.abc import Iterator

from klfast.benchkit.runner import Group
from klfast.benchkit.settings import Settings

from . import families
from .whole_models import contenders


def groups(settings: Settings) -> Iterator[Group]:
    names, length, new = (families.QUICK_MODELS, 64, 4) if settings.quick else (families.MODELS, 512, 32)
    for name in filter(settings.takes, names):
        for stage, tokens, variants in (
            ("prefill", length, ("bf16", "int4, int8 activations")),
            ("decode", new, ("int4", "int4, int8 activations")),
        ):
            yield Group(
                f"{name} {stage} {tokens} tokens",
                {"model": name, "stage": stage, "tokens": tokens},
                contenders(name, stage, tokens, settings, variants, ("bf16",)),
            )


def test_families(group, name, run, benchmark):
    run.time("families", group, name, benchmark)
