"""CPU kernels of the divergence ops."""

from __future__ import annotations

import torch

from klfast import _C
from klfast.backends.cpu.extension import DTYPE_CODES, address, resources, view
from klfast.backends.cpu.matmul import FORMATS as MATMUL_FORMATS
from klfast.backends.cpu.matmul import dequant_matmul_into, linear_into
from klfast.backends.operands import DivergenceArgs, flat_targets
from klfast.dispatch import pins
from klfast.dispatch.arguments import GatheredLogits
from klfast.quant.layouts import Layout
from klfast.quant.tensor import QuantizedTensor
from klfast.reference.divergence import check_rows, check_targets, raise_not_finite, raise_too_large

_BLOCK_ROWS, _BLOCK_COLUMNS = 512, 512  # of the two scratch blocks of logits: 1 MB each


def logit_divergence(teacher: torch.Tensor, student: torch.Tensor, targets: torch.Tensor | None) -> torch.Tensor:
    """Compare logits [T, V]: metrics, float32 [8, T]."""
    check_targets(targets, teacher.shape[1])
    return compare(teacher, student, targets, torch.arange(teacher.shape[0]))


def compare(
    teacher: torch.Tensor, student: torch.Tensor, targets: torch.Tensor | None, rows: torch.Tensor
) -> torch.Tensor:
    """Return the metrics, float32 [8, T], of logits [T, V]; ``rows`` int64 [T] numbers their tokens in errors."""
    tokens, vocab = teacher.shape
    targets = None if targets is None else targets.contiguous()
    out = torch.empty(8, tokens)
    fault = torch.zeros(tokens, dtype=torch.int64)
    _C.logit_divergence(
        _matrix(teacher),
        _matrix(student),
        tokens,
        vocab,
        address(targets),
        out.data_ptr(),
        fault.data_ptr(),
        *resources(),
    )
    _raise_fault(fault, rows)
    return out


def linear_divergence(args: DivergenceArgs) -> torch.Tensor:
    """Compare products with heads, block by block: metrics, float32 [8, S * T]."""
    teacher, t_head, student, s_head, targets = args
    same_head, same_hidden = _same_head(t_head, s_head), _same(teacher, student)
    t_head = _plain(t_head)
    s_head = t_head if same_head else _plain(s_head)
    dtype = _operands(teacher, t_head, student, s_head)
    teacher = teacher.detach().reshape(-1, teacher.shape[-1]).to(dtype).contiguous()
    student = teacher if same_hidden else student.detach().reshape(-1, student.shape[-1]).to(dtype).contiguous()
    tokens, vocab = student.shape[0], t_head.shape[0]
    check_targets(targets, vocab)
    if targets is not None:
        targets = flat_targets(targets, tokens).contiguous()
    out = torch.empty(8, tokens)
    states = torch.zeros(tokens, _C.divergence_state_bytes, dtype=torch.uint8)
    rows = torch.arange(tokens)
    if tokens:
        _accumulate(teacher, t_head, student, s_head, targets, states)
    while rows.numel():
        metrics = torch.empty(8, rows.numel())
        fault = torch.empty(rows.numel(), dtype=torch.int64)
        again = torch.empty(rows.numel(), dtype=torch.bool)
        _C.divergence_finish(
            states.data_ptr(), rows.numel(), vocab, metrics.data_ptr(), fault.data_ptr(), again.data_ptr()
        )
        _raise_fault(fault, rows)
        out[:, rows] = metrics
        rows, states = rows[again], states[again]  # these states hold only a better anchor
        if rows.numel():
            some_targets = None if targets is None else targets[rows]
            some = student[rows]
            _accumulate(
                some if same_hidden else teacher[rows % teacher.shape[0]], t_head, some, s_head, some_targets, states
            )
    return out


def gathered_logits(a: GatheredLogits) -> torch.Tensor:
    """Multiply hidden states with rows of a head: float32 [S, T, J]."""
    check_rows(a.rows, a.head.shape[0])
    (students, tokens, features), entries = a.hidden.shape, a.rows.shape[1]
    rows, out = a.rows.contiguous(), torch.empty(students, tokens, entries)
    sizes = (students, tokens, entries, features)
    _C.gathered_logits(view(a.hidden), view(a.head), address(rows), address(out), *sizes, *resources())
    return out


