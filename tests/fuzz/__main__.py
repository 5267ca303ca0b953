"""Feed damaged files to klfast's readers: python tests/fuzz --seconds 120; one input again: --reader plan --case 17."""

from __future__ import annotations

import argparse
import itertools
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(1, str(Path(__file__).parents[1] / "support"))
sys.path.insert(2, str(Path(__file__).parents[2]))

import torch
from fuzzing import Fuzzed
from readers import READERS


def main() -> int:
    """Print each fault as it is found and, in the end, how many inputs each reader had; return 1 if there were any."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=120, help="how long to go on, for all readers together")
    parser.add_argument("--first", type=int, default=0, help="number of each reader's first input")
    parser.add_argument("--reader", choices=READERS, help="this one alone")
    parser.add_argument("--case", type=int, help="this input alone")
    parser.add_argument("--save", type=Path, help="a folder for the inputs that show a fault")
    a = parser.parse_args()
    torch.set_num_threads(1)
    names, faults = [a.reader] if a.reader else list(READERS), 0
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            (Path(folder) / name).mkdir()
            fuzzed, end, done = Fuzzed(name, Path(folder) / name), time.monotonic() + a.seconds / len(names), 0
            for number in [a.case] if a.case is not None else itertools.count(a.first):
                path, content = fuzzed.case(number)
                if complaint := fuzzed.fault(path, content):
                    faults += 1
                    print(f"{name} {number}, {path}: {complaint}", flush=True)
                    if a.save:
                        (a.save / f"{name}-{number}-{path.name}").write_bytes(content)
                done += 1
                if time.monotonic() > end:
                    break
            print(f"{name}: {done} inputs", flush=True)
    print(f"{faults} faults")
    return faults > 0


if __name__ == "__main__":
    sys.exit(main())
