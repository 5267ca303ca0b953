"""Divergences of logits, and of hidden states through heads."""

from __future__ import annotations

import math
from collections.abc import Iterator

import test_divergence
import test_gathered_logits
import torch
from triton_launches import FLOATS, OTHER_SPECS, SPECS

import klfast
from klfast import Layout, QuantSpec
from xpu.cases.case import ROUNDING, Case, error

OF_METRICS = 3e-5
OF_PRODUCTS = 1e-4  # metrics of logits that are sums of float32 products themselves


def cases() -> Iterator[Case]:
    yield from logit_divergence()
    yield from linear_divergence()
    for dtype in FLOATS.values():
        yield gathered_case(5, 7, dtype)


def error_of_metrics(found: klfast.Divergence, truth: dict[str, torch.Tensor]) -> float:
    """Return the largest error of all metrics, each relative to its value."""
    each = [
        ((getattr(found, name).double() - value).abs() / value.abs().clamp_min(1e-12)).nan_to_num(nan=math.inf)
        for name, value in truth.items()
    ]
    return float(torch.stack(each).max())


def gathered_case(students: int, tokens: int, dtype: torch.dtype) -> Case:
    def run() -> float:
        hidden, head = torch.randn(students, tokens, 99), torch.randn(1601, 99).to(dtype)
        index = torch.randint(1601, (tokens, 33))
        return error(klfast.ops.gathered_logits(hidden, head, index), test_gathered_logits.truth(hidden, head, index))

    return Case(f"gathered_logits, {str(dtype)[6:]}", f"{students} x {tokens} x 99", run, ROUNDING[torch.float32])


def logit_divergence() -> Iterator[Case]:
    for dtype in FLOATS.values():
        for vocab in (50280, 1601):
            yield logits_case(vocab, dtype)
        yield logits_case(50280, dtype, misleading=True)


def logits_case(vocab: int, dtype: torch.dtype, misleading: bool = False) -> Case:
    def run() -> float:
        teacher = 3 * torch.randn(3, vocab)
        student = teacher + 0.3 * torch.randn(3, vocab)
        if misleading:  # where the first anchor comes from: the rows run again
            student[:2, :2048] -= 20
            teacher[:2, 3000], student[:2, 3000] = 25, 25.5
        teacher, student, targets = teacher.to(dtype), student.to(dtype), torch.tensor([5, 0, vocab - 1])
        return error_of_metrics(
            klfast.logit_divergence(teacher, student, targets), test_divergence.truth(teacher, student, targets)
        )

    return Case(
        f"logit_divergence, {str(dtype)[6:]}",
        f"{vocab} entries{', misleading first ones' if misleading else ''}",
        run,
        OF_METRICS,
    )


def linear_divergence() -> Iterator[Case]:
    for dtype in FLOATS.values():
        for spec in (None, *SPECS, *(OTHER_SPECS[:1] if dtype is torch.float32 else ())):
            yield heads_case(16, 104, 2048, dtype, spec)
        yield heads_case(13, 77, 70, dtype, QuantSpec(4, 32, False))
    yield heads_case(13, 4300, 96, torch.bfloat16, None, cores=100)
    yield heads_case(16, 104, 2048, torch.bfloat16, SPECS[0], teacher=torch.float32)


def heads_case(
    tokens: int,
    vocab: int,
    features: int,
    dtype: torch.dtype,
    spec: QuantSpec | None,
    cores: int = 1,
    teacher: torch.dtype | None = None,
) -> Case:
    def run() -> float:
        hidden, head = torch.randn(tokens, features), 2 * torch.randn(vocab, features) / features**0.5
        noisy, other = (
            hidden + 0.1 * torch.randn(tokens, features),
            head + 0.1 * torch.randn(vocab, features) / features**0.5,
        )
        hidden, head, noisy, other = (
            hidden.to(teacher or dtype),
            head.to(teacher or dtype),
            noisy.to(dtype),
            other.to(dtype),
        )
        plain = other
        if spec is not None:
            other = klfast.quantize(other.float(), spec).to_layout(Layout.TILED)
            plain = other.dequantize(torch.float32)
        targets = torch.randint(0, vocab, (tokens,))
        found = klfast.linear_divergence(hidden, head, noisy, other, targets)
        logits = (hidden.double() @ head.double().T, noisy.double() @ plain.double().T)
        return error_of_metrics(found, test_divergence.truth(*logits, targets))

    heads = f"{spec or 'float head'}{f', teacher {teacher}' if teacher else ''}"
    name = f"{tokens} tokens, {vocab} entries, {features} features, {heads}"
    return Case(f"linear_divergence, {str(dtype)[6:]}", name, run, OF_PRODUCTS, cores)
