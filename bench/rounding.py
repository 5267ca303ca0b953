"""What second-order rounding gains: the KL divergence of small models, rounded to nearest and by GPTQ, and of plans.

Each model is quantized as a whole, the tied head included, and measured on the bundled evaluation text: uniformly, then
by plans of as many bytes and of 5 % more. Their costs are those of second-order rounding (``second_order_costs``).

    python -m klfast.bench.rounding --out bench/results/rounding.md
"""

from __future__ import annotations

import argparse
import copy
import time
from collections import Counter
from pathlib import Path

import torch
from torch import nn

import klfast
from klfast.core.io import write_atomic
from klfast.core.machine import cpu_name
from klfast.models.head import head_name
from klfast.models.matrices import matrices
from klfast.planning.plan_file import Plan
from klfast.quant.spec import storable_spec
from klfast.reporting.table import Cell, Table

MODELS = ("hymba", "mamba", "mamba2")
SPEC = "int4-g64-sym"
SIZES = (1.0, 1.05)  # of plans, in bytes of the uniform model
SWEPT = 8  # one of so many calibration windows is swept
_LENGTH = 256
HEADINGS = (
    *("model", "plan", "bytes", "KL predicted", "KL measured", "to nearest's", "perplexity", "head"),
    *("per channel", "g128", "g64", "g32", "seconds"),
)


class Bench:
    """A model with its texts."""

    def __init__(self, name: str, windows: int, held_out: int) -> None:
        self.name = name
        self.teacher, tokenizer = klfast.load_model(name, dtype="float32"), klfast.load_tokenizer(name)
        options = {"vocab_size": self.teacher.config.vocab_size, "length": _LENGTH}
        self.calibration = torch.cat(klfast.token_batches("calibration", tokenizer, windows=windows, **options))
        self.text = klfast.token_batches("evaluation", tokenizer, windows=held_out, **options)

    def rows(self) -> list[tuple[Cell, ...]]:
        """Return the rows of the table."""
        found = matrices(self.teacher)
        specs = {name: storable_spec(klfast.QuantSpec.parse(SPEC), one.shape[1]) for name, one in found.items()}
        start = time.perf_counter()
        swept = klfast.sweep(self.teacher, self.calibration[::SWEPT], SPEC, "kl_teacher_student", progress=False)
        costs = klfast.second_order_costs(self.teacher, swept, self.calibration, progress=False)
        print(f"{self.name}: costs took {time.perf_counter() - start:.0f} s", flush=True)
        uniform = klfast.plan(swept, method="uniform", spec=SPEC)
        size = uniform.predicted["bytes"]
        base = self._row(f"uniform {SPEC}, nearest", Plan(specs, "uniform"), uniform.predicted["kl"], size)
        gptq = {"rounding": "gptq", "calibration": self.calibration}
        rows = [base, self._row(f"uniform {SPEC}, GPTQ", Plan(specs, "uniform"), None, size, base[4], **gptq)]
        for times in SIZES:
            plan = klfast.plan(costs, times * size)
            title = f"plan, GPTQ, {times - 1:+.0%} bytes" if times != 1 else "plan, GPTQ"
            bytes_, kl = plan.predicted["bytes"], plan.predicted["kl"]
            rows.append(self._row(title, plan, kl, bytes_, base[4], **gptq))
        return rows

    def _row(
        self, title: str, plan: Plan, predicted: float | None, size: float, nearest: Cell = None, **rounding: object
    ) -> tuple[Cell, ...]:
        model: nn.Module = copy.deepcopy(self.teacher)
        start = time.perf_counter()
        klfast.quantize_model(model, plan, progress=False, **rounding)
        seconds = time.perf_counter() - start
        found = klfast.evaluate(model, self.text, teacher=self.teacher, progress=False)
        groups = Counter(spec.group_size for spec in plan.specs.values())
        head = str(plan.specs.get(head_name(self.teacher), "full"))
        ratio = None if nearest is None else found.kl / float(nearest)
        counts = [groups[size] for size in (-1, 128, 64, 32)]
        row = (self.name, title, size, predicted, found.kl, ratio, found.perplexity, head, *counts, seconds)
        print(*row, flush=True)
        return row


def main() -> None:
    """Measure the models and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--windows", type=int, default=128, help=f"calibration windows of {_LENGTH} tokens")
    parser.add_argument("--held-out", type=int, default=96, help="evaluation windows")
    asked = parser.parse_args()
    rows = [row for name in asked.models for row in Bench(name, asked.windows, asked.held_out).rows()]
    conditions = (
        "KL divergence in nats a token from the model in full precision, on "
        f"{asked.held_out * _LENGTH:,} tokens of the bundled evaluation text; GPTQ calibrated on "
        f"{asked.windows * _LENGTH:,} tokens of the bundled calibration text, of which one in {SWEPT} was swept. "
        f"`python -m klfast.bench.rounding` on {cpu_name()}, {torch.get_num_threads()} threads, klfast "
        f"{klfast.__version__}, torch {torch.__version__}. Seconds are those of rounding. The last columns count the "
        "matrices by group; a head with +R has R corrected rows."
    )
    table = Table("Whole models, tied head included", HEADINGS, tuple(rows))
    write_atomic(asked.out, f"# Rounding\n\n{conditions}\n\n{table.markdown()}")


if __name__ == "__main__":
    main()
