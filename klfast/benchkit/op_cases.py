"""Small cases of each op, run against klfast's reference for ``klfast doctor``: odd shapes, so that each kernel's edges run too."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import astuple, dataclass

import torch

from klfast import ops
from klfast.backends import operands
from klfast.core.dtypes import FLOAT_DTYPES, dtype_name
from klfast.dispatch import pins
from klfast.quant.layouts import Layout
from klfast.quant.rounding import quantize
from klfast.quant.spec import QuantSpec
from klfast.quant.tensor import QuantizedTensor

# Largest errors, relative to the reference's largest value, by what the results are rounded to: the reference is
# rounded, too, and may be one unit in the last place away.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-3, torch.bfloat16: 1e-2}
_METRICS_TOLERANCE = 1e-3  # divergences are float32, but of logits that linear_divergence sums in another order
_ROWS = (1, 5, 33, 70)  # each takes another kernel or configuration


def badness(error: float) -> tuple[bool, float]:
    return error != error, error  # NaN is worse than any number


@dataclass(frozen=True)
class Case:
    """A call of an op with arguments drawn at random.

    Attributes:
        kernel: the op, and which of its kernels if it has several.
        what: which case it is, for the reader.
        tolerance: the largest ``error`` that is right.
        call: gives the op's results, and what it wrote to.
        args: of ``call``, on the CPU: tensors, quantized tensors and plain values.
    """

    kernel: str
    what: str
    tolerance: float
    call: Callable[..., Sequence[torch.Tensor]]
    args: tuple = ()

    def error(self, tier: str | None = None, device: str = "cpu") -> float:
        """Largest difference of a result from klfast's reference on the CPU, relative to its largest value; NaN if any is.

        Args:
            tier: the implementation to pin; None for what runs by itself.
            device: where to run it.

        Raises:
            Whatever the kernel raises; ValueError if a result has another shape or dtype than it should.
        """
        with pins.using("reference"):
            expected = self._results("cpu")
        with nullcontext() if tier is None else pins.using(tier):
            found = self._results(device)
        return max((_distance(a, b) for a, b in zip(found, expected, strict=True)), key=badness)

    def _results(self, device: str) -> list[torch.Tensor]:
        """Of one call on a device with copies of the arguments, back on the CPU."""
        return [found.cpu() for found in self.call(*(_copy(a, device) for a in self.args))]


def _copy(argument: object, device: str) -> object:
    if isinstance(argument, QuantizedTensor):
        interpreted = device == "cpu" and pins.pinned() == "triton" and pins.interprets_triton()
        preferred = operands.preferred_layout(torch.device(device), argument.spec)
        return argument.to(device).to_layout(Layout.TILED if interpreted else preferred)
    return argument.to(device, copy=True) if isinstance(argument, torch.Tensor) else argument


def _distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    if found.shape != expected.shape or found.dtype != expected.dtype:
        raise ValueError(
            f"a result is {dtype_name(found.dtype)} {list(found.shape)} instead of {dtype_name(expected.dtype)} {list(expected.shape)}"
        )
    scale = max(float(expected.abs().max()), 1e-30)
    return float((found.float() - expected.float()).abs().max()) / scale


def cases(op: str, dtypes: Iterable[torch.dtype] = FLOAT_DTYPES) -> list[Case]:
    """An op's cases in each dtype, always the same ones.

    Raises:
        KeyError: an op without cases.
    """
    torch.manual_seed(0)
    return [case for dtype in dtypes for case in CASES[op](dtype)]


def _case(op: str, dtype: torch.dtype, what: str, call: Callable[..., Sequence[torch.Tensor]], *args: object) -> Case:
    return Case(
        op,
        f"{dtype_name(dtype)} {what}",
        _METRICS_TOLERANCE if op.endswith("_divergence") else TOLERANCE[dtype],
        call,
        args,
    )


def _dequant_matmul(spec: QuantSpec, activation: str, rows: int, dtype: torch.dtype, k: int = 331) -> Case:
    x, weight, bias = torch.randn(rows, k).to(dtype), quantize(torch.randn(67, k), spec), torch.randn(67)

    def call(x, weight, bias):
        return [ops.dequant_matmul(x, weight, bias, activation=activation)]

    return _case(
        f"dequant_matmul {spec.format.name} {activation}",
        dtype,
        f"[{rows}, {k}] x {spec} [67, {k}]",
        call,
        x,
        weight,
        bias,
    )


def _integers(*shape: int) -> torch.Tensor:
    return torch.randint(-3, 4, shape).float()


def _linear(dtype: torch.dtype, rows: int, bias_dtype: torch.dtype) -> Case:
    """Whole numbers: their sums are exact but for the last rounding, which a float32 result shows if there is one."""

    def call(x, weight, bias):
        return [ops.linear(x, weight, bias, dtype=torch.float32)]

    what = f"[{rows}, 101] x [37, 101] + {dtype_name(bias_dtype)}"
    return _case(
        "linear",
        dtype,
        what,
        call,
        _integers(rows, 101).to(dtype),
        _integers(37, 101).to(dtype),
        _integers(37).to(bias_dtype),
    )


def _decode_attention(dtype: torch.dtype, keys: int, batch: int = 2, heads: int = 18, groups: int = 2) -> Case:
    q, k, v = (
        torch.randn(batch, heads, 33).to(dtype),
        torch.randn(batch, groups, keys, 33).to(dtype),
        torch.randn(batch, groups, keys, 63).to(dtype),
    )
    return _case(
        "decode_attention",
        dtype,
        f"[{batch}, {heads}, 33], {keys} keys",
        lambda *args: [ops.decode_attention(*args)],
        q,
        k,
        v,
    )


def _logit_divergence(dtype: torch.dtype, tokens: int, vocab: int, misleading: int = 0) -> Case:
    """The first ``misleading`` columns say nothing of where the student has its mass: kernels that start from them begin again."""
    teacher, targets = 3 * torch.randn(tokens, vocab), torch.randint(vocab, (tokens,))
    student = teacher + 0.1 * torch.randn(tokens, vocab)
    if misleading:
        student[:, :misleading] -= 20
        teacher[:, -100], student[:, -100] = 25, 25.25
    what = f"[{tokens}, {vocab}]" + (f", the first {misleading} misleading" if misleading else "")
    return _case(
        "logit_divergence",
        dtype,
        what,
        lambda *args: astuple(ops.logit_divergence(*args)),
        teacher.to(dtype),
        student.to(dtype),
        targets,
    )


def _linear_divergence(dtype: torch.dtype, spec: QuantSpec | None, tokens: int) -> Case:
    """The teacher's head is of ``dtype``; the student's is quantized, or the teacher's with a ``spec`` of None."""
    hidden, head, targets = torch.randn(tokens, 63), torch.randn(301, 63) / 3, torch.randint(301, (tokens,))
    other = head.to(dtype) if spec is None else quantize(head, spec)
    what = f"[{tokens}, 63] x [301, 63], student {spec or dtype_name(dtype)}"
    args = (hidden.to(dtype), head.to(dtype), (hidden + 0.05).to(dtype), other, targets)
    return _case("linear_divergence", dtype, what, lambda *args: astuple(ops.linear_divergence(*args)), *args)


