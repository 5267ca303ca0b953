"""Compilation of klfast.kernels' launches for an absent Intel Xe2 GPU (Lunar Lake) with triton-xpu 3.3.0b1."""

from __future__ import annotations

import re
import types
from dataclasses import dataclass

import triton
from klfast.kernels.launch import FUSED
from triton.backends import backends
from triton.backends.compiler import GPUTarget
from triton_aot import source

# A driver's description of the GPU of a Core Ultra 200V.
PROPERTIES = dict(
    name="Intel(R) Arc(TM) Graphics",
    architecture=21479031808,
    sub_group_sizes=[16, 32],
    max_work_group_size=1024,
    max_num_sub_groups=64,
    has_fp64=True,
    has_subgroup_matrix_multiply_accumulate=True,
    has_subgroup_matrix_multiply_accumulate_tensor_float32=True,
    has_subgroup_2d_block_io=True,
    has_bfloat16_conversions=True,
    gpu_eu_count=64,
    gpu_subslice_count=8,
    version="12.70",
    vendor="Intel",
    platform_name="Intel(R) oneAPI Unified Runtime over Level-Zero",
)
TARGET = GPUTarget("xpu", PROPERTIES, 32)
DPAS = re.compile(r"call.*(?:sub_group.*matrix_mad|GenISA\.sub\.group\.dpas|SubgroupMatrixMultiply)")
GRF_MODES = {"128": "small", "256": "large"}  # names of today's Triton and of 3.3

_backend = backends["intel"].compiler
# It compiles a C extension to ask the driver for the architecture, and asks an ocloc on the PATH, maybe an old one, for
# its features. Neither may decide here.
_backend.__init__.__globals__["compile_module_from_src"] = lambda *_: types.SimpleNamespace(
    parse_device_arch=lambda _: "lnl"
)
_backend.device_props["lnl"] = {}


@dataclass(frozen=True)
class Compiled:
    """A launch, compiled to SPIR-V.

    Attributes:
        spirv: the module.
        name: of its kernel.
        threads: in a program.
        shared: bytes of shared local memory.
        dpas: calls of matrix instructions.
        build_flags: for Intel's compiler (registers a thread).
    """

    spirv: bytes
    name: str
    threads: int
    shared: int
    dpas: int
    build_flags: str


def compile_for_lunar_lake(launch) -> Compiled:
    options = launch.options | FUSED
    if "grf_mode" in options:
        options["grf_mode"] = GRF_MODES[options["grf_mode"]]
    compiled = triton.compile(source(launch), target=TARGET, options=options)
    meta = compiled.metadata
    dpas = len(DPAS.findall(compiled.asm["llir"]))
    return Compiled(
        compiled.asm["spv"], meta.name, meta.num_warps * meta.threads_per_warp, meta.shared, dpas, meta.build_flags
    )
