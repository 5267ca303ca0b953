"""Pins of implementations, environment variables, and the rule against silent slow paths."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch  # noqa: F401 (before the extension, which then shares its OpenMP library)

from klfast.core.errors import InvalidInputError, KernelUnavailableError, SlowPathWarning

try:
    from klfast import _C
except ImportError as error:
    _C = None  # type: ignore[assignment]
    _MISSING = f"the extension klfast._C cannot be imported ({error})."

CPU_TIERS: tuple[str, ...] = _C.tiers if _C else ("scalar",)  # csrc/core/tiers.def; every build has that one
_ANY_TIER = -1  # as csrc/core/tiers.h has it
IMPLEMENTATIONS = ("reference", *CPU_TIERS, "triton")
NO_GRADIENTS = "klfast's functions have no gradients; use torch.inference_mode()."  # a reason for slow_path

_process_pin = os.environ.get("KLFAST_ISA")  # read once: reading the environment takes as long as a small op
_pin: ContextVar[str | None] = ContextVar("klfast_pin", default=None)
_warned: set[tuple[str, str]] = set()


def why_not(tier: str) -> str:
    """Return why a CPU tier cannot run on this machine, one sentence; empty if it can."""
    return _C.why_not(CPU_TIERS.index(tier)) if _C else _MISSING


def _check(name: str, source: str) -> str:
    if name not in IMPLEMENTATIONS and _C:
        raise InvalidInputError(f"{source}: unknown implementation {name!r}; choose from {', '.join(IMPLEMENTATIONS)}")
    if name not in ("reference", "triton") and (reason := why_not(name)):
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
    kernel of the pinned tier runs the best one that the tier falls back to.

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
    """Return the CPU tiers that this machine runs, the best last."""
    return [tier for tier in CPU_TIERS if not why_not(tier)]


def cpu_tier_limit() -> int:
    """Return the index in CPU_TIERS of the pinned tier, -1 without one ("triton" does not limit CPU tensors)."""
    pin = pinned()
    return _ANY_TIER if pin is None or pin not in CPU_TIERS else CPU_TIERS.index(pin)


def may_run(tier: str) -> bool:
    """Return True if CPU kernels of a tier may run now: the machine can, and a pin is that tier or falls back to it."""
    return not why_not(tier) and _C.allows(cpu_tier_limit(), CPU_TIERS.index(tier))


def interprets_triton() -> bool:
    """Return True if Triton kernels can run on CPU tensors: TRITON_INTERPRET=1, set before Triton was imported."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def forget_warnings() -> None:
    """Forget which SlowPathWarnings were given, so that each may be given again."""
    _warned.clear()


def slow_path(op: str, shape: object, reason: str, how: str = "the slow plain-torch reference") -> None:
    """Warn once per (op, reason) that the reference, or the path named by ``how``, runs; raise if KLFAST_STRICT=1."""
    message = f"{op} {shape} runs {how}: {reason}"
    if os.environ.get("KLFAST_STRICT") == "1":
        raise KernelUnavailableError(f"{message} (KLFAST_STRICT=1 forbids it)")
    if (op, reason) not in _warned:
        _warned.add((op, reason))
        warnings.warn(message, SlowPathWarning, stacklevel=3)
