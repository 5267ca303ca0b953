"""Let faults happen while klfast writes: python tests/crash --cases 200; one again: --kind full --case 17."""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NoReturn

_HERE = Path(__file__).parent
sys.path.insert(1, str(_HERE.parent / "support"))
sys.path.insert(2, str(_HERE.parents[1]))


def main() -> int:
    """Print each fault as it is found and, in the end, how many cases there were; return 1 if there were any."""
    from crashing import KINDS, Crashes
    from jobs import JOBS

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=5, help="of each kind")
    parser.add_argument("--first", type=int, default=0, help="number of each kind's first case")
    parser.add_argument("--kind", choices=KINDS, help="this one alone")
    parser.add_argument("--job", choices=JOBS, help="this one alone; the numbers of cases then mean others")
    parser.add_argument("--case", type=int, help="this case alone, and what came of it")
    a = parser.parse_args()
    usual = [kind for kind in KINDS if kind != "tmpfs" or os.geteuid() == 0]
    first, cases = (a.first, a.cases) if a.case is None else (a.case, 1)
    faults = 0
    with tempfile.TemporaryDirectory() as folder:
        crashes = Crashes(Path(folder), [a.job] if a.job else list(JOBS))
        for kind in [a.kind] if a.kind else usual:
            start = time.monotonic()
            for number in range(first, first + cases):
                what, wrong = crashes.case(kind, number)
                faults += bool(wrong)
                for one in wrong:
                    print(f"{kind} {number}, {what}: {one}", flush=True)
                if a.case is not None:
                    print(f"{kind} {number}, {what}", flush=True)
            print(f"{kind}: {cases} cases, {time.monotonic() - start:.0f} s", flush=True)
    print(f"{faults} faults")
    return faults > 0


def _start_with_faults() -> NoReturn:
    """Start this again as a process whose calls can be made to fail."""
    library = Path(tempfile.mkdtemp(), "faults.so")
    subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", library, _HERE / "faults.c", "-ldl"], check=True)
    os.environ.update(LD_PRELOAD=str(library), OMP_NUM_THREADS="1")
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


if __name__ == "__main__":
    library = os.environ.pop("LD_PRELOAD", "")
    if not library.endswith("faults.so"):
        _start_with_faults()
    shutil.rmtree(Path(library).parent)  # it is loaded
    sys.exit(main())
