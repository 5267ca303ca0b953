"""The program of this folder, built by clang with libFuzzer, AddressSanitizer and UndefinedBehaviorSanitizer."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import csrc_program

FOLDER = csrc_program.ROOT / "build" / "fuzz_kernels"
FOUND = sorted((Path(__file__).parent / "found").glob("*"))  # inputs that showed a fault once
_FLAGS = (
    "-O1 -g1 -fno-omit-frame-pointer -fsanitize=fuzzer,address,undefined -fno-sanitize=null,vptr,object-size "
    "-fno-sanitize-recover=all -fno-sanitize-coverage=trace-cmp"  # inputs are shapes and choices, not texts to guess
)
_PROBE = """
#include <omp.h>
extern "C" int LLVMFuzzerTestOneInput(const unsigned char*, unsigned long) { return omp_in_parallel(); }
"""


def why_not() -> str:
    """Return why the program cannot be built here, in a sentence; empty if it can."""
    command = ["clang++", "-fsanitize=fuzzer,address", "-fopenmp", "-x", "c++", "-", "-o", os.devnull]
    try:
        can = subprocess.run(command, input=_PROBE, text=True, capture_output=True).returncode == 0
    except OSError:
        can = False
    return "" if can else "needs clang++ with libFuzzer and OpenMP (Debian: apt install clang libomp-dev)"


def build() -> str:
    """Build it for the tiers that this machine runs; return its path."""
    built = csrc_program.build(
        "fuzz_kernels",
        "tests/fuzz/csrc/*.cpp",
        flags=_FLAGS,
        environment={"CXX": "clang++", "KLFAST_TIERS_HERE": "1"},
        folder=str(FOLDER.relative_to(csrc_program.ROOT)),
    )
    return str(built["program"])


def run(program: str, *arguments: str) -> int:
    """Run it with libFuzzer's arguments; return its exit status."""
    quiet = {"OMP_WAIT_POLICY": "passive", "KMP_BLOCKTIME": "0", "ASAN_OPTIONS": "detect_leaks=0"}
    # Which inputs are rare, -entropic counts, which takes a third of the time.
    limits = ["-timeout=600", "-rss_limit_mb=4096", "-max_len=400", "-len_control=0", "-entropic=0"]
    limits.append(f"-artifact_prefix={FOLDER}/")
    return subprocess.run([program, *limits, *arguments], env=os.environ | quiet).returncode
