"""Fuzz the kernels: python tests/fuzz/csrc --seconds 120; one input again: --input FILE."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(1, str(Path(__file__).parents[2] / "support"))

import kernels_fuzzer
import sanitizers


def main() -> int:
    """Build the program and run it; what it finds, and its corpus, lie in build/fuzz_kernels."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=int, default=120, help="how long to go on after building")
    parser.add_argument("--runs", type=int, default=-1, help="the most inputs to try")
    parser.add_argument("--corpus", type=Path, default=kernels_fuzzer.FOLDER / "corpus", help="a folder to go on from")
    parser.add_argument("--input", type=Path, help="this input alone")
    a = parser.parse_args()
    if complaint := sanitizers.why_no_clang():
        sys.exit(f"tests/fuzz/csrc {complaint}")
    program = kernels_fuzzer.build()
    if a.input:
        return kernels_fuzzer.run(program, str(a.input))
    a.corpus.mkdir(parents=True, exist_ok=True)
    limits = [f"-max_total_time={a.seconds}", f"-runs={a.runs}", "-print_final_stats=1"]
    return kernels_fuzzer.run(program, *limits, str(a.corpus))


if __name__ == "__main__":
    sys.exit(main())
