"""The divergence ops: schemas, argument checks, fakes and public wrappers; part of klfast.ops."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from klfast.backends.operands import as_head, flat_targets, head_rows
from klfast.core.dtypes import FLOAT_DTYPES
from klfast.core.errors import InvalidInputError
from klfast.dispatch.checks import public, same_device
from klfast.dispatch.registry import define as _define
from klfast.quant.types import Layout, QuantizedTensor
from klfast.reference import divergence as reference_divergence


@dataclass(frozen=True, eq=False)
class Divergence:
    """Per-token comparison of a student's next-token distribution with a teacher's; each a 1-D float32 tensor [T].

    With p the teacher's probabilities, q the student's, d = student - teacher logits:
        kl_teacher_student  KL(p || q), nats
        kl_student_teacher  KL(q || p), nats
        jsd                 Jensen-Shannon divergence, nats (at most log 2)
        mse                 mean of d^2 over the vocabulary (inf beyond float32's range)
        sqnr_db             10 log10(sum teacher^2 / sum d^2), dB (inf where the logits are equal)
        ce_teacher, ce_student   cross-entropy against ``targets``, nats; None without targets, NaN where ignored (-100)
        top1_agree          1.0 where both have the same most likely token (the lowest index among equals)
    """

    kl_teacher_student: torch.Tensor
    kl_student_teacher: torch.Tensor
    jsd: torch.Tensor
    mse: torch.Tensor
    sqnr_db: torch.Tensor
    ce_teacher: torch.Tensor | None
    ce_student: torch.Tensor | None
    top1_agree: torch.Tensor


# logit_divergence -------------------------------------------------------------------------------------------------


def _check_logit_divergence(teacher, student, targets):
    op = "logit_divergence"
    for who, logits in (("teacher", teacher), ("student", student)):
        if logits.dtype not in FLOAT_DTYPES:
            raise InvalidInputError(f"{op}: {who} logits must be float32, bfloat16 or float16, got {logits.dtype}")
    if teacher.shape != student.shape:
        raise InvalidInputError(
            f"{op}: teacher {list(teacher.shape)} and student {list(student.shape)} logits must have one shape"
        )
    if teacher.dim() != 2 or teacher.shape[-1] == 0:
        raise InvalidInputError(f"{op}: logits must be [T, V] with V at least 1, got {list(teacher.shape)}")
    _check_targets(op, targets, teacher.shape[:-1])
    same_device(op, teacher, student, targets)


def _check_targets(op, targets, *shapes):
    if targets is None:
        return
    if targets.dtype != torch.int64:
        raise InvalidInputError(f"{op}: targets must be int64, got {targets.dtype}")
    if targets.shape not in shapes:
        allowed = " or ".join(str(list(shape)) for shape in dict.fromkeys(shapes))
        raise InvalidInputError(f"{op}: targets must have shape {allowed}, got {list(targets.shape)}")


def _fake_logit_divergence(teacher, student, targets):
    return teacher.new_empty((8, teacher.shape[0]), dtype=torch.float32)


_define(
    "logit_divergence(Tensor teacher, Tensor student, Tensor? targets) -> Tensor",
    check=_check_logit_divergence,
    fake=_fake_logit_divergence,
    reference=reference_divergence.logit_divergence,
)


@public
def logit_divergence(
    teacher_logits: torch.Tensor, student_logits: torch.Tensor, targets: torch.Tensor | None = None
) -> Divergence:
    """Compare two models' next-token distributions, token by token; no KL loses digits to cancellation.

    For KL(p || q) alone this replaces ``(p * (log_p - log_q)).sum(-1)`` with ``log_p, log_q = teacher.log_softmax(-1),
    student.log_softmax(-1)``, right to 1 % at 1e-8 nats, where that expression returns noise, and never negative.

    Logits may have any finite size. Masked entries can hold -1e9, -65504 or ``torch.finfo(dtype).min`` in either model or
    in both; -inf is refused, because the mean squared error would be infinite or undefined. Only the distance of a logit
    to the largest of its token must stay within float32 (3.4e38). An entry 1e-38 times as likely as the likeliest counts
    as impossible, and ``mse`` is inf where it exceeds float32. Tokens for which the models' logits differ by more than 64
    (beyond a constant) where one of them has weight take two to three passes. On GPUs, tokens whose largest logit exceeds
    256, or any logit 1e17, are compared on the CPU, with a SlowPathWarning.

    Args:
        teacher_logits: float32, bfloat16 or float16 [..., V], finite; any strides.
        student_logits: the same shape; its dtype may differ.
        targets: int64 [...], the true next tokens; -100 ignores one (its cross-entropies are NaN).

    Returns:
        A ``Divergence`` of float32 [T], T the product of the leading dimensions.

    Raises:
        InvalidInputError: a wrong dtype, shape, device or target; a NaN or infinity (masked entries of -inf included), or a
            logit too far below its token's largest, naming the model, token and vocabulary entry.
    """
    shape = teacher_logits.shape
    if student_logits.shape != shape or not shape or shape[-1] == 0:  # what [T, V] and [T] below no longer show
        raise InvalidInputError(
            "logit_divergence: teacher and student logits must have one shape, [..., V] with V at least 1, "
            f"got {list(shape)} and {list(student_logits.shape)}"
        )
    _check_targets("logit_divergence", targets, shape[:-1])
    vocab = shape[-1]
    args = (
        teacher_logits.reshape(-1, vocab),
        student_logits.reshape(-1, vocab),
        None if targets is None else targets.reshape(-1),
    )
    return _as_divergence(torch.ops.klfast.logit_divergence.default(*args), targets is not None)


def _as_divergence(metrics: torch.Tensor, with_targets: bool) -> Divergence:
    kl_teacher_student, kl_student_teacher, jsd, mse, sqnr_db, ce_teacher, ce_student, top1_agree = metrics.unbind(0)
    if not with_targets:
        ce_teacher = ce_student = None
    return Divergence(kl_teacher_student, kl_student_teacher, jsd, mse, sqnr_db, ce_teacher, ce_student, top1_agree)


# linear_divergence ------------------------------------------------------------------------------------------------
# A head is (weight, scale, zero_point, bits, group_size, layout): a float matrix with scale None and bits 0, or the
# parts of a QuantizedTensor.


def _check_linear_divergence(
    teacher, t_weight, t_scale, t_zero, student, s_weight, s_scale, s_zero, targets, *quantization
):
    op = "linear_divergence"
    layouts = quantization[2::3]
    for who, hidden, weight, scale, layout in (
        ("teacher", teacher, t_weight, t_scale, layouts[0]),
        ("student", student, s_weight, s_scale, layouts[1]),
    ):
        if hidden.dtype not in FLOAT_DTYPES or (scale is None and weight.dtype not in FLOAT_DTYPES):
            raise InvalidInputError(
                f"{op}: the {who}'s hidden states and head must be float32, bfloat16 or float16, got {hidden.dtype} and {weight.dtype}"
            )
        if hidden.dim() and hidden.shape[-1] == 0:
            raise InvalidInputError(
                f"{op}: the {who}'s hidden states must be [..., H] with H at least 1, got {list(hidden.shape)}"
            )
        if (
            hidden.dim() == 0
            or weight.dim() != (3 if layout == Layout.TILED.value else 2)
            or (scale is None and hidden.shape[-1] != weight.shape[1])
        ):
            raise InvalidInputError(
                f"{op}: the {who}'s hidden states must be [..., H] and its head [V, H], got {list(hidden.shape)} and {list(weight.shape)}"
            )
    t_rows, s_rows = map(head_rows, (t_weight, s_weight), layouts)
    if t_rows != s_rows or t_rows == 0:
        raise InvalidInputError(
            f"{op}: both heads must have the same number of rows, at least 1, got {t_rows} and {s_rows}"
        )
    leading = teacher.dim() - 1
    if student.dim() < teacher.dim() or student.shape[student.dim() - 1 - leading : -1] != teacher.shape[:-1]:
        raise InvalidInputError(
            f"{op}: the student's leading dimensions must end in the teacher's, got {list(student.shape)} and {list(teacher.shape)}"
        )
    _check_targets(op, targets, student.shape[:-1], teacher.shape[:-1])
    same_device(op, teacher, t_weight, t_scale, t_zero, student, s_weight, s_scale, s_zero, targets)


def _fake_linear_divergence(teacher, t_weight, t_scale, t_zero, student, *rest):
    return student.new_empty((8, student.shape[:-1].numel()), dtype=torch.float32)


def _reference_linear_divergence(
    teacher, t_weight, t_scale, t_zero, student, s_weight, s_scale, s_zero, targets, *quantization
):
    t_head = as_head(t_weight, t_scale, t_zero, teacher.shape[-1], *quantization[:3])
    s_head = as_head(s_weight, s_scale, s_zero, student.shape[-1], *quantization[3:])
    teacher, student = teacher.reshape(-1, teacher.shape[-1]), student.reshape(-1, student.shape[-1])
    if targets is not None:
        targets = flat_targets(targets, student.shape[0])
    return reference_divergence.linear_divergence(teacher, t_head, student, s_head, targets)


_define(
    "linear_divergence(Tensor teacher, Tensor t_weight, Tensor? t_scale, Tensor? t_zero, "
    "Tensor student, Tensor s_weight, Tensor? s_scale, Tensor? s_zero, Tensor? targets, "
    "int t_bits, int t_group_size, str t_layout, int s_bits, int s_group_size, str s_layout) -> Tensor",
    check=_check_linear_divergence,
    fake=_fake_linear_divergence,
    reference=_reference_linear_divergence,
)


@public
def linear_divergence(
    teacher_hidden: torch.Tensor,
    teacher_head: torch.Tensor | QuantizedTensor,
    student_hidden: torch.Tensor,
    student_head: torch.Tensor | QuantizedTensor,
    targets: torch.Tensor | None = None,
) -> Divergence:
    """``logit_divergence(teacher_hidden @ teacher_head.T, student_hidden @ student_head.T, targets)`` without the logits.

    The vocabulary passes in blocks; every product is made in float32, whatever the operands' dtypes, and no logit is
    rounded to a smaller one. The logits may have the sizes that ``logit_divergence`` takes.

    Args:
        teacher_hidden: float32, bfloat16 or float16 [..., H], the input of the teacher's head; H at least 1.
        teacher_head: float [V, H], or a QuantizedTensor of that shape.
        student_hidden: float [S..., ..., H]: the teacher broadcasts over leading dimensions that it lacks. On the CPU
            its logits are made once for all S students, on GPUs for each of them. H may differ between the models.
        student_head: float [V, H], or a QuantizedTensor.
        targets: int64, of the student's or the teacher's leading dimensions; -100 ignores a token (NaN).

    Returns:
        A ``Divergence`` of float32 [T], T the product of the student's leading dimensions, in their order.

    Raises:
        InvalidInputError: a wrong dtype, shape, device or target, or a logit that ``logit_divergence`` refuses, named.
    """
    heads = []
    for who, head, hidden in (("teacher", teacher_head, teacher_hidden), ("student", student_head, student_hidden)):
        if isinstance(head, QuantizedTensor):
            if hidden.dim() == 0 or hidden.shape[-1] != head.shape[1]:
                raise InvalidInputError(
                    f"linear_divergence: the {who}'s hidden states must be [..., {head.shape[1]}], got {list(hidden.shape)}"
                )
            heads.append(
                ((head.packed, head.scale, head.zero_point), (head.spec.bits, head.spec.group_size, head.layout.value))
            )
        else:
            heads.append(((head, None, None), (0, 0, "")))
    (teacher, teacher_format), (student, student_format) = heads
    args = (teacher_hidden, *teacher, student_hidden, *student, targets, *teacher_format, *student_format)
    return _as_divergence(torch.ops.klfast.linear_divergence.default(*args), targets is not None)
