"""The program of this folder, built by clang with libFuzzer, AddressSanitizer and UndefinedBehaviorSanitizer."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import csrc_program
import sanitizers

FOLDER = csrc_program.ROOT / sanitizers.OBJECTS
FOUND = sorted((Path(__file__).parent / "found").glob("*"))  # inputs that showed a fault once


def build() -> str:
    """Build it for the tiers that this machine runs; return its path."""
    built = csrc_program.build(
        "fuzz_kernels",
        "tests/fuzz/csrc/*.cpp",
        flags=sanitizers.FUZZED,
        environment=sanitizers.ENVIRONMENT | sanitizers.CLANG,
        folder=sanitizers.OBJECTS,
    )
    return str(built["program"])


def run(program: str, *arguments: str) -> int:
    """Run it with libFuzzer's arguments; return its exit status."""
    # Which inputs are rare, -entropic counts, which takes a third of the time.
    limits = ["-timeout=600", "-rss_limit_mb=4096", "-max_len=400", "-len_control=0", "-entropic=0"]
    limits.append(f"-artifact_prefix={FOLDER}/")
    return subprocess.run([program, *limits, *arguments], env=os.environ | sanitizers.QUIET).returncode
