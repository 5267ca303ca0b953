"""Whole models with random weights: prefill and decode, against plain transformers and llama.cpp."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator

import pytest
import torch

import klfast
from klfast.benchkit.runner import Contender, Group, UnavailableError
from klfast.benchkit.settings import Settings
from klfast.quant.spec import QuantSpec

from . import llama_cpp, models

VARIANTS = {  # dtype, spec, activation
    "bf16": (torch.bfloat16, None, "exact"),
    "fp32": (torch.float32, None, "exact"),
    "int8": (torch.bfloat16, QuantSpec(8, 64), "exact"),
    "int4": (torch.bfloat16, QuantSpec(4, 64), "exact"),
    "int4, int8 activations": (torch.bfloat16, QuantSpec(4, 64), "int8"),
}
TOLERANCE = 2e-3  # of float32 logits
_DECODE_PROMPT = 8  # tokens


def _sizes(settings: Settings) -> tuple[list[str], int, int]:
    """Return the models, the tokens of the prefill, and the tokens to decode."""
    return (list(models.QUICK_MODELS), 64, 4) if settings.quick else (list(models.MODELS), 512, 32)


def groups(settings: Settings) -> Iterator[Group]:
    names, length, new = _sizes(settings)
    for name in names:
        for stage, tokens, ours, theirs in (
            ("prefill", length, _prefill, _plain_prefill),
            ("decode", new, _decode, _plain_decode),
        ):
            contenders = {
                f"klfast {variant}": functools.partial(ours, name, tokens, settings, *how)
                for variant, how in VARIANTS.items()
            }
            contenders |= {
                f"transformers {dtype}": functools.partial(theirs, name, tokens, settings, VARIANTS[dtype][0])
                for dtype in ("bf16", "fp32")
            }
            yield Group(
                f"{name} {stage} {tokens} tokens", {"model": name, "stage": stage, "tokens": tokens}, contenders
            )


def _prompt(length: int) -> torch.Tensor:
    return torch.randint(0, 512, (1, length))


@functools.lru_cache(maxsize=len(VARIANTS))  # for prefill, then for decode
def _model(
    name: str, device: str, dtype: torch.dtype, spec: QuantSpec | None, activation: str
) -> tuple[torch.nn.Module, float]:
    """Return klfast's model in ``dtype``, and its error in float32: infinite if it generates other tokens."""
    _require_cpu(device)
    model = models.ours(name, spec, activation)
    error = models.error(model, _prompt(16))
    if activation == "exact" and not models.same_tokens(model, _prompt(8), 4):
        error = math.inf
    return model.to(dtype), error


@functools.lru_cache(maxsize=2)
def _plain_model(name: str, device: str, dtype: torch.dtype) -> torch.nn.Module:
    """Return transformers' own model, against which klfast's are checked."""
    _require_cpu(device)
    return models.plain(name).to(dtype)


def _require_cpu(device: str) -> None:
    if device != "cpu":
        raise UnavailableError("whole models are timed on the CPU only")


def _prefill(
    name: str, length: int, settings: Settings, dtype: torch.dtype, spec: QuantSpec | None, activation: str
) -> Contender:
    model, error = _model(name, settings.device, dtype, spec, activation)
    prompt = _prompt(length)

    def facts(seconds: float) -> dict[str, float]:
        return {"tok_s": round(length / seconds, 1), **models.shares(model, prompt, dtype, seconds)}

    return Contender([lambda: model(prompt, use_cache=False)], lambda: error, TOLERANCE, facts=facts)


def _plain_prefill(name: str, length: int, settings: Settings, dtype: torch.dtype) -> Contender:
    model, prompt = _plain_model(name, settings.device, dtype), _prompt(length)
    return Contender([lambda: model(prompt, use_cache=False)], lambda: 0.0, 0.0, facts=_rate(length))


def _decode(
    name: str, new: int, settings: Settings, dtype: torch.dtype, spec: QuantSpec | None, activation: str
) -> Contender:
    model, error = _model(name, settings.device, dtype, spec, activation)
    prompt = _prompt(_DECODE_PROMPT)
    return Contender(
        [lambda: klfast.generate(model, prompt, new, eos_token_id=())],
        lambda: error,
        TOLERANCE,
        models.read_bytes(model) * new,
        facts=_rate(new),
    )


def _plain_decode(name: str, new: int, settings: Settings, dtype: torch.dtype) -> Contender:
    model, prompt = _plain_model(name, settings.device, dtype), _prompt(_DECODE_PROMPT)
    return Contender(
        [lambda: models.generate(model, prompt, new)],
        lambda: 0.0,
        0.0,
        models.read_bytes(model) * new,
        facts=_rate(new),
    )


def _rate(tokens: int) -> Callable[[float], dict[str, float]]:
    return lambda seconds: {"tok_s": round(tokens / seconds, 1)}


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
            prompt, new = (tokens, 0) if group.facts["stage"] == "prefill" else (_DECODE_PROMPT, tokens)
            once = functools.partial(
                llama_cpp.seconds, settings.llama_cpp, gguf, prompt=prompt, new=new, threads=settings.threads
            )
            try:
                run.time_outside("decode", group, f"llama.cpp {gguf.stem}", once, _rate(tokens))
            except UnavailableError as reason:
                pytest.fail(str(reason))
