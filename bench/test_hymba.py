"""Hymba at the released size with random weights: prefill and decode, against the plain PyTorch reference path."""

from __future__ import annotations

import functools
import resource
import sys
from collections.abc import Callable, Iterator

import torch

import klfast
from klfast.benchkit.runner import Contender, Group, UnavailableError
from klfast.benchkit.settings import Settings
from klfast.models.calling import returned_cache

from . import hymba, models

PRECISIONS = ("bf16", "int4", "mixed")
TOLERANCE = 3e-2  # for a mixer's or feed-forward part's output in bfloat16, rounded at each step


def _sizes(settings: Settings) -> tuple[str, int, int]:
    """Return the model, the tokens of the prefill, and the tokens to decode after it."""
    return ("hymba-tiny", 48, 4) if settings.quick else ("hymba-1.5b", 512, 16)


def groups(settings: Settings) -> Iterator[Group]:
    name, length, new = _sizes(settings)
    for stage, tokens, title, build in (
        ("prefill", length, f"{length} tokens", _prefill),
        ("decode", new, f"{new} tokens after {length}", _decode),
    ):
        contenders = {
            f"klfast {precision}": functools.partial(build, name, length, new, settings, precision)
            for precision in PRECISIONS
        }
        contenders["reference bf16"] = functools.partial(build, name, length, new, settings, None)
        yield Group(f"{name} {stage} {title}", {"model": name, "tokens": tokens}, contenders)


@functools.lru_cache(maxsize=1)
def _plain(name: str) -> torch.nn.Module:
    return hymba.build(name)


@functools.lru_cache(maxsize=len(PRECISIONS))  # for prefill, then for decode
def _model(name: str, precision: str) -> tuple[torch.nn.Module, float]:
    model = hymba.variant(_plain(name), precision)
    return model, hymba.error(model)


def _contestant(name: str, settings: Settings, precision: str | None) -> tuple[torch.nn.Module, float]:
    """Return a model and its error; a precision of None is the plain model, whose error is 0."""
    if settings.device != "cpu":
        raise UnavailableError("Hymba is timed on the CPU only")
    return (_plain(name), 0.0) if precision is None else _model(name, precision)


def _prompt(length: int) -> torch.Tensor:
    return torch.randint(0, 512, (1, length), generator=torch.Generator().manual_seed(1))


def _prefill(name: str, length: int, new: int, settings: Settings, precision: str | None) -> Contender:
    model, error = _contestant(name, settings, precision)
    prompt = _prompt(length)

    def call() -> object:
        return (models.prefill if precision is None else models.own_prefill)(model, prompt)

    return _contender(model, call, precision, error, length)


def _decode(name: str, length: int, new: int, settings: Settings, precision: str | None) -> Contender:
    model, error = _contestant(name, settings, precision)
    prompt = _prompt(length)
    if precision is None:
        cache = returned_cache(_model(name, "bf16")[0](prompt, use_cache=True, logits_to_keep=1))
        call = functools.partial(hymba.step_by_step, model, cache, prompt[:, -1:], new)
    else:
        engine = klfast.lower(model)
        state = engine.state()
        engine(prompt, state)
        call = functools.partial(hymba.steps_of_engine, engine, state, prompt[:, -1:], new)
    return _contender(model, call, precision, error, new, models.read_bytes(model) * new)


def _contender(
    model: torch.nn.Module,
    call: Callable[[], object],
    precision: str | None,
    error: float,
    tokens: int,
    nbytes: int = 0,
) -> Contender:
    def run() -> object:
        if precision is not None:
            return call()
        with klfast.using("reference"):
            return call()

    def facts(seconds: float) -> dict[str, float]:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9
        return {
            "tok_s": round(tokens / seconds, 2),
            "weights_mb": round(models.read_bytes(model) / 1e6),
            "memory_gb": round(peak, 2),
        }

    return Contender([run], lambda: error, TOLERANCE, nbytes, facts=facts, copy_nbytes=models.read_bytes(model))


def test_hymba(group, name, run, benchmark):
    run.time("hymba", group, name, benchmark)
