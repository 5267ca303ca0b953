"""Launches of dequant_matmul by shape, and the shipped configurations.

One row of exact x takes a kernel without matrix instructions (dequant_gemv.py), all else one with them
(dequant_gemm.py): for up to 8 rows on NVIDIA GPUs the narrowest, whose 8 columns x (nearly) fills. Where y alone makes
too few programs, K is split between several.

Instructions per weight in the loop on sm_90, INT4 in groups of 128: 2.6 with the narrowest instructions, 5.9 without
any. An H100's memory leaves time for about 7, and half of it is not hidden behind the reads, so one row of 16-bit x
uses them there.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from klfast.kernels.dequant_common import BLOCK_EACH, ROW, TILE
from klfast.kernels.dequant_gemm import dequant_gemm
from klfast.kernels.dequant_gemv import dequant_gemv, split_sum
from klfast.kernels.launch import INTERPRETED, MANY, Launch, cdiv, options, speaks_ptx
from klfast.kernels.quantize_rows import quantize_rows

from klfast.quant.layouts import Tiling
from klfast.quant.spec import QuantSpec

BAND = 8


@dataclass(frozen=True)
class Config:
    """A tile for up to ``rows`` rows of x: BM of them by BN of the weight; K split for ``per_core`` programs a core.

    ``shared``: bytes of shared memory a program that the device must have.
    """

    rows: int
    BM: int
    BN: int
    num_warps: int
    num_stages: int = 1
    per_core: int = 4
    grf_mode: str | None = None
    shared: int = 0


GEMV = {"nvidia": Config(1, 1, 64, 4, per_core=8), "intel": Config(1, 1, 16, 4)}
_SMALL = (Config(8, 8, 128, 4, 3), Config(16, 16, 64, 2, 3), Config(32, 32, 64, 2, 3), Config(64, 64, 64, 4, 3, 2))
# An A100 and an H100 have more than 160 KB, GeForce RTX 30 to 50 and L4 have 99.
_LARGEST = (Config(MANY, 128, 128, 8, 4, shared=152 << 10), Config(MANY, 128, 128, 8, 3))
_INTEL = (Config(16, 16, 32, 4, grf_mode="256"), Config(MANY, 32, 64, 8, grf_mode="256"))
GEMM = {  # family, dtype of x: float32 takes three times the registers, int8 has its own scales
    ("nvidia", torch.float16): (*_SMALL, *_LARGEST),
    ("nvidia", torch.bfloat16): (*_SMALL, *_LARGEST),
    ("nvidia", torch.float32): (*_SMALL[:2], Config(32, 32, 64, 4, 3), Config(MANY, 64, 64, 4, 3)),
    ("nvidia", torch.int8): (*_SMALL[:3], Config(64, 64, 64, 2, 3, 1), Config(MANY, 128, 64, 4, 3)),
    ("intel", torch.float16): _INTEL,
    ("intel", torch.bfloat16): _INTEL,
    ("intel", torch.float32): (_INTEL[0], Config(MANY, 16, 64, 8, grf_mode="256")),
    ("intel", torch.int8): (_INTEL[0], Config(64, 32, 32, 4, grf_mode="256"), Config(MANY, 64, 64, 16, grf_mode="256")),
}


def pick(configs: tuple[Config, ...], m: int, shared: int) -> Config:
    """Return the first configuration for at least m rows of x that needs no more shared memory."""
    return next(config for config in configs if m <= config.rows and config.shared <= shared)


def parts_of(programs: int, n_tiles: int, wanted: int) -> tuple[int, int]:
    """Return (parts of K, tiles in each) for the wanted number of programs, with four or more tiles per part."""
    parts = min(cdiv(wanted, max(programs, 1)), max(n_tiles // 4, 1))
    tiles = cdiv(n_tiles, parts) if n_tiles else 0
    return (cdiv(n_tiles, tiles) if tiles else 1), tiles


@dataclass(frozen=True)
class Weight:
    """A quantized [N, K] weight in ``Layout.TILED``, with contiguous parts."""

    packed: torch.Tensor
    scale: torch.Tensor
    zero_point: torch.Tensor | None = None
    k: int = field(kw_only=True)
    spec: QuantSpec = field(kw_only=True)

    @property
    def tiling(self) -> Tiling:
        """The tiling of K."""
        return Tiling.of(self.k, self.spec.bits, self.spec.group_size)


def plan(
    x: torch.Tensor,
    weight: Weight,
    bias: torch.Tensor | None,
    y: torch.Tensor,
    *,
    int8: bool,
    family: str,
    cores: int,
    shared: int = MANY,
) -> list[Launch]:
    """Plan the launches that compute y [M, N].

    Args:
        x: [M, n_blocks * block], each row contiguous and each group padded (``layouts.fill_blocks``).
        weight: [N, K].
        bias: [N], or None.
        y: [M, N], of any float dtype.
        int8: round x to int8 first.
        family: "nvidia" or "intel".
        cores: of the device.
        shared: bytes of shared memory that a program may have there.
    """
    scale, bits, tiling = weight.scale, weight.spec.bits, weight.tiling
    (m, width), (_, n) = x.shape, scale.shape
    launches = []
    x_scale = None
    if int8:
        rounded = torch.empty(m, width, dtype=torch.int8, device=x.device)
        x_scale = torch.empty(m, scale.shape[0], dtype=torch.float32, device=x.device)
        launches.append(plan_rounding(x, rounded, x_scale, tiling))
        x = rounded
    gemv = m == 1 and not int8 and not (family == "nvidia" and x.dtype != torch.float32)
    config = GEMV[family] if gemv else pick(GEMM[family, x.dtype], m, shared)
    programs = cdiv(n, config.BN) * cdiv(m, config.BM)
    parts, tiles = parts_of(programs, tiling.turns, config.per_core * cores)
    out = y if parts == 1 else torch.empty(parts, m, n, dtype=torch.float32, device=x.device)
    scales = ROW if scale.shape[0] == 1 else TILE if bits != 4 or tiling.group_blocks % 2 == 0 else BLOCK_EACH
    args = dict(
        x_ptr=x,
        w_ptr=weight.packed,
        s_ptr=scale,
        z_ptr=weight.zero_point,
        bias_ptr=bias if parts == 1 else None,
        y_ptr=out,
        N=n,
        n_tiles=tiling.turns,
        n_blocks=tiling.n_blocks,
        group_blocks=tiling.group_blocks,
        tiles_per_part=tiles,
        BITS=bits,
        SCALES=scales.value,
        BN=config.BN,
        BLOCK=tiling.block,
        PTX=speaks_ptx(family),
    )
    if not gemv:
        args |= dict(
            M=m,
            stride_xm=x.stride(0),
            xs_ptr=x_scale,
            stride_xs=scale.shape[0],
            BM=config.BM,
            BAND=BAND,
            UPCAST=INTERPRETED,
            AHEAD=family == "nvidia",
        )
    grid = (programs, parts)
    launches.append(Launch(dequant_gemv if gemv else dequant_gemm, grid, args, options(config)))
    if parts > 1:
        args = dict(part_ptr=out, bias_ptr=bias, y_ptr=y, M=m, N=n, PARTS=parts, BN=256)
        launches.append(Launch(split_sum, (m, cdiv(n, 256)), args, dict(num_warps=4)))
    return launches


def plan_rounding(x: torch.Tensor, rounded: torch.Tensor, x_scale: torch.Tensor, tiling: Tiling) -> Launch:
    """Plan the launch that rounds x [M, W] to int8 with scales [M, G]."""
    m, groups = x_scale.shape
    chunk = tiling.block
    while chunk < 1024 and tiling.group_blocks * tiling.block % (2 * chunk) == 0 and x.shape[1] % (2 * chunk) == 0:
        chunk *= 2
    rows = max(1, 1024 // chunk)
    args = dict(
        x_ptr=x,
        q_ptr=rounded,
        s_ptr=x_scale,
        M=m,
        K=x.shape[1],
        G=groups,
        n_chunks=tiling.group_blocks * tiling.block // chunk,
        stride_xm=x.stride(0),
        BM=rows,
        CHUNK=chunk,
    )
    return Launch(quantize_rows, (cdiv(m, rows), groups), args, dict(num_warps=4))
