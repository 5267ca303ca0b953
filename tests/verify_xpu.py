"""Compile the launches of klfast.kernels for Intel's Xe2 (Lunar Lake) to SPIR-V, without a device: `make verify-xpu`.

Runs in an environment of its own with triton-xpu 3.3.0b1 (Triton's XPU backend replaces the package triton). It says
which configurations compile, and that those with products got DPAS instructions. It does not say what is fast, nor that
a GPU computes the right thing.
"""

from __future__ import annotations

import importlib.util
import os
import re
import sys
import tempfile
import types
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
os.environ["TRITON_CACHE_DIR"] = tempfile.mkdtemp()

import torch
import triton
from triton.backends import backends
from triton.backends.compiler import GPUTarget

if importlib.util.find_spec("klfast.kernels") is None:  # a source tree, not installed in this environment
    folder = ROOT / "kernels" / "triton"
    spec = importlib.util.spec_from_file_location("klfast.kernels", folder / "__init__.py", submodule_search_locations=[str(folder)])
    sys.modules["klfast.kernels"] = importlib.util.module_from_spec(spec)

from triton_aot import source
from triton_launches import launches

# What a driver would say of the GPU of a Core Ultra 200V.
LUNAR_LAKE = dict(
    name="Intel(R) Arc(TM) Graphics", architecture=21479031808, sub_group_sizes=[16, 32], max_work_group_size=1024, max_num_sub_groups=64,
    has_fp64=True, has_subgroup_matrix_multiply_accumulate=True, has_subgroup_matrix_multiply_accumulate_tensor_float32=True,
    has_subgroup_2d_block_io=True, has_bfloat16_conversions=True, gpu_eu_count=64, gpu_subslice_count=8, version="12.70", vendor="Intel",
    platform_name="Intel(R) oneAPI Unified Runtime over Level-Zero",
)  # fmt: skip
DPAS = re.compile(r"call.*(?:sub_group.*matrix_mad|GenISA\.sub\.group\.dpas|SubgroupMatrixMultiply)")


def main() -> int:
    # The backend compiles a C extension to ask the driver for the architecture; there is none to ask.
    backends["intel"].compiler.__init__.__globals__["compile_module_from_src"] = lambda *_: types.SimpleNamespace(parse_device_arch=lambda _: "lnl")
    target = GPUTarget("xpu", LUNAR_LAKE, 32)
    out = Path(sys.argv[1]) if len(sys.argv) > 1 else None
    failures = 0
    for name, launch, matrix in launches("intel"):
        try:
            compiled = triton.compile(source(launch), target=target, options=dict(launch.options))
        except Exception as error:  # whatever the compiler raises is what is to be reported
            failures += 1
            while error.__cause__ is not None:  # Triton wraps it once a function called
                error = error.__cause__
            print(f"FAILED  {name}: {type(error).__name__}: {' '.join(str(error).split())[-400:]}", flush=True)
            continue
        dpas = len(DPAS.findall(compiled.asm["llir"]))
        wrong = bool(dpas) != (matrix is not None)
        failures += wrong
        print(f"{'FAILED' if wrong else 'ok':<7} {name}: {len(compiled.asm['spv'])} bytes of SPIR-V, {dpas} DPAS, SLM {compiled.metadata.shared}", flush=True)
        if out is not None:
            out.mkdir(parents=True, exist_ok=True)
            (out / (re.sub(r"\W+", "_", name) + ".spv")).write_bytes(compiled.asm["spv"])
    print(f"triton {triton.__version__} (XPU), target lnl: {'all compile' if not failures else f'{failures} failed'}")
    return min(failures, 1)


if __name__ == "__main__":
    sys.exit(main())
