"""What an adaptive sweep loses: plans of small models after it and after an exhaustive one, at equal bytes.

Each plan is applied as a whole and measured on the bundled evaluation text. Sweeps are kept in files: a run that was
stopped goes on where it was. The table is written after each model.

    python -m klfast.bench.adaptive --out bench/results/adaptive.md
    python -m klfast.bench.smollm2 SMOLLM2
    python -m klfast.bench.adaptive --models SMOLLM2 --length 64 --held-out 128 --out FILE.md
"""

from __future__ import annotations

import argparse
import copy
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

import klfast
from klfast.core.io import write_atomic
from klfast.core.machine import cpu_name
from klfast.reporting.table import Cell, Table
from klfast.sensitivity.results import Sensitivities

MODELS = ("hymba", "mamba", "mamba2")
SPECS = ("int4-g64-sym", "int8-g64-sym")
SIZES = (1.05, 1.2, 1.5)  # of all layers in the first spec
HEADINGS = (
    *("model", "size / INT4", "KL, adaptive", "KL, exhaustive", "ratio"),
    *("token-forwards, adaptive", "exhaustive", "share", "seconds, adaptive", "exhaustive"),
)


def measure(source: str, length: int, windows: int, held_out: int, sweeps: Path) -> Iterator[tuple[Cell, ...]]:
    """Yield rows of the table: a model's plans of each size. The folder ``sweeps`` keeps its sweeps."""
    teacher, tokenizer = klfast.load_model(source, dtype="float32"), klfast.load_tokenizer(source)
    name, options = Path(source).name, {"vocab_size": teacher.config.vocab_size, "length": length}
    calibration = klfast.token_batches("calibration", tokenizer, windows=windows, **options)
    text = klfast.token_batches("evaluation", tokenizer, windows=held_out, **options)
    both = [
        klfast.sweep(
            teacher, calibration, SPECS, budget=budget, vocabulary="sampled", resume=sweeps / f"{name}-{budget}.json"
        )
        for budget in ("adaptive", "exhaustive")
    ]
    work = [found.provenance["token_forwards"] for found in both]
    seconds = [sum(found.provenance["seconds"].values()) for found in both]
    smallest = klfast.plan(both[1], method="uniform", spec=SPECS[0]).predicted["bytes"]
    for size in SIZES:
        kl = [_kl(teacher, text, found, int(size * smallest)) for found in both]
        yield name, size, *kl, kl[0] / kl[1], *work, work[0] / work[1], *seconds


def _kl(teacher: torch.nn.Module, text: list[torch.Tensor], found: Sensitivities, size: int) -> float:
    """Return the KL of the plan within ``size`` bytes, measured."""
    model = copy.deepcopy(teacher)
    klfast.quantize_model(model, klfast.plan(found, max_bytes=size))
    return klfast.evaluate(model, text, teacher=teacher).kl


def main() -> None:
    """Measure the models and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--length", type=int, default=256, help="tokens of a window")
    parser.add_argument("--windows", type=int, default=32, help="calibration windows")
    parser.add_argument("--held-out", type=int, default=96, help="evaluation windows")
    parser.add_argument("--sweeps", type=Path, help="folder that keeps the sweeps (default: in the temporary folder)")
    asked = parser.parse_args()
    sweeps = asked.sweeps or Path(tempfile.gettempdir(), f"klfast-adaptive-{asked.windows}x{asked.length}")
    sweeps.mkdir(parents=True, exist_ok=True)
    rows = []
    for source in asked.models:
        for row in measure(source, asked.length, asked.windows, asked.held_out, sweeps):
            rows.append(row)
            print(*row, flush=True)
        write_atomic(asked.out, _page(rows, asked.length, asked.windows, asked.held_out))


def _page(rows: list[tuple[Cell, ...]], length: int, windows: int, held_out: int) -> str:
    conditions = (
        "KL divergence in nats a token of whole plans from the model in full precision, on "
        f"{held_out * length:,} tokens of the bundled evaluation text; sweeps of {' and '.join(SPECS)} with a "
        f"sampled vocabulary on {windows * length:,} tokens of the bundled calibration text, windows of {length}. "
        f"`python -m klfast.bench.adaptive` on {cpu_name()}, {torch.get_num_threads()} threads, "
        f"klfast {klfast.__version__}, torch {torch.__version__}."
    )
    table = Table("Plans after adaptive and exhaustive sweeps", HEADINGS, tuple(rows))
    return f"# Adaptive sweeps\n\n{conditions}\n\n{table.markdown()}"


if __name__ == "__main__":
    main()
