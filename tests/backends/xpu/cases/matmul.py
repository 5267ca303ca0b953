"""dequant_matmul, in every spec and dtype."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from test_dequant_matmul import operands
from triton_launches import FLOATS, OTHER_SPECS, SPECS

import klfast
from klfast import Layout, QuantSpec, reference
from xpu.cases.case import ROUNDING, Case, error


def cases() -> Iterator[Case]:
    for spec in SPECS:
        for m in (1, 16, 64, 80) if spec is SPECS[0] else (1, 80):
            for dtype in FLOATS.values():
                yield matmul_case(m, 112, 2048, spec, dtype, "exact")
            yield matmul_case(m, 112, 2048, spec, torch.float16, "int8")
    # Of float16 the runtime's compiler takes 6 s for a program with matrix instructions, of float32 43 s.
    for spec in OTHER_SPECS:
        yield matmul_case(1, 112, 2048, spec, torch.float32, "exact")
        for activation in ("exact", "int8"):
            yield matmul_case(80, 112, 2048, spec, torch.float16, activation)
    yield matmul_case(16, 48, 2048, SPECS[0], torch.bfloat16, "int8", cores=2, has_bias=False)  # in four parts
    for spec in (QuantSpec(4, 100, False), QuantSpec(4, 32, False), QuantSpec(8, -1)):
        for m, n, k, activation, cores, dtype in (
            (1, 45, 700, "exact", 100, torch.float32),
            (13, 45, 515, "exact", 1, torch.float16),
            (13, 45, 515, "int8", 100, torch.float32),
            (67, 70, 160, "exact", 100, torch.float16),
            (67, 70, 160, "int8", 1, torch.float32),
        ):
            yield matmul_case(m, n, k, spec, dtype, activation, cores)
    yield matmul_case(13, 45, 515, QuantSpec(4, 100, False), torch.float32, "exact")


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
