"""Small cases of each op, checked against klfast's reference by ``klfast doctor``; odd shapes cover kernels' edges."""

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

# Largest errors by dtype of the result, relative to the reference's largest value: the reference is rounded, too, and
# may be one unit in the last place away.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-3, torch.bfloat16: 1e-2}
_METRICS_TOLERANCE = 1e-3  # divergences are float32, but linear_divergence sums their logits in another order
_ROWS = (1, 5, 33, 70)  # each selects another kernel or configuration


def badness(error: float) -> tuple[bool, float]:
    """Return the key by which errors rank: NaN is worse than any number."""
    return error != error, error


@dataclass(frozen=True)
class Case:
    """A call of an op with random arguments.

    Attributes:
        kernel: the op, and which of its kernels if it has several.
        what: a description of the case.
        tolerance: the largest acceptable ``error``.
        call: returns the op's results and the tensors that it wrote.
        args: arguments of ``call``, on the CPU: tensors, quantized tensors and plain values.
    """

    kernel: str
    what: str
    tolerance: float
    call: Callable[..., Sequence[torch.Tensor]]
    args: tuple[object, ...] = ()

    def error(self, tier: str | None = None, device: str = "cpu") -> float:
        """Return the results' largest difference from the reference on the CPU, relative to its largest value.

        NaN if any result is. Exceptions of the kernel pass through.

        Args:
            tier: the implementation to pin; None for the default one.
            device: where to run it.

        Raises:
            ValueError: a result has the wrong shape or dtype.
        """
        with pins.using("reference"):
            expected = self._results("cpu")
        with nullcontext() if tier is None else pins.using(tier):
            found = self._results(device)
        return max((_distance(a, b) for a, b in zip(found, expected, strict=True)), key=badness)

    def _results(self, device: str) -> list[torch.Tensor]:
        """Return the results of a call on a device with copies of the arguments, moved to the CPU."""
        return [found.cpu() for found in self.call(*(_copy(a, device) for a in self.args))]


def _copy(argument: object, device: str) -> object:
    if isinstance(argument, QuantizedTensor):
        interpreted = device == "cpu" and pins.pinned() == "triton" and pins.interprets_triton()
        preferred = operands.preferred_layout(torch.device(device), argument.spec)
        return argument.to(device).to_layout(Layout.TILED if interpreted else preferred)
    return argument.to(device, copy=True) if isinstance(argument, torch.Tensor) else argument


def _distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    if found.shape != expected.shape or found.dtype != expected.dtype:
        given, wanted = (f"{dtype_name(t.dtype)} {list(t.shape)}" for t in (found, expected))
        raise ValueError(f"a result is {given} instead of {wanted}")
    scale = max(float(expected.abs().max()), 1e-30)
    return float((found.float() - expected.float()).abs().max()) / scale


def cases(op: str, dtypes: Iterable[torch.dtype] = FLOAT_DTYPES) -> list[Case]:
    """Return an op's cases in each dtype, always the same ones.

    Raises:
        KeyError: the op has no cases.
    """
    torch.manual_seed(0)
    return [case for dtype in dtypes for case in CASES[op](dtype)]


def _case(op: str, dtype: torch.dtype, what: str, call: Callable[..., Sequence[torch.Tensor]], *args: object) -> Case:
    tolerance = _METRICS_TOLERANCE if op.endswith("_divergence") else TOLERANCE[dtype]
    return Case(op, f"{dtype_name(dtype)} {what}", tolerance, call, args)


