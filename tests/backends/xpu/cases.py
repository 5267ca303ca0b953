"""Launches of every kernel and their float64 results: of the shipped sizes' kind, and with ragged ends.

Sizes that Triton compiles in (multiples of 16, ones) are of the same kind as those of triton_launches, so that most of
these cases run the same SPIR-V as the shipped sizes, with less work.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import test_delta_rule
import test_divergence
import test_norm
import torch
import torch.nn.functional as F
from klfast.kernels import rms_norm, selective_scan
from ssm_truth import true_conv, true_scan
from test_dequant_matmul import operands
from triton_launches import FLOATS, OTHER_SPECS, SPECS

import klfast
from klfast import Layout, QuantSpec, ops, reference

ROUNDING = {
    dtype: torch.finfo(dtype).eps / 2 + 1e-5 for dtype in FLOATS.values()
}  # of the largest value: storing y, float32 sums
OF_METRICS = 3e-5
OF_TWO_PARTS = 3e-5  # factors in two bfloat16 parts lose 2^-16 each
OF_PRODUCTS = 1e-4  # metrics of logits that are sums of float32 products themselves


@dataclass(frozen=True)
class Case:
    """One op on small operands.

    Attributes:
        group: op and dtype, for the report.
        name: of the case in it.
        error: runs it and gives its largest error.
        allowed: how large that may be.
        cores: of the device that the launches are planned for; more split the work into more parts.
    """

    group: str
    name: str
    error: Callable[[], float]
    allowed: float
    cores: int = 1


def error(found: torch.Tensor, truth: torch.Tensor) -> float:
    """Return the largest error, relative to the largest value; NaN counts as infinite."""
    assert found.shape == truth.shape
    return float(((found.double() - truth).abs().max() / truth.abs().max()).nan_to_num(nan=math.inf))


def cases() -> list[Case]:
    """Return all cases, sorted by group."""
    every = (
        *dequant_matmul(),
        *logit_divergence(),
        *linear_divergence(),
        *convolution(),
        *updates(),
        *constants(),
        *scan(),
        *delta_rule(),
        *chunks(),
        *norm(),
        *attention(),
    )
    return sorted(every, key=lambda case: case.group)


# dequant_matmul ---------------------------------------------------------------------------------------------------


def dequant_matmul() -> Iterator[Case]:
    for spec in SPECS:
        for m in (1, 16, 64, 80):
            for dtype in FLOATS.values():
                yield matmul_case(m, 112, 2048, spec, dtype, "exact")
            yield matmul_case(m, 112, 2048, spec, torch.float16, "int8")
    for spec in OTHER_SPECS:
        for m, dtype, activation in (
            (1, torch.float32, "exact"),
            (80, torch.float32, "exact"),
            (80, torch.float16, "exact"),
            (80, torch.float16, "int8"),
        ):
            yield matmul_case(m, 112, 2048, spec, dtype, activation)
    yield matmul_case(16, 48, 2048, SPECS[0], torch.bfloat16, "int8", cores=2, has_bias=False)  # in four parts
    for spec in (QuantSpec(4, 100, False), QuantSpec(4, 32, False), QuantSpec(8, -1)):
        for m, n, k, activation, cores in (
            (1, 45, 700, "exact", 100),
            (13, 45, 515, "exact", 1),
            (13, 45, 515, "int8", 100),
            (67, 70, 160, "exact", 100),
            (67, 70, 160, "int8", 1),
        ):
            yield matmul_case(m, n, k, spec, torch.float32, activation, cores)


def matmul_case(
    m: int, n: int, k: int, spec: QuantSpec, dtype: torch.dtype, activation: str, cores: int = 1, has_bias: bool = True
) -> Case:
    def run() -> float:
        x, qt, bias = operands(m, n, k, spec, x_dtype=dtype)
        bias = bias.to(dtype) if has_bias else None
        found = klfast.dequant_matmul(x, qt.to_layout(Layout.TILED), bias, activation=activation)
        rows = x if activation == "exact" else reference.fake_quantize_rows(x.float(), spec)
        truth = rows.double() @ qt.dequantize(torch.float32).double().T
        return error(found, truth if bias is None else truth + bias.double())

    name = f"{m} x {n} x {k}, {spec}{', K in parts' if cores > 1 else ''}"
    return Case(f"dequant_matmul, {activation}, {str(dtype)[6:]}", name, run, ROUNDING[dtype], cores)


# divergences ------------------------------------------------------------------------------------------------------


def error_of_metrics(found: klfast.Divergence, truth: dict[str, torch.Tensor]) -> float:
    """Return the largest error of all metrics, each relative to its value."""
    each = [
        ((getattr(found, name).double() - value).abs() / value.abs().clamp_min(1e-12)).nan_to_num(nan=math.inf)
        for name, value in truth.items()
    ]
    return float(torch.stack(each).max())


def logit_divergence() -> Iterator[Case]:
    for dtype in FLOATS.values():
        for vocab in (50280, 1601):
            yield logits_case(vocab, dtype)
        yield logits_case(50280, dtype, misleading=True)


def logits_case(vocab: int, dtype: torch.dtype, misleading: bool = False) -> Case:
    def run() -> float:
        teacher = 3 * torch.randn(3, vocab)
        student = teacher + 0.3 * torch.randn(3, vocab)
        if misleading:  # where the first anchor comes from: the rows run again
            student[:2, :2048] -= 20
            teacher[:2, 3000], student[:2, 3000] = 25, 25.5
        teacher, student, targets = teacher.to(dtype), student.to(dtype), torch.tensor([5, 0, vocab - 1])
        return error_of_metrics(
            klfast.logit_divergence(teacher, student, targets), test_divergence.truth(teacher, student, targets)
        )

    return Case(
        f"logit_divergence, {str(dtype)[6:]}",
        f"{vocab} entries{', misleading first ones' if misleading else ''}",
        run,
        OF_METRICS,
    )


def linear_divergence() -> Iterator[Case]:
    for dtype in FLOATS.values():
        for spec in (None, *SPECS, *(OTHER_SPECS[:1] if dtype is torch.float32 else ())):
            yield heads_case(16, 104, 2048, dtype, spec)
        yield heads_case(13, 77, 70, dtype, QuantSpec(4, 32, False))
    yield heads_case(13, 4300, 96, torch.bfloat16, None, cores=100)
    yield heads_case(16, 104, 2048, torch.bfloat16, SPECS[0], teacher=torch.float32)


def heads_case(
    tokens: int,
    vocab: int,
    features: int,
    dtype: torch.dtype,
    spec: QuantSpec | None,
    cores: int = 1,
    teacher: torch.dtype | None = None,
) -> Case:
    def run() -> float:
        hidden, head = torch.randn(tokens, features), 2 * torch.randn(vocab, features) / features**0.5
        noisy, other = (
            hidden + 0.1 * torch.randn(tokens, features),
            head + 0.1 * torch.randn(vocab, features) / features**0.5,
        )
        hidden, head, noisy, other = (
            hidden.to(teacher or dtype),
            head.to(teacher or dtype),
            noisy.to(dtype),
            other.to(dtype),
        )
        plain = other
        if spec is not None:
            other = klfast.quantize(other.float(), spec).to_layout(Layout.TILED)
            plain = other.dequantize(torch.float32)
        targets = torch.randint(0, vocab, (tokens,))
        found = klfast.linear_divergence(hidden, head, noisy, other, targets)
        logits = (hidden.double() @ head.double().T, noisy.double() @ plain.double().T)
        return error_of_metrics(found, test_divergence.truth(*logits, targets))

    heads = f"{spec or 'float head'}{f', teacher {teacher}' if teacher else ''}"
    name = f"{tokens} tokens, {vocab} entries, {features} features, {heads}"
    return Case(f"linear_divergence, {str(dtype)[6:]}", name, run, OF_PRODUCTS, cores)


# state space ------------------------------------------------------------------------------------------------------


def convolution() -> Iterator[Case]:
    for batch, channels, length, dtype in (
        (2, 1536, 32, torch.bfloat16),
        (2, 1536, 1, torch.bfloat16),
        (3, 77, 19, torch.float32),
    ):

        def run(batch=batch, channels=channels, length=length, dtype=dtype) -> float:
            x, weight, bias = (
                torch.randn(batch, length, channels).transpose(1, 2).to(dtype),
                torch.randn(channels, 4).to(dtype),
                torch.randn(channels).to(dtype),
            )
            past = torch.randn(batch, channels, 3)
            found = ops.causal_conv1d_fn(x, weight, bias, initial_states=past, activation="silu")
            return error(found, true_conv(x, weight, bias, past, True)[0])

        yield Case(f"causal_conv1d, {str(dtype)[6:]}", f"{batch} x {channels} x {length}", run, ROUNDING[dtype])


def updates() -> Iterator[Case]:
    """Yield steps that continue sequences whose states lie in a cache, one entry without, as rings or not."""
    for length, held, dtype in ((1, 4, torch.bfloat16), (5, 9, torch.float32)):
        for rings in (False, True):

            def run(length=length, held=held, dtype=dtype, rings=rings) -> float:
                slots, seen = torch.tensor([5, -1, 0]), torch.tensor([3, 0, 1000], dtype=torch.int32)
                x, weight, bias = torch.randn(3, 77, length).to(dtype), torch.randn(77, 4).to(dtype), torch.randn(77)
                state = torch.randn(6, 77, held).to(dtype)
                after, truth = state.double(), torch.zeros(x.shape).double()
                for i in (0, 2):
                    in_order = [(int(seen[i]) * rings + t) % held for t in range(held)]
                    past = state[slots[i]][:, in_order]
                    truth[i] = true_conv(x[i : i + 1], weight, bias, past[None, :, held - 3 :], True)[0]
                    kept = torch.cat((past, x[i]), -1)[:, length:].double()
                    places = [(place + length * rings) % held for place in in_order]
                    after[slots[i]] = torch.empty(77, held).double().index_copy_(1, torch.tensor(places), kept)
                found = ops.causal_conv1d_update(x, state, weight, bias, "silu", seen if rings else None, slots)
                return max(error(found, truth), error(state, after))

            name = f"3 x 77 x {length} in a cache{', rings' * rings}"
            yield Case(f"causal_conv1d_update, {str(dtype)[6:]}", name, run, ROUNDING[dtype])


def constants() -> Iterator[Case]:
    """Yield scans with B or C constant in time, and a step with states in a cache."""
    for kinds in ("B", "C", "BC"):

        def run(kinds=kinds) -> float:
            u, A = torch.randn(2, 21, 9), -torch.rand(21, 5)
            fixed, moving = torch.randn(21, 5), torch.randn(2, 3, 5, 9)
            of_channels = fixed[None, :, :, None].expand(2, -1, -1, 9), moving.repeat_interleave(7, 1)
            B, C = (fixed if name in kinds else moving for name in "BC")
            truth, last = true_scan(u, u, A, *(of_channels[name not in kinds] for name in "BC"), None, None, None, True)
            y, state = ops.selective_scan_fn(u, u, A, B, C, delta_softplus=True, return_last_state=True)
            return max(error(y, truth), error(state, last))

        yield Case("selective_scan, constant", f"2 x 21 x 9, {' and '.join(kinds)}", run, ROUNDING[torch.float32])

    def step() -> float:
        x, state, A, b = torch.randn(3, 4, 21), torch.randn(6, 4, 21, 16), -torch.rand(4, 21, 16), torch.randn(3, 2, 16)
        slots, after = torch.tensor([5, -1, 0]), state.double()
        flat = x[[0, 2]].reshape(2, 84, 1)
        truth, last = true_scan(
            flat,
            flat,
            A.reshape(84, 16),
            b[[0, 2], ..., None],
            b[[0, 2], ..., None],
            None,
            None,
            None,
            True,
            state[[5, 0]].reshape(2, 84, 16),
        )
        after[[5, 0]] = last.view(2, 4, 21, 16)
        y = ops.selective_state_update(state, x, x, A, b, b, dt_softplus=True, state_batch_indices=slots)
        return max(error(y[[0, 2]], truth.view(2, 4, 21)), error(state, after), float(y[1].abs().max()))

    yield Case("selective_state_update, a cache", "3 x 4 x 21, 16 states", step, ROUNDING[torch.float32])


def scan() -> Iterator[Case]:
    free, clamped = (-math.inf, math.inf), (0.0, 1.0)
    for length in (32, 1):
        for heads, channels, size in ((1, 1536, 16), (24, 64, 128)):
            for limit in (free, clamped):
                yield scan_case(2, length, heads, channels, size, torch.bfloat16, limit)
    yield scan_case(3, 7, 3, 21, 5, torch.float32, clamped)
    yield scan_case(1, 200, 1, 33, 16, torch.float32, free)


def scan_case(
    batch: int, length: int, heads: int, channels: int, size: int, dtype: torch.dtype, limit: tuple[float, float]
) -> Case:
    def run() -> float:
        x, dt, z = (torch.randn(batch, length, heads, channels).to(dtype) for _ in range(3))
        b, c = (torch.randn(batch, length, 1, size).to(dtype) for _ in range(2))
        a, d, bias = -torch.rand(heads, channels, size), torch.randn(heads, channels), torch.randn(heads, channels)
        state, y = torch.randn(batch, heads, channels, size), torch.empty(batch, length, heads, channels, dtype=dtype)
        step = F.softplus(dt.double() + bias.double(), threshold=1e3).clamp(*limit)
        flat = lambda t: t.permute(0, 2, 3, 1).reshape(batch, heads * channels, length)  # noqa: E731
        truth, last = true_scan(
            flat(x),
            flat(step),
            a.reshape(heads * channels, size),
            b.permute(0, 2, 3, 1),
            c.permute(0, 2, 3, 1),
            d.flatten(),
            flat(z),
            None,
            False,
            state.reshape(batch, heads * channels, size),
        )
        selective_scan.plan(
            x=x, dt=dt, a=a, b=b, c=c, d=d, bias=bias, z=z, first=state, last=state, y=y, softplus=True, dt_limit=limit
        ).run()
        error_of_y = error(y, truth.view(batch, heads, channels, length).permute(0, 3, 1, 2))
        return max(error_of_y, error(state, last.view(state.shape)) * ROUNDING[dtype] / ROUNDING[torch.float32])

    name = f"{batch} x {length} x {heads} x {channels}, {size} states{'' if math.isinf(limit[1]) else ', dt clamped'}"
    return Case(f"selective_scan, {str(dtype)[6:]}", name, run, ROUNDING[dtype])


def delta_rule() -> Iterator[Case]:
    for form in test_delta_rule.FORMS:
        for length in (16, 1):
            yield delta_rule_case(1, length, 16, 32, 128, 128, form, torch.bfloat16)
        yield delta_rule_case(2, 9, 1, 3, 21, 5, form, torch.float32)


def delta_rule_case(
    batch: int, length: int, groups: int, heads: int, keys: int, values: int, form: str, dtype: torch.dtype
) -> Case:
    def run() -> float:
        args = test_delta_rule.operands(batch, length, groups, heads, keys, values, form)
        q, k, v = (t.to(dtype).contiguous() for t in args[:3])
        g, beta = args[3].contiguous(), args[4].to(dtype).contiguous()
        state = torch.randn(batch, heads, keys, values)
        truth, last = test_delta_rule.truth(q, k, v, g, beta, state)
        y = ops.gated_delta_rule_update(state, q, k, v, g, beta, use_qk_l2norm_in_kernel=True)
        return max(error(y, truth), error(state, last) * ROUNDING[dtype] / ROUNDING[torch.float32])

    shape = f"{batch} x {length} x {heads} x {values}, {groups} x {keys} keys, a decay a {form}"
    return Case(f"gated_delta_rule, {str(dtype)[6:]}", shape, run, ROUNDING[dtype])


def chunks() -> Iterator[Case]:
    for dtype in (torch.bfloat16, torch.float16):
        for limit in ((-math.inf, math.inf), (0.0, 1.0)):
            yield chunk_case(2, 96, 2, 64, 128, dtype, limit)
        yield chunk_case(1, 75, 3, 32, 16, dtype, (0.0, 1.0))


def chunk_case(
    batch: int, length: int, heads: int, channels: int, size: int, dtype: torch.dtype, limit: tuple[float, float]
) -> Case:
    def run() -> float:
        x, z = (torch.randn(batch, length, heads, channels).to(dtype) for _ in range(2))
        b, c = (torch.randn(batch, length, 1, size).to(dtype) for _ in range(2))
        dt, a, bias, d = (
            torch.randn(batch, length, heads).to(dtype),
            -4 * torch.rand(heads),
            torch.randn(heads),
            torch.randn(heads, channels),
        )
        first = torch.randn(batch, heads, channels, size)
        options = dict(
            D=d, z=z, dt_bias=bias, initial_states=first, dt_softplus=True, dt_limit=limit, return_final_states=True
        )
        y, last = ops.mamba_chunk_scan_combined(x, dt, a, b, c, 64, **options)
        step = F.softplus(dt.double() + bias.double(), threshold=1e3).clamp(*limit)
        flat = lambda t: t.permute(0, 2, 3, 1).reshape(batch, heads * channels, length)  # noqa: E731
        truth, state = true_scan(
            flat(x),
            flat(step[..., None].expand(x.shape)),
            a.repeat_interleave(channels)[:, None].expand(-1, size),
            b.permute(0, 2, 3, 1),
            c.permute(0, 2, 3, 1),
            d.flatten(),
            flat(z),
            None,
            False,
            first.reshape(batch, heads * channels, size),
        )
        error_of_y = error(y, truth.view(batch, heads, channels, length).permute(0, 3, 1, 2))
        return max(error_of_y, error(last, state.view(last.shape)) * ROUNDING[dtype] / OF_TWO_PARTS)

    name = f"{batch} x {length} x {heads} x {channels}, {size} states{'' if math.isinf(limit[1]) else ', dt clamped'}"
    return Case(f"ssd_scan, {str(dtype)[6:]}", name, run, ROUNDING[dtype])


def norm() -> Iterator[Case]:
    for length in (32, 1):
        for channels, group, is_gated in (
            (768, 768, False),
            (4096, 4096, False),
            (5120, 5120, True),
            (1536, 192, True),
            (16, 16, False),
        ):
            yield norm_case(2, length, channels, group, is_gated, torch.bfloat16)
    yield norm_case(3, 5, 99, 33, True, torch.float32)
    for is_sigmoid in (False, True):
        yield norm_case(2, 96, 128, 128, True, torch.bfloat16, True, is_sigmoid)


def norm_case(
    batch: int,
    length: int,
    channels: int,
    group: int,
    is_gated: bool,
    dtype: torch.dtype,
    gate_last: bool = False,
    is_sigmoid: bool = False,
) -> Case:
    def run() -> float:
        x, weight = torch.randn(batch, length, channels).to(dtype), torch.randn(channels)
        gate = torch.randn(batch, length, 2 * channels).to(dtype)[..., :channels] if is_gated else None
        y = torch.empty(x.shape, dtype=dtype)
        rms_norm.plan(x, weight, gate, y, 1e-5, group, gate_last, is_sigmoid).run()
        activation = "sigmoid" if is_sigmoid else "silu"
        return error(y, test_norm.true_norm(x, weight, gate, group, gate_last, activation))

    how = f"{', then' if gate_last else ','} gated" if is_gated else ""
    return Case(
        f"rms_norm, {str(dtype)[6:]}", f"{batch} x {length} x {channels}, groups of {group}{how}", run, ROUNDING[dtype]
    )


# attention --------------------------------------------------------------------------------------------------------


def attention() -> Iterator[Case]:
    yield attention_case(1, 25, 5, 100, 64, 128, torch.bfloat16)
    yield attention_case(1, 25, 5, 320, 64, 128, torch.bfloat16, cores=8)  # in two parts
    yield attention_case(2, 6, 2, 700, 48, 33, torch.float32, cores=10)


def attention_case(
    batch: int, heads: int, groups: int, keys: int, key_dim: int, value_dim: int, dtype: torch.dtype, cores: int = 1
) -> Case:
    def run() -> float:
        q, k, v = (
            torch.randn(batch, *shape).to(dtype)
            for shape in ((heads, key_dim), (groups, keys, key_dim), (groups, keys, value_dim))
        )
        found = ops.decode_attention(q, k, v, 0.125)
        wide, k, v = q.double(), *(t.double().repeat_interleave(heads // groups, 1) for t in (k, v))
        weight = torch.softmax(0.125 * torch.einsum("bhd,bhsd->bhs", wide, k), -1)
        return error(found, torch.einsum("bhs,bhsd->bhd", weight, v))

    name = f"{batch} x {heads} heads x {keys} keys, {key_dim} and {value_dim} wide{', in parts' if cores > 1 else ''}"
    return Case(f"decode_attention, {str(dtype)[6:]}", name, run, ROUNDING[dtype], cores)
