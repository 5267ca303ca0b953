"""A small case of each op for ``klfast.doctor``: odd shapes, so that each kernel's edges run too."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import astuple, replace

import torch

from klfast import ops
from klfast.quantization import quantize
from klfast.types import FLOAT_DTYPES, QuantSpec

Run = Callable[[], list[torch.Tensor]]


def _integers(*shape: int) -> torch.Tensor:
    return torch.randint(-3, 4, shape).float()


def _dequant_matmul() -> Run:
    x, bias = torch.randn(5, 100), torch.randn(37)
    weights = [quantize(torch.randn(37, 100), spec) for spec in (QuantSpec(4, 32), QuantSpec(8, 64, symmetric=False))]
    whole = _integers(21, 100).bfloat16()  # whole numbers: the sums are, and no rounding to bfloat16 depends on their order
    powers = replace(weights[0], scale=torch.exp2(torch.randint(3, weights[0].scale.shape)).half())
    return lambda: [
        *(ops.dequant_matmul(x, weight, bias, activation=a) for weight in weights for a in ("exact", "int8")),
        ops.dequant_matmul(whole, powers),
    ]


def _linear() -> Run:
    x, weight, bias = _integers(21, 101), _integers(37, 101), _integers(37)
    return lambda: [ops.linear(x.to(dtype), weight.to(dtype), bias, dtype=torch.float32) for dtype in FLOAT_DTYPES]


def _decode_attention() -> Run:
    q, k, v = torch.randn(2, 18, 33), torch.randn(2, 2, 19, 33), torch.randn(2, 2, 19, 63)
    return lambda: [ops.decode_attention(q, k, v)]


def _logit_divergence() -> Run:
    teacher, targets = 3 * torch.randn(5, 101), torch.randint(101, (5,))
    student = teacher + 0.1 * torch.randn(5, 101)
    return lambda: list(astuple(ops.logit_divergence(teacher, student, targets)))


def _linear_divergence() -> Run:
    hidden, head, targets = torch.randn(5, 63), torch.randn(101, 63) / 3, torch.randint(101, (5,))
    return lambda: list(astuple(ops.linear_divergence(hidden, head, hidden + 0.05, quantize(head, QuantSpec(8, 32)), targets)))


def _causal_conv1d() -> Run:
    x, weight, bias, state = torch.randn(2, 19, 33), torch.randn(19, 4), torch.randn(19), torch.randn(2, 19, 3)
    return lambda: list(ops.causal_conv1d_fn(x, weight, bias, initial_states=state, return_final_states=True, activation="silu"))


def _causal_conv1d_update() -> Run:
    x, weight, bias, before = torch.randn(2, 19), torch.randn(19, 4), torch.randn(19), torch.randn(2, 19, 4)

    def run():
        state = before.clone()
        return [ops.causal_conv1d_update(x, state, weight, bias, activation="silu"), state]

    return run


def _selective_scan() -> Run:
    u, delta, z = torch.randn(3, 2, 19, 33)
    B, C = torch.randn(2, 2, 16, 33)
    A, D, delta_bias, initial = -torch.rand(19, 16), torch.randn(19), torch.randn(19), torch.randn(2, 19, 16)
    return lambda: list(ops.selective_scan_fn(u, delta, A, B, C, D, z, delta_bias, delta_softplus=True, return_last_state=True, initial_states=initial))


def _selective_state_update() -> Run:
    x, dt, z = torch.randn(3, 2, 19)
    B, C = torch.randn(2, 2, 16)
    before, A, D, dt_bias = torch.randn(2, 19, 16), -torch.rand(19, 16), torch.randn(19), torch.randn(19)

    def run():
        state = before.clone()
        return [ops.selective_state_update(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus=True), state]

    return run


def _mamba_chunk_scan() -> Run:
    x, z = torch.randn(2, 2, 33, 4, 19)
    B, C = torch.randn(2, 2, 33, 2, 16)
    dt, A, D, dt_bias = torch.randn(2, 33, 4), -torch.rand(4), torch.randn(4), torch.randn(4)
    return lambda: list(ops.mamba_chunk_scan_combined(x, dt, A, B, C, 16, D, z, dt_bias, dt_softplus=True, return_final_states=True))


def _rms_norm() -> Run:
    x, gate, weight = torch.randn(2, 33, 38), torch.randn(2, 33, 38), torch.randn(38)
    return lambda: [ops.rms_norm(x, weight), ops.rms_norm(x, weight, gate, group_size=19)]


# Op -> draws its arguments at random, and gives what runs it on them.
CASES: dict[str, Callable[[], Run]] = {
    "dequant_matmul": _dequant_matmul,
    "linear": _linear,
    "decode_attention": _decode_attention,
    "logit_divergence": _logit_divergence,
    "linear_divergence": _linear_divergence,
    "causal_conv1d": _causal_conv1d,
    "causal_conv1d_update": _causal_conv1d_update,
    "selective_scan": _selective_scan,
    "selective_state_update": _selective_state_update,
    "mamba_chunk_scan": _mamba_chunk_scan,
    "rms_norm": _rms_norm,
}
