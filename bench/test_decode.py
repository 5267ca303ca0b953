"""Mamba-130M and Mamba2-130M with random weights: prefill and decode, against plain transformers and llama.cpp."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import pytest

from klfast.benchkit.runner import Group, UnavailableError
from klfast.benchkit.settings import Settings

from . import llama_cpp, models
from .whole_models import DECODE_PROMPT, VARIANTS, contenders, rate


def _sizes(settings: Settings) -> tuple[list[str], int, int]:
    """Return the models, the tokens of the prefill, and the tokens to decode."""
    return (list(models.QUICK_MODELS), 64, 4) if settings.quick else (list(models.MODELS), 512, 32)


def groups(settings: Settings) -> Iterator[Group]:
    names, length, new = _sizes(settings)
    for name in names:
        for stage, tokens in (("prefill", length), ("decode", new)):
            yield Group(
                f"{name} {stage} {tokens} tokens",
                {"model": name, "stage": stage, "tokens": tokens},
                contenders(name, stage, tokens, settings, tuple(VARIANTS), ("bf16", "fp32")),
            )


def test_decode(group, name, run, benchmark):
    run.time("decode", group, name, benchmark)


def test_llama_cpp(run):
    """Time llama.cpp; its logits cannot be checked from outside, so a GGUF of random weights shows only the speed."""
    settings = run.settings
    if settings.llama_cpp is None:
        pytest.skip("no --llama-cpp")
    names = _sizes(settings)[0]
    for gguf in settings.gguf:
        model = next((name for name in sorted(names, key=len, reverse=True) if gguf.name.startswith(name)), None)
        assert model is not None, f"the name of {gguf.name} does not begin with one of {', '.join(names)}"
        for group in groups(settings):
            if group.facts["model"] != model:
                continue
            tokens = group.facts["tokens"]
            prompt, new = (tokens, 0) if group.facts["stage"] == "prefill" else (DECODE_PROMPT, tokens)
            once = functools.partial(
                llama_cpp.seconds, settings.llama_cpp, gguf, prompt=prompt, new=new, threads=settings.threads
            )
            try:
                run.time_outside("decode", group, f"llama.cpp {gguf.stem}", once, rate(tokens))
            except UnavailableError as reason:
                pytest.fail(str(reason))