def _operands(
    teacher: torch.Tensor,
    t_head: torch.Tensor | QuantizedTensor,
    student: torch.Tensor,
    s_head: torch.Tensor | QuantizedTensor,
) -> torch.dtype:
    """Return the dtype of the products' operands.

    float32, or bfloat16 where all operands have it and the CPU supports it natively: bfloat16 products are exact in the
    float32 accumulator, so no digit is lost. The integers of a quantized head are exact in bfloat16.
    """
    native = pins.may_run("avx512bf16")
    fit = all(
        t.spec.format.name in MATMUL_FORMATS if isinstance(t, QuantizedTensor) else t.dtype == torch.bfloat16
        for t in (teacher, student, t_head, s_head)
    )
    return torch.bfloat16 if native and fit else torch.float32


def _plain(head: torch.Tensor | QuantizedTensor) -> torch.Tensor | QuantizedTensor:
    return head.to_layout(Layout.PLAIN) if isinstance(head, QuantizedTensor) else head


def _same_head(a: torch.Tensor | QuantizedTensor, b: torch.Tensor | QuantizedTensor) -> bool:
    if isinstance(a, QuantizedTensor) and isinstance(b, QuantizedTensor):
        return a.stored == b.stored and all(map(_same, a.parts, b.parts))
    return isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) and _same(a, b)


def _same(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
    """Return True if both are one tensor: the same view of the same memory."""
    return a is b or (a is not None and b is not None and a.dtype == b.dtype and a.is_set_to(b))


def _accumulate(
    teacher: torch.Tensor,
    t_head: torch.Tensor | QuantizedTensor,
    student: torch.Tensor,
    s_head: torch.Tensor | QuantizedTensor,
    targets: torch.Tensor | None,
    states: torch.Tensor,
) -> None:
    """Add the whole vocabulary to each student token's state, a block of columns and teacher tokens at a time.

    A block's teacher logits serve all S students; a student that is the teacher itself needs no logits of its own.
    """
    n_teacher, vocab = teacher.shape[0], t_head.shape[0]
    students = student.shape[0] // n_teacher
    rows = min(_BLOCK_ROWS, n_teacher)
    alone = student is teacher and s_head is t_head
    scratch = torch.empty(2, rows, min(_BLOCK_COLUMNS, vocab))
    for first in range(0, vocab, _BLOCK_COLUMNS):
        columns = min(_BLOCK_COLUMNS, vocab - first)
        t_block = _block(t_head, first, columns, teacher.dtype)
        s_block = t_block if s_head is t_head else _block(s_head, first, columns, teacher.dtype)
        for start in range(0, n_teacher, rows):
            stop = min(start + rows, n_teacher)
            t_logits = block_logits(teacher[start:stop], t_block, scratch[0])
            for s in range(students):
                some = slice(s * n_teacher + start, s * n_teacher + stop)
                s_logits = t_logits if alone else block_logits(student[some], s_block, scratch[1])
                some_targets = None if targets is None else targets[some]
                _C.divergence_accumulate(
                    _matrix(t_logits),
                    _matrix(s_logits),
                    stop - start,
                    columns,
                    first,
                    address(some_targets),
                    states[some].data_ptr(),
                    *resources(),
                )


def _block(
    head: torch.Tensor | QuantizedTensor, first: int, columns: int, dtype: torch.dtype
) -> torch.Tensor | QuantizedTensor:
    """Return rows of a head for products with hidden states in ``dtype``."""
    end = first + columns
    rows = head.block(first, end) if isinstance(head, QuantizedTensor) else head[first:end].detach()
    if dtype == torch.bfloat16:
        return rows
    return rows.dequantize(torch.float32) if isinstance(rows, QuantizedTensor) else rows.float()


def block_logits(hidden: torch.Tensor, head: torch.Tensor | QuantizedTensor, scratch: torch.Tensor) -> torch.Tensor:
    """Return float32 logits [rows, columns] of hidden states and a block of a head, in ``scratch``."""
    out = scratch.flatten()[: hidden.shape[0] * head.shape[0]].view(hidden.shape[0], head.shape[0])
    if isinstance(head, QuantizedTensor):
        dequant_matmul_into(out, hidden, head.parts, None, head.stored)
    elif hidden.dtype == torch.float32:
        torch.mm(hidden, head.T, out=out)
    else:
        linear_into(out, hidden, head, rounded_to=torch.float32)
    return out


def _matrix(t: torch.Tensor) -> tuple[int, ...]:
    return t.data_ptr(), DTYPE_CODES[t.dtype], *t.stride()


def _raise_fault(fault: torch.Tensor, rows: torch.Tensor) -> None:
    if not fault.any():
        return
    token = int(fault.nonzero()[0])
    code = int(fault[token])
    column, student = divmod(abs(code) - 1, 2)
    refuse = raise_not_finite if code > 0 else raise_too_large
    refuse("student" if student else "teacher", int(rows[token]), column)
