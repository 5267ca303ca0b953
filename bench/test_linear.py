"""Linear layers of Mamba and Hymba models: QuantLinear (dequant_matmul) and linear against torch and OpenVINO."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch

from klfast import ops, reference
from klfast.benchkit import peers
from klfast.benchkit.runner import Contender, Group, UnavailableError, distance, tolerance
from klfast.benchkit.settings import Settings
from klfast.benchkit.weights import Weights, weights
from klfast.dispatch import registry
from klfast.nn import QuantLinear
from klfast.quant.spec import QuantSpec

# (K, N): an input projection of Mamba-1.4B, then layers of Mamba-130M, a head, Mamba-1.4B again, and Hymba-1.5B.
SHAPES = (
    (2048, 8192),
    (768, 3072),
    (1536, 768),
    (1536, 80),
    (48, 1536),
    (2048, 50280),
    (4096, 2048),
    (1600, 8960),
    (3200, 1600),
    (3200, 132),
    (100, 3200),
    (5504, 1600),
)
ROWS = (1, 4, 8, 16, 128, 512)
GPU_SHAPES, GPU_ROWS = ((8192, 8192), *SHAPES), (*ROWS[:4], 64, *ROWS[4:], 4096)
SPECS = {"int4": QuantSpec(4, 128), "int8": QuantSpec(8, 128)}
# The other formats, at one shape and fewer row counts.
FORMATS = tuple(
    QuantSpec(*form)
    for form in ((4, 32), (4, 64), (4, -1), (4, 32, False), (4, 128, False), (8, 32), (8, -1), (8, 128, False))
)
FORMAT_SHAPE, FORMAT_ROWS = (2048, 8192), (1, 16, 128)


def groups(settings: Settings) -> Iterator[Group]:
    usual_shapes, usual_rows = (SHAPES, ROWS) if settings.device == "cpu" else (GPU_SHAPES, GPU_ROWS)
    shapes = settings.shapes or (((768, 3072),) if settings.quick else usual_shapes)
    rows = settings.rows or ((1, 16) if settings.quick else usual_rows)
    for k, n in shapes:
        for m in rows:
            yield _group(f"{k}x{n}, M={m}", k, n, m, _contenders, settings)
    if not (settings.quick or settings.shapes or settings.rows):
        for m in FORMAT_ROWS:
            yield _group(f"{FORMAT_SHAPE[0]}x{FORMAT_SHAPE[1]} formats, M={m}", *FORMAT_SHAPE, m, _formats, settings)


def _group(name: str, k: int, n: int, m: int, contenders: Callable, settings: Settings) -> Group:
    def against(build: Callable[..., Contender], *args: object) -> Callable[[], Contender]:
        def built() -> Contender:
            x = torch.randn(m, k, device=settings.device, dtype=torch.bfloat16)
            return build(x, weights(k, n, settings), *args)

        return built

    return Group(name, {"k": k, "n": n, "m": m}, dict(contenders(against)), flops=2.0 * m * k * n)


def _formats(against: Callable) -> Iterator[tuple[str, Callable[[], Contender]]]:
    for spec in FORMATS:
        for activation in ("exact", "int8"):
            yield f"klfast {spec} {activation}", against(_dequant_matmul, spec, activation)
    yield "torch bf16", against(peers.torch_linear, torch.bfloat16)


def _contenders(against: Callable) -> Iterator[tuple[str, Callable[[], Contender]]]:
    for bits, spec in SPECS.items():
        for activation in ("exact", "int8"):
            yield f"klfast {bits} {activation}", against(_dequant_matmul, spec, activation)
    for dtype, name in ((torch.bfloat16, "bf16"), (torch.float16, "fp16")):
        yield f"klfast linear {name}", against(_linear, dtype)
    for dtype, name in ((torch.float32, "fp32"), (torch.bfloat16, "bf16"), (torch.float16, "fp16")):
        yield f"torch {name}", against(peers.torch_linear, dtype)
    yield "torch int4pack", against(peers.torch_int4pack)
    yield "torch int8pack", against(peers.torch_int8pack)
    yield "OpenVINO int4", against(peers.openvino_int4)


def _dequant_matmul(x: torch.Tensor, weights: Weights, spec: QuantSpec, activation: str) -> Contender:
    require_kernel("dequant_matmul", x)
    copies = weights.klfast(spec)
    calls = [functools.partial(QuantLinear(copy, activation=activation), x) for copy in copies]
    return Contender(
        calls,
        lambda: distance(calls[0](), reference.dequant_matmul(x, copies[0], None, activation)),
        tolerance(x.dtype),
        copies[0].nbytes,
        peak="int8" if activation == "int8" else "bfloat16",
    )


def _linear(x: torch.Tensor, weights: Weights, dtype: torch.dtype) -> Contender:
    require_kernel("linear", x)
    copies, x = weights.dense(dtype), x.to(dtype)
    calls = [functools.partial(peers.layer(Linear, w), x) for w in copies]
    return Contender(
        calls,
        lambda: distance(calls[0](), reference.linear(x, copies[0])),
        tolerance(dtype),
        copies[0].nbytes,
        peak="bfloat16" if dtype == torch.bfloat16 else "",
    )


class Linear(torch.nn.Linear):
    """nn.Linear with klfast's matmul."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return ops.linear(x, self.weight)


def require_kernel(op: str, x: torch.Tensor) -> None:
    """Raise UnavailableError if the slow reference would run."""
    if not registry.has_kernel(op, x.device.type.upper()):
        raise UnavailableError(f"klfast has no {x.device.type} kernel of {op}")


def test_linear(group, name, run, benchmark):
    run.time("linear", group, name, benchmark)