def _causal_conv1d(dtype: torch.dtype, length: int) -> Case:
    x, weight, bias, state = torch.randn(2, 19, length), torch.randn(19, 4), torch.randn(19), torch.randn(2, 19, 3)

    def call(x, weight, bias, state):
        return ops.causal_conv1d_fn(x, weight, bias, initial_states=state, return_final_states=True, activation="silu")

    return _case("causal_conv1d", dtype, f"[2, 19, {length}]", call, x.to(dtype), weight, bias, state.to(dtype))


def _causal_conv1d_update(dtype: torch.dtype) -> Case:
    x, weight, bias, before = torch.randn(2, 19), torch.randn(19, 4), torch.randn(19), torch.randn(2, 19, 4)

    def call(x, weight, bias, state):
        return ops.causal_conv1d_update(x, state, weight, bias, activation="silu"), state

    return _case("causal_conv1d_update", dtype, "[2, 19]", call, x.to(dtype), weight, bias, before.to(dtype))


def _selective_scan(dtype: torch.dtype, length: int) -> Case:
    u, delta, z = torch.randn(3, 2, 19, length).to(dtype)
    B, C = torch.randn(2, 2, 16, length).to(dtype)
    A, D, delta_bias, initial = -torch.rand(19, 16), torch.randn(19), torch.randn(19), torch.randn(2, 19, 16)

    def call(u, delta, A, B, C, D, z, delta_bias, initial):
        return ops.selective_scan_fn(
            u, delta, A, B, C, D, z, delta_bias, delta_softplus=True, return_last_state=True, initial_states=initial
        )

    return _case("selective_scan", dtype, f"[2, 19, {length}]", call, u, delta, A, B, C, D, z, delta_bias, initial)


def _selective_state_update(dtype: torch.dtype, heads: tuple[int, ...]) -> Case:
    """Of 19 channels, or of ``heads`` (1,) times that many."""
    x, dt, z = torch.randn(3, 2, *heads, 19).to(dtype)
    B, C = torch.randn(2, 2, *(1 for _ in heads), 16).to(dtype)
    before, A, D, dt_bias = (
        torch.randn(2, *heads, 19, 16),
        -torch.rand(*heads, 19, 16),
        torch.randn(*heads, 19),
        torch.randn(*heads, 19),
    )

    def call(state, *args):
        return ops.selective_state_update(state, *args, dt_softplus=True), state

    return _case("selective_state_update", dtype, str(list(x.shape)), call, before, x, dt, A, B, C, D, z, dt_bias)


