"""Every kernel's SPIR-V, run on Intel's OpenCL CPU runtime and compared with float64."""

from __future__ import annotations

from functools import cache
from itertools import groupby

import pytest
import torch
from klfast.kernels import launch
from ssm_truth import poison

from klfast.dispatch import pins
from xpu.cases import cases
from xpu.lunar_lake import Compiled
from xpu.opencl_cpu import OpenCLCPU
from xpu.workers import each


def run_all(shipped: dict[str, Compiled]) -> int:
    """Run the cases, print each group's largest error; return the number of failures and of shipped kernels not run."""
    failures, ran, every = 0, {}, cases()
    outcomes = zip(every, each(run_case, len(every)), strict=True)
    for group, members in groupby(outcomes, key=lambda outcome: outcome[0].group):
        errors, wrong = [], []
        for case, (error, kernels) in members:
            ran |= kernels
            errors.append(error)
            if not error <= case.allowed:
                wrong.append(f"        {case.name}: {error:.1e}")
        failures += len(wrong)
        verdict = f"{group}: {len(errors)} cases, largest error {max(errors):.1e}, allowed {case.allowed:.1e}"
        print(f"{'FAILED' if wrong else 'ok':<7} {verdict}", *wrong, sep="\n", flush=True)
    if idle := {compiled.name for compiled in shipped.values()} - set(ran.values()):
        failures += len(idle)
        print(f"FAILED  no case runs {', '.join(sorted(idle))}")
    left = [name for name, compiled in shipped.items() if compiled.spirv not in ran]
    print(
        f"{len(shipped) - len(left)} of {len(shipped)} shipped programs ran unchanged"
        f"{'; not ' + ', '.join(left) if left else ''}",
        flush=True,
    )
    return failures


def run_case(index: int) -> tuple[float, dict[bytes, str]]:
    """Return a case's error, and the names of the kernels that it ran, by SPIR-V module."""
    case, cpu = cases()[index], _cpu()
    cpu.ran = {}
    with pytest.MonkeyPatch.context() as patch, runtime_of_kernels(patch, cpu, case.cores):
        torch.manual_seed(0)
        return case.error(), cpu.ran


_cpu = cache(OpenCLCPU)  # one per process


def runtime_of_kernels(patch: pytest.MonkeyPatch, cpu: OpenCLCPU, cores: int):
    """Make klfast's ops plan for an Intel GPU of ``cores`` and launch on ``cpu``; what they allocate starts as NaN."""
    patch.setattr(launch, "family", lambda _: "intel")
    patch.setattr(launch, "cores", lambda _: cores)
    patch.setattr(launch.Launch, "run", lambda self: cpu.run(self))  # noqa: PLW0108 (a bound method would lose self)
    patch.setattr(
        pins, "interprets_triton", lambda: True
    )  # Triton kernels for tensors on the CPU; not an interpreter here
    poison(patch)
    return pins.using("triton")
