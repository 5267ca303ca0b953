"""What int8 activations cost in KL, by model and kind of layer, and what ``activation="auto"`` makes of it.

For each bundled model: a sweep of its weights and of their inputs, then models with one spec for all weights, on other
text, with exact inputs, with int8 where the rule allows it, and with int8 everywhere.

    python -m klfast.bench.activations --out bench/results/activations.md
"""

from __future__ import annotations

import argparse
import copy
import math
from pathlib import Path

import torch

import klfast
from klfast.core.io import write_atomic
from klfast.core.machine import cpu_name
from klfast.reporting.activation_table import activation_costs
from klfast.reporting.table import Cell, Table

MODELS = ("hymba", "mamba", "mamba2")
SPECS = ("int4-g64-sym", "int6-g64-sym", "int8-g64-sym")
LENGTH = 256
KL = "kl_teacher_student"
HEADINGS = ("weights", "exact", "auto", "int8", "exact + sum over layers", "layers with int8 under auto", "of")


def study(name: str, windows: int, held_out: int) -> list[Table]:
    """Return the tables of a bundled model: costs by kind of layer, and KL of whole models."""
    model, tokenizer = klfast.load_model(name, dtype="float32"), klfast.load_tokenizer(name)
    options = {"vocab_size": model.config.vocab_size, "length": LENGTH}
    calibration = klfast.token_batches("calibration", tokenizer, windows=windows, **options)
    found = klfast.sweep(model, calibration, SPECS, KL, activations=True)
    text = klfast.token_batches("evaluation", tokenizer, windows=held_out, **options)
    rows: list[tuple[Cell, ...]] = []
    for spec in SPECS:
        plan = klfast.plan(found, method="uniform", spec=spec, activation="auto")
        kl = [
            klfast.evaluate(klfast.quantize_model(copy.deepcopy(model), plan, activation=activation), text, model).kl
            for activation in ("exact", "auto", "int8")
        ]
        added = math.fsum(found.int8_activations(layer, made).mean[KL] for layer, made in plan.specs.items())
        rows.append((spec, *kl, kl[0] + added, list(plan.activations.values()).count("int8"), len(plan.specs)))
        print(name, *rows[-1], flush=True)
    costs = activation_costs(found)
    return [
        Table(f"{name}: mean KL of one layer, nats per token", costs.headings, costs.rows),
        Table(f"{name}: KL of the whole model, nats per token", HEADINGS, tuple(rows)),
    ]


def main() -> None:
    """Study the bundled models and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--windows", type=int, default=16, help=f"calibration windows of {LENGTH} tokens")
    parser.add_argument("--held-out", type=int, default=48, help="evaluation windows")
    arguments = parser.parse_args()
    tables = [table for name in arguments.models for table in study(name, arguments.windows, arguments.held_out)]
    conditions = (
        f"One layer on {arguments.windows * LENGTH:,} tokens of calibration text, its weight or input rounded; whole "
        f"models on {arguments.held_out * LENGTH:,} tokens of evaluation text. `python -m klfast.bench.activations` on "
        f"{cpu_name()}, {torch.get_num_threads()} threads, klfast {klfast.__version__}, torch {torch.__version__}."
    )
    write_atomic(arguments.out, "\n".join(["# Int8 activations\n", f"{conditions}\n", *(t.markdown() for t in tables)]))


if __name__ == "__main__":
    main()
