"""rms_norm, with and without gates."""

from __future__ import annotations

from collections.abc import Iterator

import test_norm
import torch
from klfast.kernels import rms_norm

from xpu.cases.case import ROUNDING, Case, error


def cases() -> Iterator[Case]:
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
