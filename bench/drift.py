"""Whether a quantized model's errors grow along a text: KL by position, to 16,384 tokens.

A recurrent state that drifts shows as a KL that grows. The bundled models, all matrices to nearest in one spec, are
compared with those in full precision on long windows of the bundled evaluation text.

    python -m klfast.bench.drift --out bench/results/drift.md
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path

import torch

import klfast
from klfast.core.io import write_atomic
from klfast.core.machine import cpu_name
from klfast.models.matrices import matrices
from klfast.planning.plan_file import Plan
from klfast.reporting.table import Cell, Table

MODELS, SPEC, KL = ("mamba", "mamba2", "hymba"), "int4-g64-sym", "Mean KLD"
HEADINGS = ("tokens before", "KL", "95 % from", "to", "same top token")


def drift(name: str, length: int) -> Table:
    """Return a bundled model's KL by position in windows of ``length`` tokens."""
    teacher, tokenizer = klfast.load_model(name, dtype="float32"), klfast.load_tokenizer(name)
    text = klfast.token_batches("evaluation", tokenizer, vocab_size=teacher.config.vocab_size, length=length)
    model = klfast.quantize_model(copy.deepcopy(teacher), Plan(dict.fromkeys(matrices(teacher), SPEC), "uniform"))
    found = klfast.compare(teacher, model, text)
    rows: list[tuple[Cell, ...]] = []
    for part in found.by_position:
        kl = part.figures[KL]
        rows.append((str(part), kl.value, kl.low, kl.high, part.figures["Same top p"].value))
    return Table(f"{name}, {found.windows} windows", HEADINGS, tuple(rows))


def main() -> None:
    """Measure the models and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--length", type=int, default=16384, help="tokens of a window")
    asked = parser.parse_args()
    conditions = (
        f"KL divergence in nats a token of bundled models in {SPEC}, rounded to nearest, from full precision, by the "
        f"number of tokens before the predicted one, on windows of {asked.length:,} tokens of the bundled evaluation "
        f"text. `python -m klfast.bench.drift` on {cpu_name()}, klfast {klfast.__version__}, torch {torch.__version__}."
    )
    page = f"# Drift\n\n{conditions}\n"
    for name in asked.models:
        page += f"\n{drift(name, asked.length).markdown()}"
        write_atomic(asked.out, page)


if __name__ == "__main__":
    main()
