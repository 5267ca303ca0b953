"""Linear layers: dequant_matmul and linear against torch's and OpenVINO's, at the sizes of Mamba and Hymba models."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from klfast import ops, reference, registry
from klfast.types import QuantSpec

from . import peers
from .contest import Contender, Group, Unavailable, distance, tolerance
from .settings import Settings
from .weights import Weights, weights

# (K, N): an input projection of Mamba-1.4B, then layers of Mamba-130M, a head, Mamba-1.4B again, and Hymba-1.5B.
SHAPES = (
    (2048, 8192),
    (768, 3072), (1536, 768), (1536, 80), (48, 1536), (2048, 50280), (4096, 2048),
    (1600, 8960), (3200, 1600), (3200, 132), (100, 3200), (5504, 1600),
)  # fmt: skip
ROWS = (1, 4, 8, 16, 128, 512)
SPECS = {"int4": QuantSpec(4, 128), "int8": QuantSpec(8, 128)}


def groups(settings: Settings) -> Iterator[Group]:
    shapes = settings.shapes or (((768, 3072),) if settings.quick else SHAPES)
    rows = settings.rows or ((1, 16) if settings.quick else ROWS)
    for k, n in shapes:
        for m in rows:
            yield Group(f"{k}x{n}, M={m}", {"k": k, "n": n, "m": m}, dict(_contenders(k, n, m, settings)), flops=2.0 * m * k * n)


def _contenders(k: int, n: int, m: int, settings: Settings) -> Iterator[tuple[str, Callable[[], Contender]]]:
    def against(build: Callable[..., Contender], *args: object) -> Callable[[], Contender]:
        def built() -> Contender:
            x = torch.randn(m, k, device=settings.device, dtype=torch.bfloat16)
            return build(x, weights(k, n, settings), *args)

        return built

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
    calls = [lambda w=w: ops.dequant_matmul(x, w, activation=activation) for w in copies]
    return Contender(calls, lambda: distance(calls[0](), reference.dequant_matmul(x, copies[0], None, activation)), tolerance(x.dtype), copies[0].nbytes)


def _linear(x: torch.Tensor, weights: Weights, dtype: torch.dtype) -> Contender:
    require_kernel("linear", x)
    copies, x = weights.dense(dtype), x.to(dtype)
    calls = [lambda w=w: ops.linear(x, w) for w in copies]
    return Contender(calls, lambda: distance(calls[0](), reference.linear(x, copies[0])), tolerance(dtype), copies[0].nbytes)


def require_kernel(op: str, x: torch.Tensor) -> None:
    """Raise Unavailable where the slow reference would run."""
    if not registry.has_kernel(op, x.device.type.upper()):
        raise Unavailable(f"klfast has no {x.device.type} kernel of {op}")


def test_linear(group, name, run, benchmark):
    run.time("linear", group, name, benchmark)
