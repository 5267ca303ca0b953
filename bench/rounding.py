"""What second-order rounding gains: the KL divergence of small models, rounded to nearest and by GPTQ, and of plans.

Each model is quantized as a whole, the tied head included, and measured on the bundled evaluation text: uniformly, then
by plans of as many bytes and of 5 % more. Their costs are those of second-order rounding (``second_order_costs``).

    python -m klfast.bench.rounding --out bench/results/rounding.md
    python -m klfast.bench.smollm2 SMOLLM2
    python -m klfast.bench.rounding --models SMOLLM2 --windows 32 --swept 2 --held-out 16 --out FILE.md
"""

from __future__ import annotations

import argparse
import copy
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from math import nan
from pathlib import Path
from statistics import mean

import torch
from torch import nn

import klfast
from klfast.core.io import write_atomic
from klfast.core.machine import cpu_name
from klfast.models.head import head_name
from klfast.planning.plan_file import Plan
from klfast.reporting.table import Cell, Table

MODELS = ("hymba", "mamba", "mamba2")
SPEC, FINER = "int4-g64-sym", "int4-g32-sym"
_LENGTH = 256
HEADINGS = (
    *("model", "plan", "bytes", "KL predicted", "of the head", "KL measured", "to nearest's", "perplexity", "head"),
    *("per channel", "g128", "g64", "g32"),
)
STAGES = ("sweep", "costs", "rounding")


class Bench:
    """A model with its texts.

    Attributes:
        name: a bundled model's, or the last part of its folder's path.
        minutes: of CPU time that each stage took, rounding that of each model that was rounded by GPTQ.
    """

    def __init__(self, source: str, windows: int, held_out: int) -> None:
        self.source, self.name = source, Path(source).name
        self.teacher, tokenizer = klfast.load_model(source, dtype="float32"), klfast.load_tokenizer(source)
        options = {"vocab_size": self.teacher.config.vocab_size, "length": _LENGTH}
        self.calibration = torch.cat(klfast.token_batches("calibration", tokenizer, windows=windows, **options))
        self.text = klfast.token_batches("evaluation", tokenizer, windows=held_out, **options)
        self.minutes: dict[str, list[float]] = {stage: [] for stage in STAGES}

    def rows(self, swept: int, kept: Path | None) -> Iterator[tuple[Cell, ...]]:
        """Yield the rows of the table of models.

        Args:
            swept: calibration windows.
            kept: folder for the sweep's state.
        """
        stored = klfast.load_model(self.source, dtype="auto")  # plans count its bytes
        text = self.calibration[:: len(self.calibration) // swept]
        with self._timed("sweep"):
            found = klfast.sweep(
                stored, text, SPEC, "kl_teacher_student", kept and kept / f"{self.name}.sweep", vocabulary="sampled"
            )
        with self._timed("costs"):
            costs = klfast.second_order_costs(self.teacher, found, self.calibration, progress=False)
        coarse, fine = (klfast.plan(found, method="uniform", spec=spec) for spec in (SPEC, FINER))
        size = coarse.predicted["bytes"]
        base = self._measured(self._quantized(coarse))
        plans = {
            f"uniform {SPEC}": klfast.plan(costs, method="uniform", spec=SPEC),
            "plan, +5 % bytes": klfast.plan(costs, 1.05 * size),
            "plan": klfast.plan(costs, size),
        }
        yield self._row(f"uniform {SPEC}, nearest", coarse, found, base, base)
        yield self._row(f"uniform {FINER}, nearest", fine, found, self._measured(self._quantized(fine)), base)
        for title, plan in plans.items():
            with self._timed("rounding"):
                model = self._quantized(plan, rounding="gptq", calibration=self.calibration)
            yield self._row(f"{title}, GPTQ", plan, costs, self._measured(model), base)

    @contextmanager
    def _timed(self, stage: str) -> Iterator[None]:
        start = time.process_time()
        yield
        self.minutes[stage].append((time.process_time() - start) / 60)

    def _quantized(self, plan: Plan, **rounding: object) -> nn.Module:
        return klfast.quantize_model(copy.deepcopy(self.teacher), plan, progress=False, **rounding)

    def _measured(self, model: nn.Module) -> klfast.Evaluation:
        return klfast.evaluate(model, self.text, teacher=self.teacher, progress=False)

    def _row(
        self, title: str, plan: Plan, costs: klfast.Sensitivities, found: klfast.Evaluation, base: klfast.Evaluation
    ) -> tuple[Cell, ...]:
        head = head_name(self.teacher)
        spec = plan.specs.get(head)
        of_head = costs.measurements.get((head, spec))
        groups = Counter(each.group_size for each in plan.specs.values())
        row = (
            *(self.name, title, plan.predicted["bytes"], plan.predicted.get("kl")),
            None if of_head is None else of_head.mean["kl_teacher_student"],
            *(found.kl, found.kl / base.kl, found.perplexity, str(spec or "full")),
            *(groups[size] for size in (-1, 128, 64, 32)),
        )
        print(*row, flush=True)
        return row


def main() -> None:
    """Measure the models, and write the tables after each row."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--windows", type=int, default=192, help=f"calibration windows of {_LENGTH} tokens")
    parser.add_argument("--swept", type=int, default=16, help="calibration windows that are swept")
    parser.add_argument("--held-out", type=int, default=96, help="evaluation windows")
    parser.add_argument("--kept", type=Path, help="folder that keeps sweeps, which go on from there")
    asked = parser.parse_args()
    conditions = (
        "KL divergence in nats a token from the model in full precision, on "
        f"{asked.held_out * _LENGTH:,} tokens of the bundled evaluation text. GPTQ is calibrated on "
        f"{asked.windows * _LENGTH:,} tokens of the bundled calibration text; the sweep ran on "
        f"{asked.swept * _LENGTH:,} of them. `python -m klfast.bench.rounding`, klfast {klfast.__version__}, torch "
        f"{torch.__version__}. The last columns count the matrices by group; a head with +R has R corrected rows."
    )
    took = f"Minutes of CPU time on {cpu_name()}, {torch.get_num_threads()} threads; rounding is that of one model."
    rows: list[tuple[Cell, ...]] = []
    benches: list[Bench] = []
    for source in asked.models:
        benches.append(Bench(source, asked.windows, asked.held_out))
        for row in benches[-1].rows(asked.swept, asked.kept):
            rows.append(row)
            minutes = [(bench.name, *(mean(bench.minutes[stage] or [nan]) for stage in STAGES)) for bench in benches]
            models = Table("Whole models, tied head included", HEADINGS, tuple(rows)).markdown()
            times = Table("What it took", ("model", *STAGES), tuple(minutes)).markdown()
            write_atomic(asked.out, f"# Rounding\n\n{conditions}\n\n{models}\n{took}\n\n{times}")


if __name__ == "__main__":
    main()
