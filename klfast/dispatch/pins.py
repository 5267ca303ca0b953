"""Pins of implementations, environment variables, and the rule against silent slow paths."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from klfast.core.errors import InvalidInputError, KernelUnavailableError, SlowPathWarning

CPU_TIERS = ("scalar", "avx2", "avxvnni", "avx512vnni", "avx512bf16", "amx")  # ascending, as in csrc/core/tiers.h
_ALL_TIERS = len(CPU_TIERS) - 1
IMPLEMENTATIONS = ("reference", *CPU_TIERS, "triton")

_process_pin = os.environ.get("KLFAST_ISA")  # read once: reading the environment takes as long as a small op
_pin: ContextVar[str | None] = ContextVar("klfast_pin", default=None)
_warned: set[tuple[str, str]] = set()


def why_not(tier: str) -> str:
    """Return why a CPU tier cannot run on this machine, one sentence; empty if it can."""
    try:
        from klfast import _C
    except ImportError as error:
        return f"the extension klfast._C cannot be imported ({error})."
    return _C.why_not(CPU_TIERS.index(tier))


def _check(name: str, source: str) -> str:
    if name not in IMPLEMENTATIONS:
        raise InvalidInputError(f"{source}: unknown implementation {name!r}; choose from {', '.join(IMPLEMENTATIONS)}")
    if name in CPU_TIERS and (reason := why_not(name)):
        raise KernelUnavailableError(f"{source}: {name} cannot run here: {reason}")
    return name


def pinned() -> str | None:
    """Return the implementation pinned by ``using`` or, at klfast's import, by KLFAST_ISA; None if none is."""
    pin = _pin.get()
    if pin is None and _process_pin:
        pin = _check(_process_pin, "KLFAST_ISA")
    return pin


@contextmanager
def using(implementation: str) -> Iterator[None]:
    """Pin the implementation of every op in this block (and thread): ``"reference"``, a CPU tier or ``"triton"``.

    Tensors on a GPU use "triton" anyway; with TRITON_INTERPRET=1 it works for tensors on the CPU, too. An op without a
    kernel of the pinned tier runs its best one below it.

    Raises:
        InvalidInputError: an unknown name.
        KernelUnavailableError: this machine cannot run it; the message says why.
    """
    token = _pin.set(_check(implementation, "using"))
    try:
        yield
    finally:
        _pin.reset(token)


def available_tiers() -> list[str]:
    """Return the CPU tiers that this machine runs, ascending."""
    return [tier for tier in CPU_TIERS if not why_not(tier)]


def cpu_tier_limit() -> int:
    """Return the index in CPU_TIERS of the highest tier that a CPU kernel may use now."""
    pin = pinned()
    if pin is None or pin not in CPU_TIERS:  # "triton" does not limit CPU tensors
        return _ALL_TIERS
    return CPU_TIERS.index(pin)


def interprets_triton() -> bool:
    """Return True if Triton kernels can run on CPU tensors: TRITON_INTERPRET=1, set before Triton was imported."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def slow_path(op: str, shape: object, reason: str, how: str = "the slow plain-torch reference") -> None:
    """Warn once per (op, reason) that the reference, or whatever ``how`` names, runs; raise under KLFAST_STRICT=1."""
    message = f"{op} {shape} runs {how}: {reason}"
    if os.environ.get("KLFAST_STRICT") == "1":
        raise KernelUnavailableError(f"{message} (KLFAST_STRICT=1 forbids it)")
    if (op, reason) not in _warned:
        _warned.add((op, reason))
        warnings.warn(message, SlowPathWarning, stacklevel=3)
