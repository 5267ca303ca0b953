"""Divergence ops by Triton kernels, which reduce each token to sums of parts of the vocabulary.

The extension turns these into metrics in float64. Tokens whose logits are not finite, or too large for the kernels
(beyond 256 at the top, or 1e17 anywhere), go to the CPU's kernel, which raises or compares them.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F

from klfast import _C
from klfast.backends.cpu import divergence as cpu_divergence
from klfast.backends.cpu.extension import address
from klfast.backends.operands import DivergenceArgs, flat_targets
from klfast.dispatch import pins
from klfast.dispatch.arguments import GatheredLogits
from klfast.quant.layouts import RELAID, Layout, fill_blocks
from klfast.quant.tensor import QuantizedTensor
from klfast.reference.divergence import IGNORED_TARGET, check_targets

ANCHOR_ENTRIES = 256  # of the vocabulary, for the first anchor
AT_ONCE = 1024  # tokens
LOGITS_AT_ONCE = 1 << 24  # of both models: 64 MB, which an H100's second-level cache mostly holds
# Hidden states [T, K] and a head [V, K], tiled if quantized.
Model = tuple[torch.Tensor, torch.Tensor | QuantizedTensor]


def logit_divergence(teacher: torch.Tensor, student: torch.Tensor, targets: torch.Tensor | None) -> torch.Tensor:
    """Compare logits [T, V]: metrics, float32 [8, T]."""
    from klfast.kernels import logit_divergence as kernel
    from klfast.kernels.launch import cores, family

    tokens, vocab = teacher.shape
    check_targets(targets, vocab)
    if not tokens:
        return torch.empty(8, 0, device=student.device)
    teacher, student = (t.detach() if t.stride(1) == 1 else t.detach().contiguous() for t in (teacher, student))
    device = dict(family=family(teacher.device), cores=cores(teacher.device))

    def sums(rows: torch.Tensor | None, anchor: torch.Tensor | None) -> Found:
        if anchor is None:
            anchor = _first_anchors(teacher, student)
        launch, *found = kernel.plan_sums(teacher, student, rows, anchor, **device)
        launch.run()
        return *found, anchor

    def logits(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return teacher[rows], student[rows]

    picked = None
    if targets is not None:
        index = targets.clamp(min=0).unsqueeze(1)
        picked = torch.cat([each.gather(1, index).float() for each in (teacher, student)], 1)
    return finish("logit_divergence", list(student.shape), sums, logits, vocab, targets, picked, student.device)


def linear_divergence(args: DivergenceArgs) -> torch.Tensor:
    """Compare products with heads: metrics, float32 [8, S * T]."""
    from klfast.kernels.launch import family

    teacher, student, targets = args.teacher, args.student, args.targets
    shape = list(student.shape)
    t_head, s_head = _tiled(args.t_head, shape), _tiled(args.s_head, shape)
    teacher, student = (t.detach().reshape(-1, t.shape[-1]) for t in (teacher, student))
    tokens, vocab, device = student.shape[0], t_head.shape[0], student.device
    check_targets(targets, vocab)
    if not tokens:
        return torch.empty(8, 0, device=device)
    if targets is not None:
        targets = flat_targets(targets, tokens)
    models = ((teacher, t_head), (student, s_head))
    sums = _sums_in_one_kernel(*models) if family(device) == "intel" else _sums_of_products(*models)

    def logits(rows: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(hidden[rows % hidden.shape[0]].float() @ _rows(head, slice(None)).T for hidden, head in models)

    picked = None if targets is None else torch.stack([_picked(hidden, head, targets) for hidden, head in models], 1)
    return finish("linear_divergence", shape, sums, logits, vocab, targets, picked, device)


def gathered_logits(a: GatheredLogits) -> torch.Tensor:
    """Multiply hidden states with rows of a head: float32 [S, T, J]."""
    from klfast.kernels import gathered_logits as kernel

    out = torch.empty(*a.hidden.shape[:2], a.rows.shape[1], device=a.hidden.device)
    kernel.plan(a.hidden.detach(), a.head.detach(), a.rows, out).run()
    return out


# Results for R rows: sums float32 [R, parts, N_SUMS], both argmaxes int32 [R, parts, 2], anchors float32 [R].
Found = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
# Takes rows int64 [R] and their anchors; None for all of the student's rows and for first anchors.
Sums = Callable[[torch.Tensor | None, torch.Tensor | None], Found]


def _first_anchors(teacher: torch.Tensor, student: torch.Tensor) -> torch.Tensor:
    """Return first anchors, float32 [S * T], from some logits [T, V] and [S * T, V]."""
    from klfast.kernels import logit_divergence as kernel

    anchor = torch.empty(student.shape[0], device=student.device)
    kernel.plan_anchors(teacher, student, anchor).run()
    return anchor


def _sums_in_one_kernel(teacher: Model, student: Model) -> Sums:
    from klfast.kernels import linear_divergence as kernel
    from klfast.kernels.launch import cores

    (n_teacher, _), (vocab, _), device = teacher[0].shape, teacher[1].shape, student[0].device
    sides = [_side(kernel, *model) for model in (teacher, student)]

    def sums(rows: torch.Tensor | None, anchor: torch.Tensor | None) -> Found:
        if anchor is None:
            first = [_level(_rows(head, slice(0, ANCHOR_ENTRIES)), hidden) for hidden, head in (teacher, student)]
            anchor = first[1] - first[0].repeat(first[1].numel() // n_teacher)
        launch, *found = kernel.plan_sums(*sides, n_teacher, vocab, rows, anchor, cores=cores(device))
        launch.run()
        return *found, anchor

    return sums


def _sums_of_products(teacher: Model, student: Model) -> Sums:
    """Sum over logits computed for so few vocabulary entries at a time that they stay in the GPU's cache."""
    from klfast.kernels import logit_divergence as kernel
    from klfast.kernels.launch import cores, family

    vocab, device = student[1].shape[0], student[0].device
    options = dict(family=family(device), cores=cores(device))

    def sums(rows: torch.Tensor | None, anchor: torch.Tensor | None) -> Found:
        hidden = (
            [teacher[0], student[0]] if rows is None else [teacher[0][rows % teacher[0].shape[0]], student[0][rows]]
        )
        entries = max(LOGITS_AT_ONCE // sum(map(len, hidden)) // 512, 1) * 512
        found = []
        for first in range(0, vocab, entries):
            logits = [
                _product(some, head, first, min(first + entries, vocab))
                for some, (_, head) in zip(hidden, (teacher, student), strict=True)
            ]
            if anchor is None:
                anchor = _first_anchors(*logits)
            launch, some, index = kernel.plan_sums(*logits, None, anchor, **options)
            launch.run()
            found.append((some, index + first))
        assert anchor is not None  # the vocabulary is not empty
        return torch.cat([some for some, _ in found], 1), torch.cat([index for _, index in found], 1), anchor

    return sums


def _product(hidden: torch.Tensor, head: torch.Tensor | QuantizedTensor, first: int, end: int) -> torch.Tensor:
    """Return float32 logits [T, end - first] of part of a head, tiled if quantized; 16-bit products are exact."""
    if isinstance(head, QuantizedTensor):
        from klfast.backends.triton.matmul import dequant_product

        y = torch.empty(hidden.shape[0], end - first, device=hidden.device)
        dequant_product(hidden, head.block(first, end).parts, None, y, head.shape[1], head.spec)
        return y
    head = head[first:end].detach().T
    if hidden.is_cuda and hidden.dtype == head.dtype != torch.float32:
        return torch.mm(hidden, head, out_dtype=torch.float32)
    return hidden.float() @ head.float()


def _tiled(head: torch.Tensor | QuantizedTensor, shape: list[int]) -> torch.Tensor | QuantizedTensor:
    """Return a head as the kernels read it; ``shape`` is the student's, for the warning if it must be converted."""
    if not isinstance(head, QuantizedTensor) or head.layout is Layout.TILED:
        return head
    pins.slow_path("linear_divergence", shape, RELAID, how="with another pass over a head's weight")
    return head.to_layout(Layout.TILED)


def _side(kernel, hidden: torch.Tensor, head: torch.Tensor | QuantizedTensor):
    """Return a model as the kernel takes it; a quantized head is tiled."""
    from klfast.kernels.dequant_matmul import Weight

    if isinstance(head, QuantizedTensor):
        filled = fill_blocks(hidden, head.spec.bits, head.spec.group_size)
        weight = Weight(*(part.contiguous() for part in head.parts), k=head.shape[1], spec=head.spec)
        return kernel.Side(_dense_rows(filled), weight)
    head = head.detach()
    if missing := -hidden.shape[1] % kernel.float_block(hidden.shape[1]):
        hidden, head = F.pad(hidden, (0, missing)), F.pad(head, (0, missing))
    return kernel.Side(_dense_rows(hidden), _dense_rows(head))


def _dense_rows(t: torch.Tensor) -> torch.Tensor:
    return t if t.stride(1) == 1 else t.contiguous()


def _rows(head: torch.Tensor | QuantizedTensor, which: slice | torch.Tensor) -> torch.Tensor:
    """Return float32 rows of a head, tiled if quantized."""
    if isinstance(head, QuantizedTensor):
        return head.rows(torch.arange(head.shape[0], device=head.device)[which])
    return head[which].detach().float()


def _level(rows: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
    """Return log(sum of e^logit) over some rows of a head, float32 [T]."""
    return torch.cat([torch.logsumexp(some.float() @ rows.T, 1) for some in hidden.split(AT_ONCE)])


def _picked(hidden: torch.Tensor, head: torch.Tensor | QuantizedTensor, targets: torch.Tensor) -> torch.Tensor:
    """Return the targets' logits, float32 [T]; entry 0's for an ignored target."""
    hidden = hidden.repeat(targets.numel() // hidden.shape[0], 1) if targets.numel() != hidden.shape[0] else hidden
    parts = zip(hidden.split(AT_ONCE), targets.clamp(min=0).split(AT_ONCE), strict=True)
    return torch.cat([(some.float() * _rows(head, index)).sum(1) for some, index in parts])


def finish(
    op: str,
    shape: list[int],
    sums: Sums,
    logits: Callable,
    vocab: int,
    targets: torch.Tensor | None,
    picked: torch.Tensor | None,
    device: torch.device,
) -> torch.Tensor:
    """Return the metrics, float32 [8, T].

    Args:
        op, shape: the op and its student's shape, for a warning.
        sums: see ``Sums``.
        logits: returns both models' logits, float [R, V], of rows int64 [R].
        vocab: the size of the vocabulary.
        targets, picked: int64 [T] and both models' logits of them [T, 2], or None.
        device: of the result.
    """
    if targets is not None and picked is not None:
        targets = targets.cpu()
        picked = picked.cpu().double().masked_fill((targets == IGNORED_TARGET).unsqueeze(1), math.nan)
    parts, index, anchor = (t.cpu() for t in sums(None, None))
    runs = torch.zeros(anchor.numel(), dtype=torch.int64)
    out, verdict = _metrics(parts, index, vocab, picked, anchor, runs)
    rows, wide = torch.arange(verdict.numel()), []
    while verdict.any():
        wide.append(rows[verdict == _C.divergence_wide])
        again = verdict == _C.divergence_again
        rows, anchor, runs = rows[again], anchor[again], runs[again]
        if not rows.numel():
            break
        parts, index, _ = (t.cpu() for t in sums(rows.to(device), anchor.to(device)))
        out[:, rows], verdict = _metrics(parts, index, vocab, None if picked is None else picked[rows], anchor, runs)
    for some in torch.cat(wide).sort().values.split(AT_ONCE // 16) if wide else ():
        if some.numel():
            teacher, student = (t.cpu() for t in logits(some.to(device)))
            out[:, some] = cpu_divergence.compare(teacher, student, None if targets is None else targets[some], some)
            pins.slow_path(
                op,
                shape,
                f"some logits exceed the range of the {device.type} kernels",
                how="on the CPU for some tokens",
            )
    return out.to(device)


def _metrics(
    parts: torch.Tensor,
    index: torch.Tensor,
    vocab: int,
    picked: torch.Tensor | None,
    anchor: torch.Tensor,
    runs: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return metrics float32 [8, R] and verdicts int8 [R], 0 for valid ones; update ``anchor`` and ``runs`` [R]."""
    count = anchor.numel()
    metrics, verdict = torch.empty(8, count), torch.empty(count, dtype=torch.int8)
    _C.divergence_from_parts(
        parts.data_ptr(),
        index.data_ptr(),
        count,
        parts.shape[1],
        vocab,
        address(picked),
        anchor.data_ptr(),
        runs.data_ptr(),
        metrics.data_ptr(),
        verdict.data_ptr(),
        torch.get_num_threads(),
    )
    return metrics, verdict
