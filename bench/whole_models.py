"""Contenders of the suites that time whole models, prefill and decode: klfast, transformers, llama.cpp."""

from __future__ import annotations

import functools
import gc
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import klfast
from klfast.benchkit.runner import Contender, UnavailableError
from klfast.benchkit.settings import Settings
from klfast.quant.spec import QuantSpec

from . import llama_cpp, models

_INT4, _INT8 = QuantSpec(4, 64), QuantSpec(8, 64)
VARIANTS = {  # dtype, specs that linear layers take in turn, activation
    "bf16": (torch.bfloat16, (), "exact"),
    "fp32": (torch.float32, (), "exact"),
    "int8": (torch.bfloat16, (_INT8,), "exact"),
    "int4 and int8": (torch.bfloat16, (_INT4, _INT8), "exact"),
    "int4": (torch.bfloat16, (_INT4,), "exact"),
    "int4, int8 activations": (torch.bfloat16, (_INT4,), "int8"),
}
TOLERANCE = 2e-3  # of float32 logits
DECODE_PROMPT = 8  # tokens


def contenders(
    name: str, stage: str, tokens: int, settings: Settings, variants: tuple[str, ...], plain: tuple[str, ...]
) -> dict[str, Callable[[], Contender]]:
    """Return klfast's and its peers' contenders of a stage, "prefill" or "decode", by variant."""
    ours, theirs = {"prefill": (_prefill, _plain_prefill), "decode": (_decode, _plain_decode)}[stage]
    klfasts = {
        f"klfast {variant}": functools.partial(ours, name, tokens, settings, *VARIANTS[variant]) for variant in variants
    }
    plains = {
        f"transformers {dtype}": functools.partial(theirs, name, tokens, settings, VARIANTS[dtype][0])
        for dtype in plain
    }
    ggufs = {
        f"llama.cpp {variant}": functools.partial(_llama_cpp, name, stage, tokens, settings, gguf)
        for variant, gguf in llama_cpp.variants(name, settings).items()
    }
    return klfasts | plains | ggufs


def rate(tokens: int) -> Callable[[float], dict[str, float]]:
    """Return the facts of a contender that handles this many tokens: tokens per second."""
    return lambda seconds: {"tok_s": round(tokens / seconds, 1)}


def batches(
    name: str, tokens: int, settings: Settings, variants: tuple[str, ...], sequences: tuple[int, ...]
) -> dict[str, Callable[[], Contender]]:
    """Return contenders that decode this many sequences together."""
    return {
        f"klfast {variant}, {n} sequences": functools.partial(_decode, name, tokens, settings, *VARIANTS[variant], n)
        for variant in variants
        for n in sequences
    }


def _prompt(length: int, sequences: int = 1) -> torch.Tensor:
    return torch.randint(0, 512, (sequences, length))


class _Kept:
    """One model's variants for one stage; it frees those of the stage before, which might not fit beside them."""

    def __init__(self) -> None:
        self._of: tuple[str, str] = "", ""
        self._made: dict[object, Any] = {}

    def get(self, of: tuple[str, str], variant: object, make: Callable[[], Any]) -> Any:
        """Return what ``make`` made of a model, ``of`` its name and the stage, for a variant."""
        if of != self._of:
            self._of, self._made = of, {}
            gc.collect()
        if variant not in self._made:
            self._made[variant] = make()
        return self._made[variant]


_kept = _Kept()


def _model(
    name: str, stage: str, device: str, dtype: torch.dtype, specs: tuple[QuantSpec, ...], activation: str
) -> tuple[torch.nn.Module, float]:
    """Return klfast's model in ``dtype``, and its error in float32: infinite if it generates other tokens."""
    _require_cpu(device)

    def make() -> tuple[torch.nn.Module, float]:
        model = models.ours(name, specs, activation)
        error = models.error(model, _prompt(16))
        if activation == "exact" and not models.same_tokens(model, _prompt(8), 4):
            error = math.inf
        return model.to(dtype), error

    return _kept.get((name, stage), (dtype, specs, activation), make)


def _plain_model(name: str, stage: str, device: str, dtype: torch.dtype) -> torch.nn.Module:
    """Return transformers' own model, against which klfast's are checked."""
    _require_cpu(device)
    return _kept.get((name, stage), dtype, lambda: models.plain(name).to(dtype))


def _require_cpu(device: str) -> None:
    if device != "cpu":
        raise UnavailableError("whole models are timed on the CPU only")


def _prefill(
    name: str, length: int, settings: Settings, dtype: torch.dtype, specs: tuple[QuantSpec, ...], activation: str
) -> Contender:
    model, error = _model(name, "prefill", settings.device, dtype, specs, activation)
    prompt = _prompt(length)

    def facts(seconds: float) -> dict[str, float]:
        return {"tok_s": round(length / seconds, 1), **models.shares(model, prompt, seconds)}

    return Contender([lambda: models.own_prefill(model, prompt)], lambda: error, TOLERANCE, facts=facts)


def _plain_prefill(name: str, length: int, settings: Settings, dtype: torch.dtype) -> Contender:
    model, prompt = _plain_model(name, "prefill", settings.device, dtype), _prompt(length)
    return Contender([lambda: models.prefill(model, prompt)], lambda: 0.0, 0.0, facts=rate(length))


def _decode(
    name: str,
    new: int,
    settings: Settings,
    dtype: torch.dtype,
    specs: tuple[QuantSpec, ...],
    activation: str,
    sequences: int = 1,
) -> Contender:
    model, error = _model(name, "decode", settings.device, dtype, specs, activation)
    prompt = _prompt(DECODE_PROMPT, sequences)
    return Contender(
        [lambda: klfast.generate(model, prompt, new, eos_token_id=())],
        lambda: error,
        TOLERANCE,
        models.read_bytes(model) * new,
        facts=rate(new * sequences),
        copy_nbytes=models.read_bytes(model),
    )


def _plain_decode(name: str, new: int, settings: Settings, dtype: torch.dtype) -> Contender:
    model, prompt = _plain_model(name, "decode", settings.device, dtype), _prompt(DECODE_PROMPT)
    return Contender(
        [lambda: models.generate(model, prompt, new)],
        lambda: 0.0,
        0.0,
        models.read_bytes(model) * new,
        facts=rate(new),
        copy_nbytes=models.read_bytes(model),
    )


def _llama_cpp(name: str, stage: str, tokens: int, settings: Settings, gguf: Path | None) -> Contender:
    """Return llama-bench on a file, or on one that is made: random weights show the speed."""
    _require_cpu(settings.device)
    if gguf is None:
        try:
            from . import gguf_models
        except ImportError as error:
            raise UnavailableError(f"no GGUF file is made ({error}); pip install 'klfast[peers]'") from None
        gguf = gguf_models.made(name)
    prompt, new = (tokens, 0) if stage == "prefill" else (DECODE_PROMPT, tokens)
    once = functools.partial(llama_cpp.seconds, settings, gguf, prompt=prompt, new=new)
    return Contender([once], None, 0.0, facts=rate(tokens), own_clock=True)
