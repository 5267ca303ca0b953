"""What second-order rounding gains: the KL divergence of the bundled models, rounded to nearest and by GPTQ.

Each model is quantized as a whole, uniformly and the tied head included, and measured on the bundled evaluation text.

    python -m klfast.bench.rounding --out bench/results/rounding.md
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
from klfast.quant.spec import storable_spec

MODELS = ("hymba", "mamba", "mamba2")
SPECS = ("int4-g64-sym",)
_LENGTH = 256


def measure(name: str, spec: str, windows: int, held_out: int) -> list[dict[str, object]]:
    """Return a row for each rounding of a bundled model."""
    teacher, tokenizer = klfast.load_model(name, dtype="float32"), klfast.load_tokenizer(name)
    options = {"vocab_size": teacher.config.vocab_size, "length": _LENGTH}
    calibration = klfast.token_batches("calibration", tokenizer, windows=windows, **options)
    text = klfast.token_batches("evaluation", tokenizer, windows=held_out, **options)
    rows = []
    for rounding in ("nearest", "gptq"):
        model, start = klfast.load_model(name, dtype="float32"), time.time()
        wanted = klfast.QuantSpec.parse(spec)
        plan = klfast.Plan({n: storable_spec(wanted, m.shape[1]) for n, m in matrices(model).items()}, "uniform")
        given = {"calibration": calibration} if rounding == "gptq" else {}
        klfast.quantize_model(model, plan, rounding=rounding, **given)
        seconds = time.time() - start
        found = klfast.evaluate(model, text, teacher=teacher)
        size = sum(one.nbytes for one in matrices(model).values())
        rows.append({"rounding": rounding, "bytes": size, "kl": found.kl, "ppl": found.perplexity, "seconds": seconds})
    return rows


def table(rows: list[tuple[str, str, list[dict[str, object]]]]) -> str:
    """Return a Markdown table."""
    lines = [
        "| model | spec | MB of matrices | KL to nearest | KL by GPTQ | ratio | perplexity, nearest | GPTQ | seconds |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for name, spec, (nearest, gptq) in rows:
        lines.append(
            f"| {name} | {spec} | {nearest['bytes'] / 1e6:.3f} | {nearest['kl']:.4f} | {gptq['kl']:.4f} "
            f"| {gptq['kl'] / nearest['kl']:.2f} | {nearest['ppl']:.3f} | {gptq['ppl']:.3f} | {gptq['seconds']:.0f} |"
        )
    return "\n".join(lines)


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
            rows.append((name, spec, measure(name, spec, asked.windows, asked.held_out)))
            print(table(rows[-1:]).splitlines()[-1], flush=True)
    head = (
        "# Rounding\n\nKL divergence in nats a token from the model in full precision, on the bundled evaluation text "
        f"({asked.held_out} windows of {_LENGTH} tokens); GPTQ calibrated on the bundled calibration text "
        f"({asked.windows} windows). {cpu_name()}, {torch.get_num_threads()} threads, torch {torch.__version__}.\n\n"
        "Made by `python -m klfast.bench.rounding`.\n\n"
    )
    write_atomic(asked.out, head + table(rows) + "\n")


if __name__ == "__main__":
    main()
