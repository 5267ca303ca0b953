"""Compilation of the shipped SPIR-V with Intel's offline compiler ocloc, where installed: no spills."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from xpu.lunar_lake import Compiled
from xpu.workers import WORKERS

# Lunar Lake, and Battlemage, which has its instructions and registers, so that one program of each kernel is enough.
# Ponte Vecchio, which older compilers know and which has Xe2's matrix instructions (16 lanes, same shapes), only where
# no ocloc knows Lunar Lake.
DEVICES = ("lnl", "bmg")
OLDER = "pvc"
SPILL_SIZE = re.compile(rb"spill_size:\s*(\d+)")  # in the binary's section .ze_info
WARNING = re.compile(r"allocated \d+ regs and spilled around \d+")


def check_all(shipped: dict[str, Compiled]) -> int:
    """Compile for each device that an ocloc (PATH, $OCLOC) knows; return how many programs fail or spill registers."""
    found = [path for name in ("ocloc", os.environ.get("OCLOC", "")) if (path := shutil.which(name))]
    if not found:
        print("SKIPPED machine code: ocloc is not installed (Debian: intel-opencl-icd; later intel-ocloc)", flush=True)
        return 0
    compilers = {device: next((path for path in found if _knows(path, device)), None) for device in (*DEVICES, OLDER)}
    failures = 0
    for device in DEVICES if compilers[DEVICES[0]] else (*DEVICES, OLDER):
        ocloc = compilers[device]
        if ocloc is None:
            print(f"SKIPPED machine code for {device}: not known to {' or '.join(found)}", flush=True)
            continue
        some = _one_of_each(shipped) if device == "bmg" else shipped
        with ThreadPoolExecutor(WORKERS) as pool:
            complaints = pool.map(lambda compiled: _complaint(ocloc, device, compiled), some.values())  # noqa: B023
            wrong = [
                f"FAILED  {name}: {complaint}" for name, complaint in zip(some, complaints, strict=True) if complaint
            ]
        print(
            f"Machine code for {device} ({ocloc}): {len(some) - len(wrong)} of {len(some)} programs compile "
            "without spills",
            *wrong,
            sep="\n",
            flush=True,
        )
        failures += len(wrong)
    return failures


def _one_of_each(shipped: dict[str, Compiled]) -> dict[str, Compiled]:
    """Return the last program of each kernel: that of the largest tiles."""
    last = {compiled.name: name for name, compiled in shipped.items()}
    return {name: shipped[name] for name in last.values()}


def _knows(ocloc: str, device: str) -> bool:
    return subprocess.run([ocloc, "ids", device], capture_output=True).returncode == 0


def _complaint(ocloc: str, device: str, compiled: Compiled) -> str:
    """Return what is wrong with a program on a device; empty if nothing."""
    command = [
        ocloc,
        "compile",
        "-device",
        device,
        "-spirv_input",
        "-file",
        "in.spv",
        "-output",
        "out",
        "-output_no_suffix",
    ]
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "in.spv").write_bytes(compiled.spirv)
        done = subprocess.run(
            [*command, "-options", compiled.build_flags, "--format", "zebin"],
            cwd=folder,
            capture_output=True,
            text=True,
        )
        if done.returncode:
            return " ".join((done.stdout + done.stderr).split())[-300:]
        size = SPILL_SIZE.search(next(Path(folder).glob("out*")).read_bytes())  # out, later out.bin
    if size and int(size[1]):
        return f"spills {int(size[1])} bytes per thread"
    warning = WARNING.search(done.stdout + done.stderr)
    return warning[0] if warning else ""
