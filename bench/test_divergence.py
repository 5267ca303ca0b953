"""Divergence of two models' predictions over Mamba's vocabulary, against torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F

from klfast import ops, quantize
from klfast.backends import operands
from klfast.benchkit.runner import Contender, Group, distance
from klfast.benchkit.settings import Settings
from klfast.ops.divergence import Divergence
from klfast.quant.spec import QuantSpec
from klfast.reference import divergence as reference_divergence

from . import machine
from .test_linear import require_kernel

HEAD = QuantSpec(8, 128)
Compute = Callable[[], torch.Tensor]  # the KL per token


def groups(settings: Settings) -> Iterator[Group]:
    tokens, vocab, hidden = (64, 4096, 256) if settings.quick else (512, 50280, 2048)
    yield Group(
        f"logits {tokens}x{vocab}", {"tokens": tokens, "vocab": vocab}, _of_logits(tokens, vocab, settings.device)
    )
    facts = {"tokens": tokens, "vocab": vocab, "hidden": hidden}
    yield Group(
        f"heads {tokens}x{hidden}x{vocab}",
        facts,
        _of_heads(tokens, vocab, hidden, settings.device),
        flops=4.0 * tokens * vocab * hidden,
    )


def _of_logits(tokens: int, vocab: int, device: str) -> dict[str, Callable[[], Contender]]:
    def draw() -> tuple[torch.Tensor, torch.Tensor]:
        teacher = 3 * torch.randn(tokens, vocab, device=device)
        return teacher, teacher + 0.1 * torch.randn_like(teacher)

    def klfast() -> Contender:
        teacher, student = draw()
        require_kernel("logit_divergence", teacher)
        return _contender(
            lambda: ops.logit_divergence(teacher, student), _truth(teacher, student), 1e-4, 2 * teacher.nbytes, device
        )

    def torch_kl() -> Contender:
        teacher, student = draw()
        return _contender(lambda: kl(teacher, student), _truth(teacher, student), 1e-2, 2 * teacher.nbytes, device)

    return {"klfast": klfast, "torch KL": torch_kl}


def _of_heads(tokens: int, vocab: int, hidden: int, device: str) -> dict[str, Callable[[], Contender]]:
    def draw() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        teacher = torch.randn(tokens, hidden, device=device).bfloat16()
        head = (3 * torch.randn(vocab, hidden, device=device) / hidden**0.5).bfloat16()
        student = (teacher.float() + 0.05 * torch.randn(tokens, hidden, device=device)).bfloat16()
        return teacher, head, student, (head.float() + 0.003 * torch.randn(vocab, hidden, device=device)).bfloat16()

    def truth(teacher: torch.Tensor, head: torch.Tensor, student: torch.Tensor, other: torch.Tensor) -> Compute:
        return _truth(teacher.float() @ head.float().T, student.float() @ other.float().T)

    def klfast() -> Contender:
        drawn = draw()
        require_kernel("linear_divergence", drawn[0])
        return _contender(lambda: ops.linear_divergence(*drawn), truth(*drawn), 1e-3, 0, device)

    def klfast_quantized() -> Contender:
        teacher, head, student, other = draw()
        require_kernel("linear_divergence", teacher)
        rounded = quantize(other, HEAD).to_layout(operands.preferred_layout(teacher.device, HEAD))
        return _contender(
            lambda: ops.linear_divergence(teacher, head, student, rounded),
            truth(teacher, head, student, rounded.dequantize(torch.float32)),
            1e-3,
            0,
            device,
        )

    def products(dtype: torch.dtype) -> Callable[[], Contender]:
        def built() -> Contender:
            teacher, head, student, other = (t.to(dtype) for t in draw())
            # Their result is F.linear's own; a KL computed from bfloat16 logits would be far from the truth.
            return Contender([lambda: (F.linear(teacher, head), F.linear(student, other))], lambda: 0.0, 0.0)

        return built

    def torch_kl() -> Contender:
        teacher, head, student, other = (t.float() for t in draw())
        return _contender(
            lambda: kl(F.linear(teacher, head), F.linear(student, other)),
            truth(teacher, head, student, other),
            1e-2,
            0,
            device,
        )

    return {
        "klfast": klfast,
        "klfast, student int8": klfast_quantized,
        "torch bf16 products alone": products(torch.bfloat16),
        "torch fp32 products alone": products(torch.float32),
        "torch fp32 products and KL": torch_kl,
    }


def kl(teacher: torch.Tensor, student: torch.Tensor) -> torch.Tensor:
    """Return KL(teacher || student) of each token, as usually written in torch."""
    return F.kl_div(student.log_softmax(-1), teacher.log_softmax(-1), log_target=True, reduction="none").sum(-1)


def _truth(teacher: torch.Tensor, student: torch.Tensor) -> Compute:
    # On the CPU, since some GPUs lack the reference's float64.
    return lambda: reference_divergence.logit_divergence(teacher.cpu(), student.cpu(), None)[0]


def _contender(
    call: Callable[[], Divergence | torch.Tensor], truth: Compute, allowed: float, nbytes: int, device: str
) -> Contender:
    def error() -> float:
        found = call()
        return distance(found.kl_teacher_student if isinstance(found, Divergence) else found, truth())

    return Contender(
        [call], error, allowed, nbytes, facts=lambda _: {"extra_mb": round(machine.memory_peak(call, device), 2)}
    )


def test_divergence(group, name, run, benchmark):
    run.time("divergence", group, name, benchmark)
