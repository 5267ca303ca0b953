"""A valid call of each public op with all its tensors, as keywords, and the torch.library op that it dispatches to."""

from __future__ import annotations

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from klfast import ops
from klfast.quant.rounding import quantize
from klfast.quant.spec import QuantSpec


def calls() -> dict:
    """Return {public function: its arguments}."""

    def f(*shape):
        return torch.randn(shape)

    qt = quantize(f(5, 32), QuantSpec(4, 16, False))
    delta_rule = dict(
        q=f(2, 5, 2, 3),
        k=f(2, 5, 2, 3),
        v=f(2, 5, 4, 6),
        g=-f(2, 5, 4).abs(),
        beta=f(2, 5, 4),
        initial_state=f(2, 4, 3, 6),
    )
    kda = delta_rule | dict(g=-f(2, 5, 4, 3).abs())
    return {
        ops.dequant_matmul: dict(x=f(3, 32), qt=qt, bias=f(5)),
        ops.grouped_dequant_matmul: dict(x=f(3, 32), qt=qt, index=torch.zeros(3, 2, dtype=torch.int64), count=5),
        ops.linear: dict(x=f(3, 8).bfloat16(), weight=f(5, 8).bfloat16(), bias=f(5)),
        ops.decode_attention: dict(q=f(2, 4, 8), k=f(2, 2, 9, 8), v=f(2, 2, 9, 6)),
        ops.logit_divergence: dict(
            teacher_logits=f(3, 11), student_logits=f(3, 11), targets=torch.zeros(3, dtype=torch.int64)
        ),
        ops.gathered_logits: dict(hidden=f(2, 3, 8), head=f(9, 8), rows=torch.zeros(3, 4, dtype=torch.int64)),
        ops.linear_divergence: dict(
            teacher_hidden=f(3, 8),
            teacher_head=f(5, 8),
            student_hidden=f(3, 32),
            student_head=qt,
            targets=torch.zeros(3, dtype=torch.int64),
        ),
        ops.causal_conv1d_fn: dict(
            x=f(2, 6, 5),
            weight=f(6, 4),
            bias=f(6),
            initial_states=f(2, 6, 3),
            final_states_out=f(2, 6, 3),
            activation="silu",
        ),
        ops.causal_conv1d_update: dict(
            x=f(2, 6),
            conv_state=f(2, 6, 3),
            weight=f(6, 4),
            bias=f(6),
            cache_seqlens=torch.tensor([3, 5]),
            conv_state_indices=torch.tensor([1, 0]),
        ),
        ops.selective_scan_fn: dict(
            u=f(2, 6, 5),
            delta=f(2, 6, 5),
            A=-f(6, 3).abs(),
            B=f(2, 2, 3, 5),
            C=f(2, 2, 3, 5),
            D=f(6),
            z=f(2, 6, 5),
            delta_bias=f(6),
            initial_states=f(2, 6, 3),
            delta_softplus=True,
        ),
        ops.selective_state_update: dict(
            state=f(2, 6, 4, 3),
            x=f(2, 6, 4),
            dt=f(2, 6, 4),
            A=-f(6, 4, 3).abs(),
            B=f(2, 2, 3),
            C=f(2, 2, 3),
            D=f(6, 4),
            z=f(2, 6, 4),
            dt_bias=f(6, 4),
            dt_softplus=True,
            state_batch_indices=torch.tensor([1, 0]),
        ),
        ops.mamba_chunk_scan_combined: dict(
            x=f(2, 5, 6, 4),
            dt=f(2, 5, 6),
            A=-f(6).abs(),
            B=f(2, 5, 2, 3),
            C=f(2, 5, 2, 3),
            chunk_size=64,
            D=f(6, 4),
            z=f(2, 5, 6, 4),
            dt_bias=f(6),
            initial_states=f(2, 6, 4, 3),
            dt_softplus=True,
        ),
        ops.chunk_gated_delta_rule: delta_rule,
        ops.fused_recurrent_gated_delta_rule: delta_rule,
        ops.chunk_kda: kda,
        ops.fused_recurrent_kda: kda,
        ops.gated_delta_rule_update: dict(
            state=f(2, 4, 3, 6), **{name: t for name, t in delta_rule.items() if name != "initial_state"}
        ),
        ops.rms_norm: dict(x=f(2, 3, 8), weight=f(8), gate=f(2, 3, 8), norm_before_gate=True),
    }


class _Recorder(TorchDispatchMode):
    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if op.namespace == "klfast":
            self.found = op, args
        return op(*args, **(kwargs or {}))


def dispatched(function, arguments: dict) -> tuple:
    """Return the torch.library op that a call dispatches to, and its arguments."""
    with _Recorder() as recorder:
        function(**arguments)
    return recorder.found
