"""What plans gain that may give some rows of fused layers twice the bits: the KL divergence of plans of equal bytes.

Each bundled model is swept with each use of its fused layers' rows corrected. Plans choose from all of that, or from
what corrects the rows of time steps alone (dt), or from whole layers only; weights are rounded to nearest or by GPTQ.

    python -m klfast.bench.corrected_rows --out bench/results/corrected_rows.md
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import klfast
from klfast.core.io import write_atomic
from klfast.core.machine import cpu_name
from klfast.models.linears import linears, row_parts
from klfast.planning.plan_file import Plan
from klfast.reporting.table import Cell, Table

from .bundled import LENGTH, Bundled

UNIFORM = "int4-g64-sym"
SPECS = (UNIFORM, "int4-channel-sym", "int4-g32-sym", "int6-g64-sym", "int8-g64-sym")
SIZES = (1.0, 1.02, 1.05, 1.2)  # of plans, relative to uniform INT4's
CHOICES = ("whole layers", "and dt", "and each use")


class Bench(Bundled):
    """Plans for a bundled model."""

    def rows(self, swept: int) -> Iterator[tuple[Cell, ...]]:
        """Yield the rows of the table, for ``swept`` calibration windows in the sweep."""
        stored = klfast.load_model(self.name, dtype="auto")  # plans count its bytes
        parts = {layer: row_parts(stored, layer) for layer in linears(stored)}
        uses = [*dict.fromkeys(use for of in parts.values() for use in of)]
        text = self.calibration[:: len(self.calibration) // swept]
        options: dict[str, Any] = {"vocabulary": "sampled", "corrected": uses, "progress": False}
        found = klfast.sweep(stored, text, SPECS, "kl_teacher_student", **options)
        steps = {(layer, of["dt"][0]) for layer, of in parts.items() if "dt" in of}
        size = klfast.plan(found, method="uniform", spec=UNIFORM).predicted["bytes"]
        for rounding in ("nearest", "gptq"):
            offered = []
            for choice in CHOICES:
                some = replace(
                    found,
                    measurements={
                        (layer, spec): one
                        for (layer, spec), one in found.measurements.items()
                        if spec.first_corrected < 0
                        or choice == CHOICES[2]
                        or (choice == CHOICES[1] and (layer, spec.first_corrected) in steps)
                    },
                )
                if rounding == "gptq":
                    some = klfast.second_order_costs(self.teacher, some, self.calibration, SPECS, progress=False)
                offered.append(some)
            for share in SIZES if rounding == "nearest" else SIZES[::2]:
                plans = [klfast.plan(some, share * size) for some in offered]
                kls = [self._kl(plan, rounding) for plan in plans]
                counts = [sum(spec.first_corrected >= 0 for spec in plan.specs.values()) for plan in plans[1:]]
                row = self.name, rounding, share, *kls, *(kl / kls[0] for kl in kls[1:]), *counts
                print(*row, flush=True)
                yield row

    def _kl(self, plan: Plan, rounding: str) -> float:
        how = {"rounding": rounding, "calibration": self.calibration} if rounding == "gptq" else {}
        student = klfast.quantize_model(copy.deepcopy(self.teacher), plan, progress=False, **how)
        return self.kl_of(student)


def main() -> None:
    """Measure the models, and write the table after each."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--models", nargs="+", default=("mamba2", "mamba"))
    parser.add_argument("--windows", type=int, default=32, help=f"calibration windows of {LENGTH} tokens")
    parser.add_argument("--swept", type=int, default=16, help="calibration windows that are swept")
    parser.add_argument("--held-out", type=int, default=32, help="evaluation windows")
    asked = parser.parse_args()
    headings = (
        *("model", "rounding", "bytes", *CHOICES, "dt, relative", "each use, relative"),
        *("layers with dt corrected", "layers with some use corrected"),
    )
    conditions = (
        "KL divergence in nats a token from the model in full precision, on "
        f"{asked.held_out * LENGTH:,} tokens of the bundled evaluation text, of plans with as many bytes as uniform "
        f'{UNIFORM} times the third column. They choose from {", ".join(SPECS)} for whole layers; "and dt": also from '
        'each INT4 with the rows of the time steps corrected; "and each use": with those of any one use. The sweep ran '
        f"on {asked.swept * LENGTH:,} tokens of the bundled calibration text, GPTQ on {asked.windows * LENGTH:,}. "
        f"`python -m klfast.bench.corrected_rows` on {cpu_name()}, klfast {klfast.__version__}, torch "
        f"{torch.__version__}."
    )
    rows: list[tuple[Cell, ...]] = []
    for name in asked.models:
        for row in Bench(name, asked.windows, asked.held_out).rows(asked.swept):
            rows.append(row)
            table = Table("Plans of equal bytes", headings, tuple(rows)).markdown()
            write_atomic(asked.out, f"# Corrected rows of fused layers\n\n{conditions}\n\n{table}")


if __name__ == "__main__":
    main()
