"""What second-order rounding gains: the KL divergence of the bundled models, rounded to nearest and by GPTQ.

Each model is quantized as a whole, uniformly and the tied head included, and measured on the bundled evaluation text.

    python -m klfast.bench.rounding --out bench/results/rounding.md
"""

from __future__ import annotations

import argparse
import copy
import time
from pathlib import Path

import torch

import klfast
from klfast.core.io import write_atomic
from klfast.core.machine import cpu_name
from klfast.models.matrices import matrices
from klfast.quant.spec import storable_spec
from klfast.reporting.table import Cell, Table

MODELS = ("hymba", "mamba", "mamba2")
SPECS = ("int4-g64-sym",)
_LENGTH = 256
HEADINGS = (
    *("model", "spec", "MB of matrices", "KL to nearest", "KL by GPTQ", "ratio"),
    *("perplexity, nearest", "by GPTQ", "seconds of GPTQ"),
)


def measure(name: str, spec: str, windows: int, held_out: int) -> tuple[Cell, ...]:
    """Return a row of the table: a bundled model in one spec, with each rounding."""
    teacher, tokenizer = klfast.load_model(name, dtype="float32"), klfast.load_tokenizer(name)
    options = {"vocab_size": teacher.config.vocab_size, "length": _LENGTH}
    calibration = klfast.token_batches("calibration", tokenizer, windows=windows, **options)
    text = klfast.token_batches("evaluation", tokenizer, windows=held_out, **options)
    specs = {n: storable_spec(klfast.QuantSpec.parse(spec), m.shape[1]) for n, m in matrices(teacher).items()}
    model, found, seconds = teacher, [], 0.0
    for given in ({}, {"rounding": "gptq", "calibration": calibration}):
        model, start = copy.deepcopy(teacher), time.perf_counter()
        klfast.quantize_model(model, klfast.Plan(specs, "uniform"), **given)
        seconds = time.perf_counter() - start
        found.append(klfast.evaluate(model, text, teacher=teacher))
    nearest, gptq = found
    size = sum(one.nbytes for one in matrices(model).values()) / 1e6
    return name, spec, size, nearest.kl, gptq.kl, gptq.kl / nearest.kl, nearest.perplexity, gptq.perplexity, seconds


def main() -> None:
    """Measure the bundled models and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--specs", nargs="+", default=SPECS)
    parser.add_argument("--windows", type=int, default=128, help=f"calibration windows of {_LENGTH} tokens")
    parser.add_argument("--held-out", type=int, default=96, help="evaluation windows")
    asked = parser.parse_args()
    rows = []
    for name in asked.models:
        for spec in asked.specs:
            rows.append(measure(name, spec, asked.windows, asked.held_out))
            print(*rows[-1], flush=True)
    conditions = (
        "KL divergence in nats a token from the model in full precision, on "
        f"{asked.held_out * _LENGTH:,} tokens of the bundled evaluation text; GPTQ calibrated on "
        f"{asked.windows * _LENGTH:,} tokens of the bundled calibration text. `python -m klfast.bench.rounding` on "
        f"{cpu_name()}, {torch.get_num_threads()} threads, klfast {klfast.__version__}, torch {torch.__version__}."
    )
    table = Table("Whole models, tied head included", HEADINGS, tuple(rows))
    write_atomic(asked.out, f"# Rounding\n\n{conditions}\n\n{table.markdown()}")


if __name__ == "__main__":
    main()