def _all(found: torch.Tensor | tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    return found if isinstance(found, tuple) else (found,)


def _dequant_matmul(spec: QuantSpec, activation: str, rows: int, dtype: torch.dtype, k: int = 331) -> Case:
    x, weight, bias = torch.randn(rows, k).to(dtype), quantize(torch.randn(67, k), spec), torch.randn(67)

    def call(x: torch.Tensor, weight: QuantizedTensor, bias: torch.Tensor) -> list[torch.Tensor]:
        return [ops.dequant_matmul(x, weight, bias, activation=activation)]

    kernel = f"dequant_matmul {spec.format.name} {activation}"
    return _case(kernel, dtype, f"[{rows}, {k}] x {spec} [67, {k}]", call, x, weight, bias)


def _grouped_dequant_matmul(spec: QuantSpec, rows: int, dtype: torch.dtype, count: int = 5, k: int = 331) -> Case:
    x, weight = torch.randn(rows, k).to(dtype), quantize(torch.randn(count * 37, k), spec)
    index = torch.randint(count, (rows, 2))

    def call(x: torch.Tensor, weight: QuantizedTensor, index: torch.Tensor) -> list[torch.Tensor]:
        return [ops.grouped_dequant_matmul(x, weight, index, count)]

    what = f"[{rows}, {k}] x 2 of {count} {spec} [37, {k}]"
    return _case("grouped_dequant_matmul", dtype, what, call, x, weight, index)


def _integers(*shape: int) -> torch.Tensor:
    return torch.randint(-3, 4, shape).float()


def _linear(dtype: torch.dtype, rows: int, bias_dtype: torch.dtype) -> Case:
    """Return a case of integers: their sums are exact, so that a float32 result reveals any rounding to ``dtype``."""

    def call(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> list[torch.Tensor]:
        return [ops.linear(x, weight, bias, dtype=torch.float32)]

    what = f"[{rows}, 101] x [37, 101] + {dtype_name(bias_dtype)}"
    x, weight, bias = _integers(rows, 101).to(dtype), _integers(37, 101).to(dtype), _integers(37).to(bias_dtype)
    return _case("linear", dtype, what, call, x, weight, bias)


def _decode_attention(dtype: torch.dtype, keys: int, batch: int = 2, heads: int = 18, groups: int = 2) -> Case:
    q = torch.randn(batch, heads, 33).to(dtype)
    k = torch.randn(batch, groups, keys, 33).to(dtype)
    v = torch.randn(batch, groups, keys, 63).to(dtype)

    def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> list[torch.Tensor]:
        return [ops.decode_attention(q, k, v)]

    return _case("decode_attention", dtype, f"[{batch}, {heads}, 33], {keys} keys", call, q, k, v)


def _logit_divergence(dtype: torch.dtype, tokens: int, vocab: int, misleading: int = 0) -> Case:
    """Return a case whose first ``misleading`` columns hide the student's mass, so that kernels must start again."""
    teacher, targets = 3 * torch.randn(tokens, vocab), torch.randint(vocab, (tokens,))
    student = teacher + 0.1 * torch.randn(tokens, vocab)
    if misleading:
        student[:, :misleading] -= 20
        teacher[:, -100], student[:, -100] = 25, 25.25
    what = f"[{tokens}, {vocab}]" + (f", the first {misleading} misleading" if misleading else "")
    args = (teacher.to(dtype), student.to(dtype), targets)
    return _case("logit_divergence", dtype, what, lambda *args: astuple(ops.logit_divergence(*args)), *args)


def _linear_divergence(dtype: torch.dtype, spec: QuantSpec | None, tokens: int) -> Case:
    """Return a case with a teacher's head in ``dtype`` and a quantized student's head, the same head if no ``spec``."""
    hidden, head, targets = torch.randn(tokens, 63), torch.randn(301, 63) / 3, torch.randint(301, (tokens,))
    other = head.to(dtype) if spec is None else quantize(head, spec)
    what = f"[{tokens}, 63] x [301, 63], student {spec or dtype_name(dtype)}"
    args = (hidden.to(dtype), head.to(dtype), (hidden + 0.05).to(dtype), other, targets)
    return _case("linear_divergence", dtype, what, lambda *args: astuple(ops.linear_divergence(*args)), *args)


def _gathered_logits(dtype: torch.dtype, students: int, tokens: int) -> Case:
    hidden, head = torch.randn(students, tokens, 63).to(dtype), torch.randn(301, 63).to(dtype)
    index = torch.randint(301, (tokens, 19))

    def call(hidden: torch.Tensor, head: torch.Tensor, index: torch.Tensor) -> list[torch.Tensor]:
        return [ops.gathered_logits(hidden, head, index)]

    return _case("gathered_logits", dtype, f"{list(hidden.shape)} x 19 of [301, 63]", call, hidden, head, index)


def _causal_conv1d(dtype: torch.dtype, length: int) -> Case:
    x, weight, bias, state = torch.randn(2, 19, length), torch.randn(19, 4), torch.randn(19), torch.randn(2, 19, 3)

    def call(
        x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, state: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        return _all(
            ops.causal_conv1d_fn(x, weight, bias, initial_states=state, return_final_states=True, activation="silu")
        )

    return _case("causal_conv1d", dtype, f"[2, 19, {length}]", call, x.to(dtype), weight, bias, state.to(dtype))


def _causal_conv1d_update(dtype: torch.dtype, cache: bool, rings: bool) -> Case:
    x, weight, bias, before = torch.randn(3, 19), torch.randn(19, 4), torch.randn(19), torch.randn(5, 19, 4)
    seen, slots = torch.tensor([0, 3, 1001]), torch.tensor([4, -1, 2])

    def call(*args: torch.Tensor) -> tuple[torch.Tensor, ...]:
        x, weight, bias, state, seen, slots = args
        state = state if cache else state[:3]
        places = (seen if rings else None, slots if cache else None)
        return ops.causal_conv1d_update(x, state, weight, bias, "silu", *places), state

    what = f"[3, 19]{', rings' * rings}{', a cache' * cache}"
    return _case("causal_conv1d_update", dtype, what, call, x.to(dtype), weight, bias, before.to(dtype), seen, slots)


def _selective_scan(dtype: torch.dtype, length: int, constant: str = "") -> Case:
    """Return a case with B or C constant in time, if it is named."""
    u, delta, z = torch.randn(3, 2, 19, length).to(dtype)
    B, C = (torch.randn(*((19, 16) if name == constant else (2, 16, length))).to(dtype) for name in "BC")
    A, D, delta_bias, initial = -torch.rand(19, 16), torch.randn(19), torch.randn(19), torch.randn(2, 19, 16)

    def call(*args: torch.Tensor) -> tuple[torch.Tensor, ...]:
        u, delta, A, B, C, D, z, delta_bias, initial = args
        return _all(
            ops.selective_scan_fn(
                u, delta, A, B, C, D, z, delta_bias, delta_softplus=True, return_last_state=True, initial_states=initial
            )
        )

    what = f"[2, 19, {length}]{f', {constant} constant' * bool(constant)}"
    return _case("selective_scan", dtype, what, call, u, delta, A, B, C, D, z, delta_bias, initial)


def _selective_state_update(dtype: torch.dtype, heads: tuple[int, ...], cache: bool = False) -> Case:
    """Return a case of 19 channels, or of ``heads`` times that many; one of two entries without a state in a cache."""
    x, dt, z = torch.randn(3, 2, *heads, 19).to(dtype)
    B, C = torch.randn(2, 2, *(1 for _ in heads), 16).to(dtype)
    slots = torch.tensor([-1, 1])
    before, A = torch.randn(2, *heads, 19, 16), -torch.rand(*heads, 19, 16)
    D, dt_bias = torch.randn(*heads, 19), torch.randn(*heads, 19)

    def call(*args: torch.Tensor) -> tuple[torch.Tensor, ...]:
        state, x, dt, A, B, C, D, z, dt_bias, slots = args
        places = slots if cache else None
        return ops.selective_state_update(state, x, dt, A, B, C, D, z, dt_bias, True, places), state

    what = f"{list(x.shape)}{', a cache' * cache}"
    return _case("selective_state_update", dtype, what, call, before, x, dt, A, B, C, D, z, dt_bias, slots)


def _mamba_chunk_scan(dtype: torch.dtype, length: int, channels: int = 19, states: int = 16) -> Case:
    """Return a case of four heads and two groups of B and C."""
    x, z = torch.randn(2, 2, length, 4, channels).to(dtype)
    B, C = torch.randn(2, 2, length, 2, states).to(dtype)
    dt, A, D, dt_bias = torch.randn(2, length, 4).to(dtype), -torch.rand(4), torch.randn(4), torch.randn(4)
    initial = torch.randn(2, 4, channels, states)

    def call(*args: torch.Tensor) -> tuple[torch.Tensor, ...]:
        x, dt, A, B, C, D, z, dt_bias, initial = args
        return _all(
            ops.mamba_chunk_scan_combined(
                x, dt, A, B, C, 16, D, z, dt_bias, initial, dt_softplus=True, return_final_states=True
            )
        )

    args = (x, dt, A, B, C, D, z, dt_bias, initial)
    return _case("mamba_chunk_scan", dtype, f"{list(x.shape)}, {states} states", call, *args)


def _gated_delta_rule(dtype: torch.dtype, length: int, by_channel: bool, value_dim: int) -> Case:
    """Return a case of four heads and two of keys."""
    q, k = torch.randn(2, 2, length, 2, 33).to(dtype)
    v, beta = torch.randn(2, length, 4, value_dim).to(dtype), torch.rand(2, length, 4).to(dtype)
    g = -torch.rand(2, length, 4, 33) if by_channel else -torch.rand(2, length, 4)

    def call(*args: torch.Tensor) -> tuple[torch.Tensor, ...]:
        state, q, k, v, g, beta = args
        return ops.gated_delta_rule_update(state, q, k, v, g, beta, use_qk_l2norm_in_kernel=True), state

    what = f"{list(v.shape)}, {'a decay a key channel' if by_channel else 'a decay a head'}"
    return _case("gated_delta_rule", dtype, what, call, torch.randn(2, 4, 33, value_dim), q, k, v, g, beta)


def _rms_norm(dtype: torch.dtype, group_size: int | None, norm_before_gate: bool = False) -> Case:
    """Return a case that is gated if there is a group size."""
    x, gate, weight = torch.randn(2, 33, 38).to(dtype), torch.randn(2, 33, 38).to(dtype), torch.randn(38).to(dtype)

    def call(x: torch.Tensor, weight: torch.Tensor, gate: torch.Tensor) -> list[torch.Tensor]:
        gate_or_none = None if group_size is None else gate
        return [ops.rms_norm(x, weight, gate_or_none, group_size=group_size, norm_before_gate=norm_before_gate)]

    what = "plain" if group_size is None else f"{'then ' if norm_before_gate else ''}gated, groups of {group_size}"
    return _case("rms_norm", dtype, f"{list(x.shape)}, {what}", call, x, weight, gate)


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
_SPLIT = [(rows, 2048) for rows in (1, 5, 33)]  # (rows, K) with less work along N than along K: kernels split K
# Op -> function that draws its cases in a dtype.
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
    "grouped_dequant_matmul": lambda dtype: [
        _grouped_dequant_matmul(QuantSpec(bits, *group), rows, dtype) for bits in (4, 6, 8) for group, rows in _FORMATS
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
    "gathered_logits": lambda dtype: [_gathered_logits(dtype, *shape) for shape in ((1, 1), (5, 3), (17, 9))],
    "causal_conv1d": lambda dtype: [_causal_conv1d(dtype, length) for length in _LENGTHS],
    "causal_conv1d_update": lambda dtype: [
        _causal_conv1d_update(dtype, cache, rings) for cache in (False, True) for rings in (False, True)
    ],
    "selective_scan": lambda dtype: [
        *(_selective_scan(dtype, length) for length in _LENGTHS),
        *(_selective_scan(dtype, 33, constant) for constant in "BC"),
    ],
    "selective_state_update": lambda dtype: [
        *(_selective_state_update(dtype, heads) for heads in ((), (3,))),
        _selective_state_update(dtype, (3,), cache=True),
    ],
    "mamba_chunk_scan": lambda dtype: [
        *(_mamba_chunk_scan(dtype, length) for length in _LENGTHS),
        # Sizes for which 16-bit dtypes use matrix instructions.
        *(_mamba_chunk_scan(dtype, length, 32, states) for states in (16, 128) for length in (33, 131)),
    ],
    "gated_delta_rule": lambda dtype: [
        _gated_delta_rule(dtype, length, by_channel, value_dim)
        for length in (1, 70)
        for by_channel in (False, True)
        for value_dim in (19, 128)
    ],
    "rms_norm": lambda dtype: [_rms_norm(dtype, None), _rms_norm(dtype, 19), _rms_norm(dtype, 19, True)],
}
