"""The divergence ops: schemas, argument checks, fakes and public wrappers; part of klfast.ops."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from klfast.backends.operands import DivergenceArgs, flat_targets, head_parts
from klfast.core.dtypes import FLOAT_DTYPES, FLOAT_NAMES
from klfast.core.errors import InvalidInputError
from klfast.dispatch.arguments import GatheredLogits, schema
from klfast.dispatch.checks import check_sizes, public, same_device
from klfast.dispatch.registry import define
from klfast.quant.tensor import QuantizedTensor
from klfast.reference import divergence as reference_divergence


@dataclass(frozen=True, eq=False)
class Divergence:
    """Per-token comparison of a student's next-token distribution with a teacher's; each metric is float32 [T].

    With p the teacher's probabilities, q the student's, d = student - teacher logits:
        kl_teacher_student  KL(p || q), nats
        kl_student_teacher  KL(q || p), nats
        jsd                 Jensen-Shannon divergence, nats (at most log 2)
        mse                 mean of d^2 over the vocabulary (inf beyond float32's range)
        sqnr_db             10 log10(sum teacher^2 / sum d^2), dB (inf where the logits are equal)
        ce_teacher, ce_student   cross-entropy against ``targets``, nats; None without targets, NaN where ignored (-100)
        top1_agree          1.0 where both have the same most likely token (the lowest index among ties)
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
            raise InvalidInputError(f"{op}: {who} logits must be {FLOAT_NAMES}, got {logits.dtype}")
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


logit_divergence_op = define(
    "logit_divergence(Tensor teacher, Tensor student, Tensor? targets) -> Tensor",
    check=_check_logit_divergence,
    fake=_fake_logit_divergence,
    reference=reference_divergence.logit_divergence,
)


@public
def logit_divergence(
    teacher_logits: torch.Tensor, student_logits: torch.Tensor, targets: torch.Tensor | None = None
) -> Divergence:
    """Compare two models' next-token distributions, token by token, without cancellation in the KL divergences.

    For KL(p || q) alone this replaces ``(p * (log_p - log_q)).sum(-1)`` with ``log_p, log_q = teacher.log_softmax(-1),
    student.log_softmax(-1)``. The result is never negative, and right to 1 % at 1e-8 nats, where that expression
    returns noise.

    Logits may have any finite size. Masked entries can hold -1e9, -65504 or ``torch.finfo(dtype).min`` in either model
    or in both; -inf is refused, because the mean squared error would be infinite or undefined. Only the difference
    between a logit and its token's largest must stay within float32 (3.4e38). An entry 1e-38 times as likely as the
    most likely one counts as impossible, and ``mse`` is inf where it exceeds float32. Tokens for which the models'
    logits differ by more than 64 (beyond a constant) where one of them has weight take two to three passes. On GPUs,
    tokens whose largest logit exceeds 256, or any logit 1e17, are compared on the CPU, with a SlowPathWarning.

    Args:
        teacher_logits: float32, bfloat16 or float16 [..., V], finite; any strides.
        student_logits: the same shape; its dtype may differ.
        targets: int64 [...], the true next tokens; -100 ignores one (its cross-entropies are NaN).

    Returns:
        A ``Divergence`` of float32 [T], T the product of the leading dimensions.

    Raises:
        InvalidInputError: a wrong dtype, shape, device or target; a NaN or infinity (including masked entries of -inf),
            or a logit too far below its token's largest; names the model, token and vocabulary entry.
    """
    shape = teacher_logits.shape
    if student_logits.shape != shape or not shape or shape[-1] == 0:  # no longer visible in [T, V] and [T] below
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
    return _as_divergence(logit_divergence_op(*args), targets is not None)


def _as_divergence(metrics: torch.Tensor, with_targets: bool) -> Divergence:
    kl_teacher_student, kl_student_teacher, jsd, mse, sqnr_db, ce_teacher, ce_student, top1_agree = metrics.unbind(0)
    return Divergence(
        kl_teacher_student,
        kl_student_teacher,
        jsd,
        mse,
        sqnr_db,
        ce_teacher if with_targets else None,
        ce_student if with_targets else None,
        top1_agree,
    )


# linear_divergence ------------------------------------------------------------------------------------------------
# A head is the list of its tensors with its rows, format and layout; both texts are empty for a float matrix.


def _check_linear_divergence(args: DivergenceArgs) -> None:
    op = "linear_divergence"
    teacher, t_head, student, s_head, targets = args
    for who, hidden, head in (("teacher", teacher, t_head), ("student", student, s_head)):
        head_type = head.dtype if isinstance(head, torch.Tensor) else head.spec
        if hidden.dtype not in FLOAT_DTYPES or (isinstance(head, torch.Tensor) and head_type not in FLOAT_DTYPES):
            raise InvalidInputError(
                f"{op}: the {who}'s hidden states and head must be {FLOAT_NAMES}, got {hidden.dtype} and {head_type}"
            )
        if hidden.dim() and hidden.shape[-1] == 0:
            raise InvalidInputError(
                f"{op}: the {who}'s hidden states must be [..., H] with H at least 1, got {list(hidden.shape)}"
            )
        if hidden.dim() == 0 or len(head.shape) != 2 or hidden.shape[-1] != head.shape[1]:
            raise InvalidInputError(
                f"{op}: the {who}'s hidden states must be [..., H] and its head [V, H], "
                f"got {list(hidden.shape)} and {list(head.shape)}"
            )
    if t_head.shape[0] != s_head.shape[0] or t_head.shape[0] == 0:
        raise InvalidInputError(
            f"{op}: both heads must have the same number of rows, at least 1, "
            f"got {t_head.shape[0]} and {s_head.shape[0]}"
        )
    leading = teacher.dim() - 1
    if student.dim() < teacher.dim() or student.shape[student.dim() - 1 - leading : -1] != teacher.shape[:-1]:
        raise InvalidInputError(
            f"{op}: the student's leading dimensions must end in the teacher's, "
            f"got {list(student.shape)} and {list(teacher.shape)}"
        )
    _check_targets(op, targets, student.shape[:-1], teacher.shape[:-1])
    same_device(op, teacher, *head_parts(t_head)[0], student, *head_parts(s_head)[0], targets)


def _fake_linear_divergence(args: DivergenceArgs) -> torch.Tensor:
    return args.student.new_empty((8, args.student.shape[:-1].numel()), dtype=torch.float32)


def _reference_linear_divergence(args: DivergenceArgs) -> torch.Tensor:
    teacher, student, targets = args.teacher, args.student, args.targets
    teacher, student = teacher.reshape(-1, teacher.shape[-1]), student.reshape(-1, student.shape[-1])
    if targets is not None:
        targets = flat_targets(targets, student.shape[0])
    return reference_divergence.linear_divergence(teacher, args.t_head, student, args.s_head, targets)


linear_divergence_op = define(
    "linear_divergence(Tensor teacher, Tensor[] t_head, Tensor student, Tensor[] s_head, Tensor? targets, "
    "int t_rows, str t_format, str t_layout, int s_rows, str s_format, str s_layout) -> Tensor",
    check=_check_linear_divergence,
    fake=_fake_linear_divergence,
    reference=_reference_linear_divergence,
    arguments=DivergenceArgs.of,
    formats=DivergenceArgs.formats,
)


@public
def linear_divergence(
    teacher_hidden: torch.Tensor,
    teacher_head: torch.Tensor | QuantizedTensor,
    student_hidden: torch.Tensor,
    student_head: torch.Tensor | QuantizedTensor,
    targets: torch.Tensor | None = None,
) -> Divergence:
    """Compute ``logit_divergence(teacher_hidden @ teacher_head.T, student_hidden @ student_head.T, targets)``.

    The logits are never stored: the vocabulary is processed in blocks. Every product is in float32, whatever the
    operands' dtypes, and no logit is rounded to a narrower type. The logits may be as large as ``logit_divergence``
    allows.

    Args:
        teacher_hidden: float32, bfloat16 or float16 [..., H], the input of the teacher's head; H at least 1.
        teacher_head: float [V, H], or a QuantizedTensor of that shape.
        student_hidden: float [S..., ..., H]: the teacher broadcasts over leading dimensions that it lacks. Its
            logits are computed once for all S students on the CPU, once per student on GPUs. H may differ between the
            models.
        student_head: float [V, H], or a QuantizedTensor.
        targets: int64, of the student's or the teacher's leading dimensions; -100 ignores a token (NaN).

    Returns:
        A ``Divergence`` of float32 [T], T the product of the student's leading dimensions, in their order.

    Raises:
        InvalidInputError: a wrong dtype, shape, device or target, or a logit that ``logit_divergence`` refuses.
    """
    for who, head, hidden in (("teacher", teacher_head, teacher_hidden), ("student", student_head, student_hidden)):
        if isinstance(head, QuantizedTensor) and (hidden.dim() == 0 or hidden.shape[-1] != head.shape[1]):
            raise InvalidInputError(
                f"linear_divergence: the {who}'s hidden states must be [..., {head.shape[1]}], got {list(hidden.shape)}"
            )
    (teacher, of_teacher), (student, of_student) = head_parts(teacher_head), head_parts(student_head)
    args = (teacher_hidden, teacher, student_hidden, student, targets, *of_teacher, *of_student)
    return _as_divergence(linear_divergence_op(*args), targets is not None)


# gathered_logits --------------------------------------------------------------------------------------------------


def _check_gathered_logits(a: GatheredLogits) -> None:
    op, sizes = "gathered_logits", dict[str, int]()
    check_sizes(op, sizes, hidden=(a.hidden, "STH"), head=(a.head, "VH"))
    if a.rows.dtype != torch.int64 or a.rows.dim() != 2 or a.rows.shape[0] != sizes["T"]:
        raise InvalidInputError(
            f"{op}: rows must be int64 [{sizes['T']}, J], got {str(a.rows.dtype)[6:]} {list(a.rows.shape)}"
        )
    same_device(op, a.hidden, a.rows)


def _fake_gathered_logits(a: GatheredLogits) -> torch.Tensor:
    return a.hidden.new_empty((*a.hidden.shape[:2], a.rows.shape[1]), dtype=torch.float32)


gathered_logits_op = define(
    schema("gathered_logits", GatheredLogits, "Tensor"),
    arguments=GatheredLogits,
    check=_check_gathered_logits,
    fake=_fake_gathered_logits,
    reference=reference_divergence.gathered_logits,
)


@public
def gathered_logits(hidden: torch.Tensor, head: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Return logits of a few vocabulary entries, which differ from token to token, without those of the others.

    Rows of the head are read in place, once a token for all students; no copy of them is made.

    Args:
        hidden: float32, bfloat16 or float16 [S..., T, H], hidden states of S students at T tokens.
        head: float32, bfloat16 or float16 [V, H].
        rows: int64 [T, J], rows of the head for each token; any may occur twice.

    Returns:
        float32 [S..., T, J], every product and sum in float32. A row that the head lacks gives NaN on GPUs.

    Raises:
        InvalidInputError: a wrong dtype, shape or device; on the CPU a row that the head lacks.
    """
    if hidden.dim() < 2:
        raise InvalidInputError(f"gathered_logits: hidden must be [..., T, H], got {list(hidden.shape)}")
    students = hidden.shape[:-2]
    found = gathered_logits_op(hidden.reshape(students.numel(), *hidden.shape[-2:]), head, rows)
    return found.view(*students, *found.shape[1:])
