"""Run random cases: python tests/differential --cases 10000 --first 0; one again: --case 123."""

from __future__ import annotations

import argparse
import sys
import time

import torch
from judging import fault


def main() -> int:
    """Print each fault as it is found, and a summary; return 1 if there were any."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--case", type=int, help="run this one alone")
    parser.add_argument("--op", help="of this op alone (its function in calls.py)")
    a = parser.parse_args()
    torch.set_num_threads(1)
    first, cases = (a.first, a.cases) if a.case is None else (a.case, 1)
    faults, start = 0, time.process_time()
    for number in range(first, first + cases):
        if complaint := fault(number, a.op):
            faults += 1
            print(complaint, flush=True)
        if (done := number - first + 1) % 10_000 == 0:
            print(f"{done} cases, {faults} faults, {time.process_time() - start:.0f} s of CPU", flush=True)
    print(f"{cases} cases from {first}, {faults} faults, {time.process_time() - start:.1f} s of CPU")
    return faults > 0


if __name__ == "__main__":
    sys.exit(main())
