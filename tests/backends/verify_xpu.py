"""Check the launches of klfast.kernels for Intel's Xe2 (Lunar Lake) without a device: `make verify-xpu`.

In its own environment with triton-xpu 3.3.0b1 (Triton's XPU backend replaces the package triton). Three steps:
compile each to SPIR-V, run every kernel's SPIR-V on Intel's OpenCL CPU runtime, compile each to machine code with
ocloc. docs/XPU.md says what this does and does not show.
"""

from __future__ import annotations

import sys
import time

import xpu  # noqa: F401 (first: it makes klfast.kernels importable and sets the compilers' options)

# isort: split
import triton
from triton_launches import launches
from xpu import machine_code
from xpu.lunar_lake import Compiled, compile_for_lunar_lake
from xpu.workers import each


def main() -> int:
    start = time.monotonic()
    shipped, failures = compile_all()
    failures += run(shipped)
    failures += machine_code.check_all(shipped)
    print(f"make verify-xpu: {f'{failures} failed' if failures else 'all well'}, {time.monotonic() - start:.0f} s")
    return min(failures, 1)


def compile_all() -> tuple[dict[str, Compiled], int]:
    """Return the shipped launches, and how many fail to compile or have the wrong instructions."""
    shipped, failures = {}, 0
    matrices = {name: matrix for name, _, matrix in launches("intel")}
    for (name, matrix), compiled in zip(matrices.items(), each(compile_one, len(matrices)), strict=True):
        if isinstance(compiled, str):
            failures += 1
            print(f"FAILED  {name}: {compiled}", flush=True)
            continue
        shipped[name] = compiled
        if bool(compiled.dpas) != (matrix is not None):
            failures += 1
            print(f"FAILED  {name}: {compiled.dpas} DPAS", flush=True)
    count = sum(bool(compiled.dpas) for compiled in shipped.values())
    print(
        f"triton {triton.__version__} (XPU), target lnl: {len(shipped)} programs compile, {count} of them with DPAS",
        flush=True,
    )
    return shipped, failures


def compile_one(index: int) -> Compiled | str:
    """Return a compiled launch, or why it does not compile."""
    _, launch, _ = list(launches("intel"))[index]
    try:
        return compile_for_lunar_lake(launch)
    except Exception as error:  # noqa: BLE001 (any error of the compiler is reported)
        while error.__cause__ is not None:  # Triton wraps it once per called function
            error = error.__cause__
        return f"{type(error).__name__}: {' '.join(str(error).split())[-400:]}"


def run(shipped: dict[str, Compiled]) -> int:
    try:
        from xpu.opencl_cpu import OpenCLCPU

        version = OpenCLCPU().device.driver_version
    except (ImportError, RuntimeError) as error:
        print(f"SKIPPED running them on Intel's OpenCL CPU runtime: {error}", flush=True)
        return 0
    print(f"Run on Intel's OpenCL CPU runtime {version}:", flush=True)
    from xpu.run_on_cpu import run_all

    return run_all(shipped)


if __name__ == "__main__":
    sys.exit(main())
