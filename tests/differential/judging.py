"""One case: draw a call by its number, make it at some tier, and compare its results with float64 and with promises."""

from __future__ import annotations

import math
import random
from contextlib import nullcontext
from typing import Any

import torch
from calls import CALLS, Call
from drawing import LARGEST, Draw
from float64 import results, rounded_before, truth
from ties import agreement_is_possible

from klfast import KlfastError, QuantizedTensor, ops, using
from klfast.dispatch import pins

_NEARBY = 2.0**-18  # how far float32 may move an operand: 64 roundings
_DEPEND_ON_THREADS = (ops.linear, ops.logit_divergence, ops.linear_divergence)  # the first where torch multiplies
_MSE, _SQNR = 3, 4  # results of the divergences
_CHANGED = 4  # random changes of the operands, of which the largest effect counts


def fault(number: int, op: str | None = None) -> str | None:
    """Return what is wrong with the result of a case, None if nothing is.

    Args:
        number: of the case; all that is random comes from it.
        op: the case's op, a name in ``calls``; a random one by default.
    """
    torch.manual_seed(number)
    d = Draw(random.Random(number)).with_special_values(0.15)
    tier = d.random.choice((None, *pins.available_tiers()))
    make = d.random.choice([each for each in CALLS if op in (None, each.__name__)])
    call = make(d)
    complaint = _complaint(d, call, tier)
    return complaint and f"case {number} ({describe(call)}, tier {tier}): {complaint}"


def _complaint(d: Draw, call: Call, tier: str | None) -> str | None:
    found, expected = _outcome(_copied(call), tier), _outcome(rounded_before(_copied(call)), None, in_float64=True)
    if isinstance(found, str) or isinstance(expected, str):
        return None if found == expected else f"{found!r:.200} where the reference gives {expected!r:.200}"
    for i, (one, exact) in enumerate(zip(found, expected, strict=True)):
        if one.shape != exact.shape:
            return f"result {i} is {list(one.shape)} instead of {list(exact.shape)}"
    rounding = [_rounding(call, i, one) for i, one in enumerate(found)]
    every = list(zip(found, expected, rounding, strict=True))
    wrong = [i for i, each in enumerate(every) if not _close(*each).all()]
    if wrong and (complaint := _not_near(call, every, wrong)):
        return complaint
    return _broken_promise(d, call, tier, found)


def _copied(call: Call) -> Call:
    """Return the call with copies of what it writes, in memory of the same kind."""
    fresh = {}
    for name in call.written:
        t = call.arguments[name]
        memory = t.new_empty(0).set_(t.untyped_storage()).clone()
        fresh[name] = memory.as_strided(t.shape, t.stride(), t.storage_offset())
    return call._replace(arguments=call.arguments | fresh)


def _outcome(call: Call, tier: str | None, in_float64: bool = False) -> list[torch.Tensor] | str:
    """Return a call's results, or the kind of klfast's error."""
    try:
        if in_float64:
            return truth(call)
        with nullcontext() if tier is None else using(tier):
            return results(call)
    except KlfastError as error:
        return type(error).__name__


def _rounding(call: Call, i: int, found: torch.Tensor) -> tuple[float, float]:
    """Return the relative and the absolute error that result i may have whatever the operands are."""
    if not found.is_floating_point():
        return 0.0, 0.0
    if call.function in (ops.logit_divergence, ops.linear_divergence):  # of KL, KL, JSD, MSE, SQNR, cross-entropies
        return 3e-5, (1e-13, 1e-13, 1e-13, 1e-37, 1e-4, 1e-6, 1e-6, 0.0)[i]
    dtypes = {found.dtype, call.arguments["x"].dtype} if call.function is ops.linear else {found.dtype}
    relative = max(torch.finfo(dtype).eps for dtype in dtypes) + 2.0**-20
    return relative, max(torch.finfo(dtype).smallest_normal for dtype in dtypes) + 1e-30


def _close(found: torch.Tensor, exact: torch.Tensor, rounding: tuple[float, float], more: Any = 0.0) -> torch.Tensor:
    """Return where a result is right: as NaN or infinite as in float64, or within rounding and what is added to it."""
    if not found.is_floating_point():
        return found == exact
    relative, absolute = rounding
    most = torch.finfo(found.dtype).max
    error = (found.double() - exact).abs()
    overflown = (exact.abs() > 0.99 * most) & (found.abs() > 0.98 * most) & (found.sign() == exact.sign())
    same = (found.isnan() & exact.isnan()) | (found == exact) | overflown
    return same | (error <= relative * exact.abs() + absolute + more)


