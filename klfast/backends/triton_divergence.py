"""Divergence ops by Triton kernels. They leave sums for each token; the CPU makes the metrics of them, in float64."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from klfast import _C, layouts, ops_divergence, runtime
from klfast.layouts import RELAID, fill_blocks
from klfast.reference_divergence import check_targets, raise_not_finite
from klfast.types import IGNORED_TARGET, Layout, QuantizedTensor

ANCHOR_ENTRIES = 256  # of the vocabulary, for the first anchor
AT_ONCE = 1024  # tokens

# float64 words of csrc/divergence/state.h's State; the last seven are int64 but for the two target logits.
REFERENCE, ANCHOR, SQUARES, MAXIMA, ARGMAX, TARGETS, COLUMNS, HAS_TARGET, RUNS, WORDS = 13, 14, 15, 17, 19, 21, 23, 26, 27, 28
LOG2E = float.fromhex("0x1.715476p+0")  # kLog2e there: the unit of a State's reference


def logit_divergence(teacher, student, targets):
    from klfast.kernels import logit_divergence as kernel
    from klfast.kernels.launch import cores, family

    tokens, vocab = teacher.shape
    check_targets(targets, vocab)
    teacher, student = (t.detach() if t.stride(1) == 1 else t.detach().contiguous() for t in (teacher, student))
    anchor = torch.empty(tokens, device=teacher.device)
    kernel.plan_anchors(teacher, student, anchor).run()
    device = dict(family=family(teacher.device), cores=cores(teacher.device))

    def sums(rows: torch.Tensor | None, anchor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        launch, *found = kernel.plan_sums(teacher, student, rows, anchor, **device)
        launch.run()
        return tuple(found)

    def find_fault(token: int) -> None:
        for who, logits in (("teacher", teacher[token]), ("student", student[token])):
            if not torch.isfinite(logits).all():
                raise_not_finite(who, token, int((~torch.isfinite(logits)).nonzero()[0]))

    picked = None
    if targets is not None:
        index = targets.clamp(min=0).unsqueeze(1)
        picked = torch.cat([logits.gather(1, index).float() for logits in (teacher, student)], 1)
    return finish(sums, find_fault, anchor, vocab, targets, picked)


def linear_divergence(teacher, t_weight, t_scale, t_zero, student, s_weight, s_scale, s_zero, targets, *quantization):
    from klfast.kernels import linear_divergence as kernel
    from klfast.kernels.launch import cores, family

    shape = list(student.shape)
    t_head = _tiled(ops_divergence.as_head(t_weight, t_scale, t_zero, teacher.shape[-1], *quantization[:3]), shape)
    s_head = _tiled(ops_divergence.as_head(s_weight, s_scale, s_zero, student.shape[-1], *quantization[3:]), shape)
    teacher, student = (t.detach().reshape(-1, t.shape[-1]) for t in (teacher, student))
    tokens, vocab, device = student.shape[0], t_head.shape[0], student.device
    check_targets(targets, vocab)
    if not tokens:
        return torch.empty(8, 0, device=device)
    if targets is not None:
        targets = ops_divergence.flat_targets(targets, tokens)
    models = ((teacher, t_head), (student, s_head))
    t_side, s_side = (_side(kernel, hidden, head) for hidden, head in models)
    first = [_level(_rows(head, slice(0, ANCHOR_ENTRIES)), hidden) for hidden, head in models]
    anchor = first[1] - first[0].repeat(tokens // teacher.shape[0])
    options = dict(family=family(device), cores=cores(device))

    def sums(rows: torch.Tensor | None, anchor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        launch, *found = kernel.plan_sums(t_side, s_side, teacher.shape[0], vocab, rows, anchor, **options)
        launch.run()
        return tuple(found)

    def find_fault(token: int) -> None:
        for who, (hidden, head) in zip(("teacher", "student"), models, strict=True):
            logits = _rows(head, slice(None)) @ hidden[token % hidden.shape[0]].float()
            if not torch.isfinite(logits).all():
                raise_not_finite(who, token, int((~torch.isfinite(logits)).nonzero()[0]))

    picked = None if targets is None else torch.stack([_picked(hidden, head, targets) for hidden, head in models], 1)
    return finish(sums, find_fault, anchor, vocab, targets, picked)


def _tiled(head: torch.Tensor | QuantizedTensor, shape: list[int]) -> torch.Tensor | QuantizedTensor:
    """A head as the kernels read it; ``shape`` is the student's, for the warning if a quantized one is not."""
    if not isinstance(head, QuantizedTensor) or head.layout is Layout.TILED:
        return head
    runtime.slow_path("linear_divergence", shape, RELAID, how="with another pass over a head's weight")
    return head.to_layout(Layout.TILED)