def _mamba_chunk_scan(dtype: torch.dtype, length: int, channels: int = 19, states: int = 16) -> Case:
    """Four heads of so many channels, two groups of B and C."""
    x, z = torch.randn(2, 2, length, 4, channels).to(dtype)
    B, C = torch.randn(2, 2, length, 2, states).to(dtype)
    dt, A, D, dt_bias = torch.randn(2, length, 4).to(dtype), -torch.rand(4), torch.randn(4), torch.randn(4)
    initial = torch.randn(2, 4, channels, states)

    def call(x, dt, A, B, C, D, z, dt_bias, initial):
        return ops.mamba_chunk_scan_combined(
            x, dt, A, B, C, 16, D, z, dt_bias, initial, dt_softplus=True, return_final_states=True
        )

    return _case(
        "mamba_chunk_scan", dtype, f"{list(x.shape)}, {states} states", call, x, dt, A, B, C, D, z, dt_bias, initial
    )


def _rms_norm(dtype: torch.dtype, group_size: int | None) -> Case:
    """Gated where there is a group size."""
    x, gate, weight = torch.randn(2, 33, 38).to(dtype), torch.randn(2, 33, 38).to(dtype), torch.randn(38).to(dtype)

    def call(x, weight, gate):
        return [ops.rms_norm(x, weight, None if group_size is None else gate, group_size=group_size)]

    return _case(
        "rms_norm",
        dtype,
        f"{list(x.shape)}, {'plain' if group_size is None else f'gated, groups of {group_size}'}",
        call,
        x,
        weight,
        gate,
    )


_FORMATS = (
    [((32, True), rows) for rows in _ROWS]
    + [((64, False), rows) for rows in _ROWS]
    + [(group, rows) for group in ((-1, True), (128, False)) for rows in (1, 5)]
)
_HEADS = (
    None,
    QuantSpec(4, 32),
    QuantSpec(4, 64, False),
    QuantSpec(6, 64, False),
    QuantSpec(8, 32),
    QuantSpec(8, -1, False),
)
_LENGTHS = (1, 33, 131)
_SPLIT = [(rows, 2048) for rows in (1, 5, 33)]  # (rows, K) with less to do along N than along K: kernels split K
# Op -> draws its cases in a dtype.
CASES: dict[str, Callable[[torch.dtype], list[Case]]] = {
    "dequant_matmul": lambda dtype: [
        *(
            _dequant_matmul(QuantSpec(bits, *group), a, rows, dtype)
            for bits in (4, 6, 8)
            for a in ("exact", "int8")
            for group, rows in _FORMATS
        ),
        *(_dequant_matmul(QuantSpec(4, 128), a, rows, dtype, k) for a in ("exact", "int8") for rows, k in _SPLIT),
    ],
    "linear": lambda dtype: [
        _linear(dtype, rows, bias) for rows in _ROWS for bias in dict.fromkeys((torch.float32, dtype))
    ],
    "decode_attention": lambda dtype: [
        *(_decode_attention(dtype, keys) for keys in (1, 19, 300)),
        _decode_attention(dtype, 2000, 1, 1, 1),
    ],
    "logit_divergence": lambda dtype: [
        _logit_divergence(dtype, *shape) for shape in ((1, 63), (5, 101), (3, 5003), (1, 20_000), (3, 5003, 2048))
    ],
    "linear_divergence": lambda dtype: [
        _linear_divergence(dtype, head, tokens) for head in _HEADS for tokens in (1, 21)
    ],
    "causal_conv1d": lambda dtype: [_causal_conv1d(dtype, length) for length in _LENGTHS],
    "causal_conv1d_update": lambda dtype: [_causal_conv1d_update(dtype)],
    "selective_scan": lambda dtype: [_selective_scan(dtype, length) for length in _LENGTHS],
    "selective_state_update": lambda dtype: [_selective_state_update(dtype, heads) for heads in ((), (3,))],
    "mamba_chunk_scan": lambda dtype: [
        *(_mamba_chunk_scan(dtype, length) for length in _LENGTHS),
        *(
            _mamba_chunk_scan(dtype, length, 32, states) for states in (16, 128) for length in (33, 131)
        ),  # 16-bit: with matrix instructions
    ],
    "rms_norm": lambda dtype: [_rms_norm(dtype, group_size) for group_size in (None, 19)],
}
