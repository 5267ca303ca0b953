"""A random call of each public op."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from drawing import Draw

from klfast import ops


class Call(NamedTuple):
    """A call of an op.

    Attributes:
        function: the op's public function.
        arguments: of it, by name.
        written: the names of tensors that it writes in place.
    """

    function: Callable[..., Any]
    arguments: dict[str, Any]
    written: tuple[str, ...] = ()


def _leading(d: Draw, most: int = 40) -> list[int]:
    """Return the leading dimensions of x, together at most about ``most``."""
    first = d.size(most)
    return d.random.choice(([], [first], [first], [d.size(3, 1), max(first // 3, 1)]))


def dequant_matmul(d: Draw) -> Call:
    n, k = d.size(), d.size()
    qt, bias = d.quantized(n, k, corrected=True), d.maybe(d.normal(n))
    x = d.normal(*_leading(d), k, dtype=torch.float32 if qt.spec.corrected else d.dtype())  # else rounded twice
    activation = d.random.choice(("exact", "int8"))
    return Call(ops.dequant_matmul, dict(x=x, qt=qt, bias=bias, activation=activation))


def grouped_dequant_matmul(d: Draw) -> Call:
    count, n, k = d.size(6, 1), d.size(90), d.size()
    leading = _leading(d, 20)
    index = torch.randint(count, (*leading, d.size(4)))
    arguments = dict(x=d.normal(*leading, k), qt=d.quantized(count * n, k), index=index, count=count)
    return Call(ops.grouped_dequant_matmul, arguments | dict(activation=d.random.choice(("exact", "int8"))))


def linear(d: Draw) -> Call:
    n, k, dtype = d.size(), d.size(), d.dtype()
    x, weight = d.normal(*_leading(d, 90), k, dtype=dtype), d.normal(n, k, dtype=dtype)
    return Call(ops.linear, dict(x=x, weight=weight, bias=d.maybe(d.normal(n)), dtype=d.maybe(d.dtype())))


def decode_attention(d: Draw) -> Call:
    batch, groups, per_group, keys, key_dim = d.size(3), d.size(4, 1), d.size(9, 1), d.size(least=1), d.size(80)
    q = d.normal(batch, groups * per_group, key_dim)
    k, v = d.normal(batch, groups, keys, key_dim), d.normal(batch, groups, keys, d.size(80))
    return Call(ops.decode_attention, dict(q=q, k=k, v=v, scale=d.maybe(d.random.uniform(-0.5, 2))))


def _targets(d: Draw, vocab: int, *shape: int) -> torch.Tensor:
    targets = torch.randint(vocab, shape)
    return torch.where(torch.rand(shape) < 0.1, -100, targets)


def logit_divergence(d: Draw) -> Call:
    leading, vocab = _leading(d, 12), d.size(least=1)
    spread = 10 ** d.random.uniform(-2, 1)
    teacher = d.normal(*leading, vocab, spread=spread)
    student = d.laid_out(teacher.float() + 10 ** d.random.uniform(-4, 1) * torch.randn(teacher.shape), d.dtype())
    targets = _targets(d, vocab, *leading)
    return Call(ops.logit_divergence, dict(teacher_logits=teacher, student_logits=student, targets=targets))


def linear_divergence(d: Draw) -> Call:
    tokens, vocab = d.size(12), d.size(least=1)
    students = [d.size(3)] if d.chance(0.3) else []
    arguments = {}
    for who, shape in (("teacher", [tokens]), ("student", [*students, tokens])):
        width = d.size(90, 1)
        arguments[f"{who}_hidden"] = d.normal(*shape, width)
        dense = d.normal(vocab, width, spread=width**-0.5)
        arguments[f"{who}_head"] = dense if d.chance(0.6) else d.quantized(vocab, width)
    targets = d.maybe(_targets(d, vocab, *d.random.choice(([tokens], [*students, tokens]))))
    return Call(ops.linear_divergence, arguments | dict(targets=targets))


def gathered_logits(d: Draw) -> Call:
    students, tokens, width, vocab = _leading(d, 6), d.size(9), d.size(), d.size(least=1)
    hidden, head = d.normal(*students, tokens, width), d.normal(vocab, width)
    return Call(ops.gathered_logits, dict(hidden=hidden, head=head, rows=torch.randint(vocab, (tokens, d.size(40)))))


def _index(d: Draw, *shape: int) -> torch.Tensor:
    """Return numbers of sequences that rise along each row, after negative ones (padding)."""
    batch, length = shape
    rows = [sorted(d.random.randint(0, 4) for _ in range(length)) for _ in range(batch)]
    index = torch.tensor(rows, dtype=torch.int32).view(shape)
    index[:, : d.size(length + 1) - 1 if d.chance(0.3) and length else 0] = -1
    return index


def _limits(d: Draw, length: int) -> torch.Tensor:
    """Return the limits of sequences, of which some may be empty, from 0 to ``length``."""
    inner = sorted(d.random.randint(0, length) for _ in range(d.random.randint(0, 3)))
    return torch.tensor([0, *inner, length])


def causal_conv1d(d: Draw) -> Call:
    batch, channels, length, width = d.size(3), d.size(), d.size(120), d.size(8, 1)
    x, weight, bias = d.normal(batch, channels, length), d.normal(channels, width), d.maybe(d.normal(channels))
    state = d.maybe(d.normal(batch, channels, width - 1))
    activation = d.random.choice((None, "silu"))
    arguments = dict(x=x, weight=weight, bias=bias, initial_states=state, activation=activation)
    if d.chance(0.2):
        return Call(ops.causal_conv1d_fn, arguments | dict(seq_idx=_index(d, batch, length)))
    if d.chance(0.3):
        out = d.normal(batch, channels, width - 1, written=True)
        return Call(ops.causal_conv1d_fn, arguments | dict(final_states_out=out), ("final_states_out",))
    return Call(ops.causal_conv1d_fn, arguments | dict(return_final_states=d.chance(0.5)))


def _slots(d: Draw, batch: int) -> tuple[torch.Tensor, int]:
    """Return a state for each of a batch, or -1, and how many states there are."""
    count = batch + d.random.randint(1, 3)
    slots = torch.randperm(count)[:batch]
    return torch.where(torch.rand(batch) < 0.2, -1, slots).to(d.random.choice((torch.int32, torch.int64))), count


def causal_conv1d_update(d: Draw) -> Call:
    batch, channels, width = d.size(5), d.size(), d.size(6, 1)
    length = [] if d.chance(0.5) else [d.size(9)]
    slots, count = _slots(d, batch) if d.chance(0.4) else (None, batch)
    seen = torch.randint(1000, (batch,)) if d.chance(0.4) else None
    held = max(width - 1, 1) + d.size(4)
    arguments = dict(
        x=d.normal(batch, channels, *length),
        conv_state=d.normal(count, channels, held, written=True),
        weight=d.normal(channels, width),
        bias=d.maybe(d.normal(channels)),
        activation=d.random.choice((None, "silu")),
        cache_seqlens=seen,
        conv_state_indices=slots,
    )
    return Call(ops.causal_conv1d_update, arguments, ("conv_state",))


def causal_conv1d_varlen_states(d: Draw) -> Call:
    length, channels = d.size(), d.size()
    arguments = dict(x=d.normal(length, channels), cu_seqlens=_limits(d, length), state_len=d.size(9))
    return Call(ops.causal_conv1d_varlen_states, arguments)


def selective_scan(d: Draw) -> Call:
    batch, groups, states, length = d.size(2), d.size(3, 1), d.size(40), d.size(40)
    channels = groups * d.size(30)

    def shared() -> torch.Tensor:
        kinds = [(batch, groups, states, length)] * 2 + [(channels, states)] + [(batch, states, length)] * (groups == 1)
        return d.normal(*d.random.choice(kinds))

    softplus = d.chance(0.7)
    delta_shape = (batch, channels, length)
    arguments = dict(
        u=d.normal(batch, channels, length),
        delta=d.normal(*delta_shape) if softplus else d.between(0, 1, *delta_shape),
        A=d.between(-4, 0, channels, states),
        B=shared(),
        C=shared(),
        D=d.maybe(d.normal(channels)),
        z=d.maybe(d.normal(batch, channels, length)),
        delta_bias=d.maybe(d.between(0, 1, channels)),
        initial_states=d.maybe(d.normal(batch, channels, states)),
        delta_softplus=softplus,
        return_last_state=d.chance(0.5),
    )
    if groups != 1 and any(arguments[name].dim() == 2 for name in "BC"):
        arguments |= dict(B=d.normal(batch, groups, states, length), C=d.normal(batch, groups, states, length))
    return Call(ops.selective_scan_fn, arguments)


def selective_state_update(d: Draw) -> Call:
    batch, groups, dim, states = d.size(4), d.size(3, 1), d.size(80), d.size(70)
    with_heads = d.chance(0.6)
    heads = [groups * d.size(4, 1)] if with_heads else []
    slots, count = _slots(d, batch) if d.chance(0.4) else (None, batch)
    softplus = d.chance(0.7)
    group = [groups] if with_heads else []
    channels = (*heads, dim)
    arguments = dict(
        state=d.normal(count, *channels, states, written=True),
        x=d.normal(batch, *channels),
        dt=d.normal(batch, *channels) if softplus else d.between(0, 1, batch, *channels),
        A=d.between(-4, 0, *channels, states),
        B=d.normal(batch, *group, states),
        C=d.normal(batch, *group, states),
        D=d.maybe(d.normal(*channels)),
        z=d.maybe(d.normal(batch, *channels)),
        dt_bias=d.maybe(d.between(0, 1, *channels)),
        dt_softplus=softplus,
        state_batch_indices=slots,
    )
    return Call(ops.selective_state_update, arguments, ("state",))


def mamba_chunk_scan(d: Draw) -> Call:
    packed = d.chance(0.2)
    batch, length, groups = 1 if packed else d.size(2), d.size(90), d.size(3, 1)
    heads, dim, states = groups * d.size(3, 1), d.size(40), d.size(70)
    softplus = d.chance(0.7)
    arguments = dict(
        x=d.normal(batch, length, heads, dim),
        dt=d.normal(batch, length, heads) if softplus else d.between(0, 1, batch, length, heads),
        A=d.between(-4, 0, heads),
        B=d.normal(batch, length, groups, states),
        C=d.normal(batch, length, groups, states),
        chunk_size=64,
        D=d.maybe(d.normal(heads) if d.chance(0.5) else d.normal(heads, dim)),
        z=d.maybe(d.normal(batch, length, heads, dim)),
        dt_bias=d.maybe(d.between(0, 1, heads)),
        initial_states=d.maybe(d.normal(batch, heads, dim, states)),
        dt_softplus=softplus,
        dt_limit=d.random.choice(((0.0, math.inf), (0.1, 0.5))),
        return_final_states=d.chance(0.5),
    )
    if packed:
        arguments |= dict(cu_seqlens=_limits(d, length), return_varlen_states=d.chance(0.5))
    return Call(ops.mamba_chunk_scan_combined, arguments)


def gated_delta_rule(d: Draw) -> Call:
    batch, length, groups, key_dim, value_dim = d.size(2), d.size(50), d.size(3, 1), d.size(70, 1), d.size(70)
    heads = groups * d.size(3, 1)
    by_channel = d.chance(0.5)
    arguments = dict(
        q=d.normal(batch, length, groups, key_dim, spread=key_dim**-0.5),
        k=d.normal(batch, length, groups, key_dim, spread=key_dim**-0.5),
        v=d.normal(batch, length, heads, value_dim),
        g=d.between(-3, 0, batch, length, heads, *([key_dim] if by_channel else [])),
        beta=d.between(0, 1, batch, length, heads),
        scale=d.maybe(d.random.uniform(0, 2)),
        use_qk_l2norm_in_kernel=d.chance(0.7),
    )
    if d.chance(0.5):
        state = d.normal(batch, heads, key_dim, value_dim, written=True)
        return Call(ops.gated_delta_rule_update, arguments | dict(state=state), ("state",))
    names = (
        ("chunk_kda", "fused_recurrent_kda")
        if by_channel
        else ("chunk_gated_delta_rule", "fused_recurrent_gated_delta_rule")
    )
    state = d.maybe(d.normal(batch, heads, key_dim, value_dim))
    arguments |= dict(initial_state=state, output_final_state=d.chance(0.5))
    return Call(getattr(ops, d.random.choice(names)), arguments)


def rms_norm(d: Draw) -> Call:
    group, groups = d.size(90, 1), d.size(5, 1)
    leading, channels = _leading(d), group * groups
    spread = 10 ** d.random.uniform(-3, 1)
    arguments = dict(
        x=d.normal(*leading, channels, spread=spread),
        weight=d.normal(channels),
        gate=d.maybe(d.normal(*leading, channels)),
        eps=d.random.choice((1e-6, 1e-5, 0.5)),
        group_size=d.maybe(group),
        norm_before_gate=d.chance(0.5),
        gate_activation=d.random.choice(("silu", "sigmoid")),
        weight_offset=d.random.choice((0.0, 1.0)),
    )
    return Call(ops.rms_norm, arguments)


CALLS = (
    dequant_matmul,
    dequant_matmul,
    dequant_matmul,
    grouped_dequant_matmul,
    linear,
    linear,
    decode_attention,
    logit_divergence,
    linear_divergence,
    gathered_logits,
    causal_conv1d,
    causal_conv1d_update,
    causal_conv1d_varlen_states,
    selective_scan,
    selective_state_update,
    mamba_chunk_scan,
    gated_delta_rule,
    rms_norm,
)