def _side(kernel, hidden: torch.Tensor, head: torch.Tensor | QuantizedTensor):
    """What the kernel takes of a model; a quantized head is tiled."""
    if isinstance(head, QuantizedTensor):
        bits, group_size = head.spec.bits, head.spec.group_size
        filled = fill_blocks(hidden, bits, group_size)
        packed, scale, zero_point = (None if t is None else t.contiguous() for t in (head.packed, head.scale, head.zero_point))
        return kernel.Side(_dense_rows(filled), packed, scale, zero_point, head.shape[1], bits, group_size)
    head = head.detach()
    if missing := -hidden.shape[1] % kernel.float_block(hidden.shape[1]):
        hidden, head = F.pad(hidden, (0, missing)), F.pad(head, (0, missing))
    return kernel.Side(_dense_rows(hidden), _dense_rows(head))


def _dense_rows(t: torch.Tensor) -> torch.Tensor:
    return t if t.stride(1) == 1 else t.contiguous()


def _rows(head: torch.Tensor | QuantizedTensor, which: slice | torch.Tensor) -> torch.Tensor:
    """float32 rows of a head, if quantized a tiled one."""
    if isinstance(head, QuantizedTensor):
        every = torch.arange(head.shape[0], device=head.device)
        return layouts.rows(head, every[which]).dequantize(torch.float32)
    return head[which].detach().float()


def _level(rows: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
    """log(sum of e^logit) over some rows of a head, float32 [T]."""
    return torch.cat([torch.logsumexp(some.float() @ rows.T, 1) for some in hidden.split(AT_ONCE)])


def _picked(hidden: torch.Tensor, head: torch.Tensor | QuantizedTensor, targets: torch.Tensor) -> torch.Tensor:
    """Logits of the targets, float32 [T]; of an ignored one that of entry 0."""
    hidden = hidden.repeat(targets.numel() // hidden.shape[0], 1) if targets.numel() != hidden.shape[0] else hidden
    parts = zip(hidden.split(AT_ONCE), targets.clamp(min=0).split(AT_ONCE), strict=True)
    return torch.cat([(some.float() * _rows(head, index)).sum(1) for some, index in parts])


def finish(sums: Callable, find_fault: Callable, anchor: torch.Tensor, vocab: int, targets: torch.Tensor | None, picked: torch.Tensor | None) -> torch.Tensor:
    """Metrics, float32 [8, T].

    Args:
        sums: of (rows int64 [R] or None for all, their anchors), gives what the kernels leave of them: float32 [R, parts,
            N_SUMS] and int32 [R, parts, 2].
        find_fault: of a token, raises if a logit of it is not finite.
        anchor: float32 [T], the first.
        targets, picked: int64 [T] and both models' logits of them [T, 2], or None.
    """
    tokens, device = anchor.numel(), anchor.device
    out = torch.empty(8, tokens)
    rows, runs = None, torch.zeros(tokens, dtype=torch.int64)
    targets = None if targets is None else targets.cpu()
    picked = None if picked is None else picked.cpu().double()
    while anchor.numel():
        parts, index = (t.cpu() for t in sums(None if rows is None else rows.to(device), anchor))
        states = _states(parts.double(), index, anchor.cpu(), vocab)
        here = torch.arange(tokens) if rows is None else rows
        if not torch.isfinite(states[:, :ARGMAX]).all():
            for i in (~torch.isfinite(states[:, :ARGMAX]).all(1)).nonzero().flatten().tolist():
                find_fault(int(here[i]))
        whole = states.view(torch.int64)
        whole[:, RUNS] = runs
        if targets is not None:
            states[:, TARGETS : TARGETS + 2] = picked[here]
            whole[:, HAS_TARGET] = (targets[here] != IGNORED_TARGET).long()
        metrics = torch.empty(8, here.numel())
        fault = torch.empty(here.numel(), dtype=torch.int64)
        again = torch.empty(here.numel(), dtype=torch.bool)
        _C.divergence_finish(states.data_ptr(), here.numel(), vocab, metrics.data_ptr(), fault.data_ptr(), again.data_ptr())
        out[:, here] = metrics
        rows, runs = here[again], whole[again, RUNS]
        anchor = states[again, ANCHOR].float().to(device)
    return out.to(device)


def _states(parts: torch.Tensor, index: torch.Tensor, anchor: torch.Tensor, vocab: int) -> torch.Tensor:
    """float64 [R, WORDS]: the parts of each row put together."""
    assert _C.divergence_state_bytes == 8 * WORDS
    states = torch.zeros(parts.shape[0], WORDS, dtype=torch.float64)
    reference = parts[..., 17].amax(1)
    shrink = torch.exp(parts[..., 17] - reference[:, None])
    states[:, :13] = (parts[..., :13] * shrink[..., None]).sum(1)
    states[:, REFERENCE], states[:, ANCHOR] = reference * LOG2E, anchor
    states[:, SQUARES : SQUARES + 2] = parts[..., 13:15].sum(1)
    states[:, MAXIMA : MAXIMA + 2] = parts[..., 15:17].amax(1)
    is_largest = parts[..., 15:17] == states[:, None, MAXIMA : MAXIMA + 2]
    whole = states.view(torch.int64)
    whole[:, ARGMAX : ARGMAX + 2] = torch.where(is_largest, index, vocab).amin(1).long()
    whole[:, COLUMNS], whole[:, COLUMNS + 2] = vocab, 1  # has_anchor
    return states
