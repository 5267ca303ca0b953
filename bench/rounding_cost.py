"""How long GPTQ takes: a whole Mamba-130M-sized model, tied head included, with random weights and text.

The weights do not matter: the work depends on shapes and tokens alone.

    python -m klfast.bench.rounding_cost --out bench/results/rounding_cost.md
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch

import klfast
from klfast.core.io import write_atomic
from klfast.core.machine import cpu_name
from klfast.models.matrices import matrices
from klfast.planning.plan_file import Plan
from klfast.reporting.table import Cell, Table

from . import models

SPEC, LENGTH = "int4-g64-sym", 256
HEADINGS = ("calibration tokens", "minutes", "CPU minutes")


def measure(name: str, windows: int) -> tuple[Cell, ...]:
    """Return the row of a number of calibration windows."""
    model = models.plain(name)
    text = torch.randint(model.config.vocab_size, (windows, LENGTH))
    plan = Plan(dict.fromkeys(matrices(model), SPEC), "uniform")
    wall, cpu = time.perf_counter(), time.process_time()
    klfast.quantize_model(model, plan, rounding="gptq", calibration=text)
    return windows * LENGTH, (time.perf_counter() - wall) / 60, (time.process_time() - cpu) / 60


def main() -> None:
    """Measure each number of windows; write the table after each."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", default="mamba-130m", choices=models.NAMES)
    parser.add_argument("--windows", type=int, nargs="+", default=(32, 128), help=f"windows of {LENGTH} tokens")
    asked = parser.parse_args()
    conditions = (
        f"A whole {asked.model}-sized model with random weights, in {SPEC}, on random tokens in windows of {LENGTH}. "
        f"`python -m klfast.bench.rounding_cost` on {cpu_name()}, {torch.get_num_threads()} threads, "
        f"klfast {klfast.__version__}, torch {torch.__version__}."
    )
    rows = []
    for windows in asked.windows:
        rows.append(measure(asked.model, windows))
        print(*rows[-1], flush=True)
        write_atomic(
            asked.out, f"# What GPTQ takes\n\n{conditions}\n\n{Table('Rounding', HEADINGS, tuple(rows)).markdown()}"
        )


if __name__ == "__main__":
    main()
