"""What sweeps in cheaper arithmetic can tell apart: noise floor and KL of single layers, against float32.

The bundled models are swept in bfloat16 and with suffixes by differences in int8, which take small layers, too, here.

    python -m klfast.bench.sweep_dtypes --out bench/results/sweep_dtypes.md
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from statistics import median

import torch

import klfast
from klfast.core.dtypes import dtype_name
from klfast.core.io import write_atomic
from klfast.core.machine import cpu_name
from klfast.reporting.table import Cell, Table
from klfast.sensitivity import differences

MODELS, SPECS, KL = ("mamba2", "mamba", "hymba"), ("int4-g64-sym", "int8-g64-sym"), "kl_teacher_student"
WAYS = {
    "float32": (torch.float32, "exact"),
    "bfloat16": (torch.bfloat16, "exact"),
    "float32, suffix in int8": (torch.float32, "int8"),
}
LENGTH = 256
HEADINGS = (
    *("model", "computed in", "noise floor", "of layers in", "least KL", "median"),
    *("median error of KL, %", "largest, %"),
)


def measure(name: str, windows: int) -> Iterator[tuple[Cell, ...]]:
    """Yield rows of the table: a bundled model's layers in each spec, swept in each way."""
    tokenizer, truth = klfast.load_tokenizer(name), {}
    for way, (dtype, suffix) in WAYS.items():
        if suffix == "int8" and differences.why_not(torch.device("cpu"), dtype):
            continue
        model = klfast.load_model(name, dtype=dtype_name(dtype))
        text = klfast.token_batches(
            "calibration", tokenizer, vocab_size=model.config.vocab_size, windows=windows, length=LENGTH
        )
        found = klfast.sweep(model, text, SPECS, KL, vocabulary="sampled", dtype=dtype, suffix=suffix)
        kl = {key: one.mean[KL] for key, one in found.measurements.items()}
        truth = truth or kl
        for spec in SPECS:
            keys = [key for key in kl if str(key[1]) == spec]
            errors = [100 * abs(kl[key] / truth[key] - 1) for key in keys]
            of_spec = [kl[key] for key in keys]
            least, middle = min(of_spec), median(of_spec)
            yield (name, way, found.noise_floor[KL], spec, least, middle, median(errors), max(errors))


def main() -> None:
    """Sweep the bundled models and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--windows", type=int, default=2, help=f"calibration windows of {LENGTH} tokens")
    asked = parser.parse_args()
    differences.LEAST_SIDE = 1
    rows = [row for name in MODELS for row in measure(name, asked.windows)]
    conditions = (
        f"KL divergence in nats a token, of one layer at a time, on {asked.windows * LENGTH} tokens of the bundled "
        f"calibration text. `python -m klfast.bench.sweep_dtypes` on {cpu_name()}, klfast {klfast.__version__}, torch "
        f"{torch.__version__}."
    )
    table = Table("KL of single layers", HEADINGS, tuple(rows))
    write_atomic(asked.out, f"# Arithmetic of sweeps\n\n{conditions}\n\n{table.markdown()}")


if __name__ == "__main__":
    main()
