"""Damage files where that runs new code, by atheris: python tests/fuzz/guided.py --seconds 1200; one reader: plan.

What it finds, and the files that it goes on from, lie in build/fuzz_readers.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import tempfile
from pathlib import Path

sys.path.insert(1, str(Path(__file__).parents[1] / "support"))
sys.path.insert(2, str(Path(__file__).parents[2]))

import atheris

with atheris.instrument_imports(include=["klfast"]):
    import torch
    from fuzzing import Fuzzed
    from mutating import mutated
    from readers import READERS

_FOLDER = Path(__file__).parents[2] / "build" / "fuzz_readers"


def guide(name: str, folder: Path, seconds: int, runs: int) -> None:
    """Fuzz one reader, and end the process; an input is the number of a file, a byte, and its content."""
    torch.set_num_threads(1)
    fuzzed, corpus = Fuzzed(name, folder), _FOLDER / name
    corpus.mkdir(parents=True, exist_ok=True)
    for i, content in enumerate(fuzzed.contents.values()):
        (corpus / f"valid-{i}").write_bytes(bytes([i]) + content)

    def read(data: bytes) -> None:
        path = fuzzed.paths[data[0] % len(fuzzed.paths)] if data else fuzzed.paths[0]
        if complaint := fuzzed.fault(path, data[1:]):
            raise AssertionError(f"{name}, {path}: {complaint}")

    def mutate(data: bytes, max_size: int, seed: int) -> bytes:
        try:
            return (data[:1] + mutated(data[1:], random.Random(seed)))[:max_size]
        except (ArithmeticError, RecursionError, ValueError):  # what was damaged before need not be JSON
            return bytes(atheris.Mutate(data, max_size))

    longest = 2 * max(map(len, fuzzed.contents.values())) + 1
    limits = [f"-max_total_time={seconds}", f"-runs={runs}", f"-max_len={longest}", "-timeout=600"]
    outputs = [f"-artifact_prefix={_FOLDER}/{name}-", "-print_final_stats=1", str(corpus)]
    atheris.Setup([sys.argv[0], *limits, "-rss_limit_mb=0", *outputs], read, custom_mutator=mutate)
    atheris.Fuzz()


def main() -> int:
    """Fuzz readers, each in a process, since libFuzzer ends it; return 1 if one had a fault."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("readers", nargs="*", default=list(READERS), help="some of them; all by default")
    parser.add_argument("--seconds", type=int, default=120, help="how long to go on, for all readers together")
    parser.add_argument("--runs", type=int, default=-1, help="the most inputs for each")
    a = parser.parse_args()
    ends = []
    with tempfile.TemporaryDirectory() as folder:
        for name in a.readers:
            print(name, flush=True)
            (Path(folder) / name).mkdir()
            if (child := os.fork()) == 0:
                guide(name, Path(folder) / name, a.seconds // len(a.readers), a.runs)
            ends.append(os.waitpid(child, 0)[1])
    return any(ends)


if __name__ == "__main__":
    sys.exit(main())