def _not_near(call: Call, every: list[tuple[torch.Tensor, torch.Tensor, Any]], wrong: list[int]) -> str | None:
    """Compare again, and allow for what small changes of the operands do to the results: how well they are defined."""
    plain = _outcome(_copied(call), "reference")
    assert not isinstance(plain, str)
    effects = [torch.zeros_like(exact) for _, exact, _ in every]
    for _ in range(_CHANGED):
        changed = truth(_moved(rounded_before(_copied(call))))
        for effect, one, (_, exact, _) in zip(effects, changed, every, strict=True):
            torch.maximum(effect, (one - exact).abs().nan_to_num(0.0, 0.0), out=effect)
    effects[0] += _of_offsets(call)
    flushed = truth(rounded_before(_copied(_flushed(call))))
    is_divergence = call.function in (ops.logit_divergence, ops.linear_divergence)
    one_by_one = 0.0 if is_divergence else LARGEST * 2.0**-24  # equal terms are all rounded the same way
    if is_divergence:
        effects[-1].zero_()  # agreement: what is largest in float32 is so in float64
    for i in wrong:
        found, exact, rounding = every[i]
        right = _close(found, exact, rounding, effects[i] + one_by_one * exact.abs())
        right |= _close(found, flushed[i], rounding, effects[i])
        # What overflows in float32 alone, and in which order, is not promised.
        right |= (~plain[i].isfinite() & exact.isfinite()) | (~found.isfinite() & (plain[i].abs() > 1e37))
        if is_divergence and i == _SQNR:  # squares below float32's range: no dB
            of_noise = (exact > 300) | (every[_MSE][1] < 1e-37)
            right |= ((found == math.inf) & of_noise) | ((found == -math.inf) & (exact < -300))
        if call.function is ops.linear_divergence and i == len(every) - 1:
            right |= agreement_is_possible(found.bool(), call, _NEARBY)
        if "delta" in call.function.__name__ or "kda" in call.function.__name__:  # has q k^T, not S, times infinite v
            right |= ~found.isfinite() & ~exact.isfinite()
        if call.function is ops.mamba_chunk_scan_combined and not (call.arguments["A"] <= 0).all():
            right |= found.isfinite() & exact.isnan()  # no state before the first token, so no 0 times its decay
        if not right.all():
            at = tuple((~right).nonzero()[0].tolist())
            values = ", ".join(f"{t[at].item():.9g}" for t in (found, exact, plain[i], effects[i]))
            return f"result {i} at {at} of {list(right.shape)}: got, float64, plain float32, allowed: {values}"
    return None


def _of_offsets(call: Call) -> torch.Tensor | float:
    """Return what rounding costs where codes and zero points are multiplied apart: some of the last bits of both."""
    qt, x = call.arguments.get("qt"), call.arguments.get("x")
    if qt is None or qt.spec.corrected or not qt.scale.numel():
        return 0.0
    sums = x.double().abs().nan_to_num(0.0, 0.0).sum(-1)[(..., *[None] * (2 if "index" in call.arguments else 1))]
    return sums * float(qt.scale.abs().max()) * 2.0 ** (qt.spec.bits - 22)


def _flushed(call: Call) -> Call:
    """Return the call with 0 for numbers below float32's normal ones, as which kernels may count them."""

    def flushed(t: Any) -> Any:
        if not isinstance(t, torch.Tensor) or not t.is_floating_point():
            return t
        return torch.where(t.float().abs() < torch.finfo(torch.float32).tiny, 0.0, t)

    return call._replace(arguments={name: flushed(a) for name, a in call.arguments.items()})


def _moved(call: Call) -> Call:
    """Return the call with each float operand in float32, changed by some roundings of it."""

    def moved(t: Any) -> Any:
        if isinstance(t, QuantizedTensor) and call.function is ops.linear_divergence:
            t = t.dequantize(torch.float32)
        if not isinstance(t, torch.Tensor) or not t.is_floating_point():
            return t
        return t.float() * (1 + _NEARBY * torch.randn(t.shape))

    return call._replace(arguments={name: moved(a) for name, a in call.arguments.items()})


def _broken_promise(d: Draw, call: Call, tier: str | None, found: list[torch.Tensor]) -> str | None:
    """Check that operands are as before, that nothing else was written, and that other ways give the same bits."""
    for memory, view, before in d.memories:
        if any(view is call.arguments[name] for name in call.written):
            continue
        if not same_bits(memory, before):
            return f"an operand of shape {list(view.shape)} was written to"
    copied = _copied(call)
    with nullcontext() if tier is None else using(tier):
        results(copied)
    for name in call.written:
        view = copied.arguments[name]
        memory = view.new_empty(0).set_(view.untyped_storage())
        outside = torch.ones_like(memory, dtype=torch.bool)
        outside.as_strided(view.shape, view.stride(), view.storage_offset()).fill_(False)
        original = call.arguments[name]
        before = original.new_empty(0).set_(original.untyped_storage())
        if not same_bits(memory[outside], before[outside]):
            return f"memory outside {name} was written to"
    other = "threads"
    before_threads = torch.get_num_threads()
    if d.chance(0.1) and call.function not in _DEPEND_ON_THREADS:
        try:
            torch.set_num_threads(d.random.choice((1, 2, 3)))
            again = _outcome(_copied(call), tier)
        finally:
            torch.set_num_threads(before_threads)
    elif call.arguments.get("activation") == "int8" and call.arguments["x"].dtype == torch.float32:
        other = d.random.choice(pins.available_tiers())
        again = _outcome(_copied(call), other)
    else:
        return None
    if not all(same_bits(a, b) for a, b in zip(found, again, strict=True)):
        return f"other bits with other {other}" if other == "threads" else f"other bits at {other}"
    return None


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Return True if two tensors are equal, NaN being equal to NaN."""
    return bool(((a == b) | (a.isnan() & b.isnan())).all())


def describe(call: Call) -> str:
    """Return the call in one line: names, shapes, strides, dtypes."""

    def text(a: Any) -> str:
        if isinstance(a, torch.Tensor):
            return f"{str(a.dtype)[6:]}{list(a.shape)} strides {list(a.stride())}"
        return f"{a.spec.text} {list(a.shape)}" if hasattr(a, "spec") else repr(a)

    given = ", ".join(f"{name}={text(a)}" for name, a in call.arguments.items() if a is not None)
    return f"{call.function.__name__}: {given}"
