"""Scans: selective, with B or C constant in time, and in chunks; a step with states in a cache."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from klfast.kernels import selective_scan
from ssm_truth import true_scan

from klfast import ops
from xpu.cases.case import ROUNDING, Case, error

OF_TWO_PARTS = 3e-5  # factors in two bfloat16 parts lose 2^-16 each


def cases() -> Iterator[Case]:
    yield from constants()
    yield from scan()
    yield from chunks()


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


def by_channel(t: torch.Tensor) -> torch.Tensor:
    """Return [B, H P, L] of [B, L, H, P]."""
    return t.permute(0, 2, 3, 1).flatten(1, 2)


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
        truth, last = true_scan(
            by_channel(x),
            by_channel(step),
            a.reshape(heads * channels, size),
            b.permute(0, 2, 3, 1),
            c.permute(0, 2, 3, 1),
            d.flatten(),
            by_channel(z),
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
        truth, state = true_scan(
            by_channel(x),
            by_channel(step[..., None].expand(x.shape)),
            a.repeat_interleave(channels)[:, None].expand(-1, size),
            b.permute(0, 2, 3, 1),
            c.permute(0, 2, 3, 1),
            d.flatten(),
            by_channel(z),
            None,
            False,
            first.reshape(batch, heads * channels, size),
        )
        error_of_y = error(y, truth.view(batch, heads, channels, length).permute(0, 3, 1, 2))
        return max(error_of_y, error(last, state.view(last.shape)) * ROUNDING[dtype] / OF_TWO_PARTS)

    name = f"{batch} x {length} x {heads} x {channels}, {size} states{'' if math.isinf(limit[1]) else ', dt clamped'}"
    return Case(f"ssd_scan, {str(dtype)[6:]}", name, run, ROUNDING[dtype])
