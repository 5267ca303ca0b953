"""What a further quantization format is worth: plans from INT4 and INT8 alone, and beside them INT6, NF4 or both.

For each bundled model: a sweep of its layers in every format, plans at equal bits per weight, and the KL divergence of
each plan on held-out text. NF4 is defined here: a format is one class, and needs no kernels to be swept and planned.

    python -m klfast.bench.formats --out bench/results/formats.json
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import time
from collections.abc import Sequence
from pathlib import Path

import torch

import klfast
from klfast.core.io import write_atomic
from klfast.models.linears import linears
from klfast.quant.formats import FORMATS, Grouping, PackedIntegers, Rounded
from klfast.quant.rounding import fake_quantize

# The codebook of QLoRA (arXiv 2305.14314, appendix E): quantiles of a normal distribution.
CODES = [
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334),
    *(-0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
]
MODELS = ("mamba2", "mamba", "hymba")
INT4, INT8 = ("int4-g32-sym", "int4-g64-sym", "int4-g128-sym"), ("int8-g64-sym",)
INT6, NF4 = ("int6-g32-sym", "int6-g64-sym", "int6-g128-sym"), ("nf4-g32-sym", "nf4-g64-sym")
SETS = {
    "int4, int8": INT4 + INT8,
    "and nf4": INT4 + INT8 + NF4,
    "and int6": INT4 + INT8 + INT6,
    "and both": INT4 + INT8 + INT6 + NF4,
}
BUDGETS = (4.5, 4.75, 5.0, 5.5, 6.0, 7.0, 8.0)


class NormalFloat(PackedIntegers):
    """Indices of a codebook, times a scale: stored as INT4 is, with 0..15 for -8..7."""

    kind, has_zero_points = "nf", False

    def __init__(self) -> None:
        self.bits, self.name = 4, "nf4"
        self.codes = torch.tensor(CODES)

    def round(self, groups: torch.Tensor, spec: Grouping, ratios: Sequence[float], scale_dtype: torch.dtype) -> Rounded:
        """Round each value to the nearest level of its group."""
        scale = groups.abs().amax(-1, keepdim=True).clamp_(min=6e-8).to(scale_dtype)  # float16's smallest
        index = torch.bucketize(groups / scale.float(), (self.codes[1:] + self.codes[:-1]) / 2)
        return Rounded(index.float() - 8, scale, None)

    def restore(self, rounded: Rounded) -> torch.Tensor:
        """Return the levels times their scales."""
        return self.codes[rounded.codes.long() + 8] * rounded.scale.float()


def register() -> None:
    """Make NF4 known to this process."""
    FORMATS["nf4"] = NormalFloat()


@torch.no_grad()
def with_plan(model: torch.nn.Module, plan: klfast.Plan) -> torch.nn.Module:
    """Return a copy of the model with rounded weights."""
    rounded = copy.deepcopy(model)
    layers = linears(rounded)
    for name, spec in plan.specs.items():
        layers[name].weight.data = fake_quantize(layers[name].weight, spec)
    return rounded


def study(name: str, windows: int, held_out: int) -> dict[str, object]:
    """Return the KL of every plan of a bundled model, predicted and measured."""
    start = time.time()
    model, tokenizer = klfast.load_model(name, dtype="float32"), klfast.load_tokenizer(name)
    options = {"vocab_size": model.config.vocab_size, "length": 256}
    every = klfast.sweep(
        model, klfast.token_batches("calibration", tokenizer, windows=windows, **options), SETS["and both"]
    )
    text = klfast.token_batches("evaluation", tokenizer, windows=held_out, **options)
    rows = []
    for budget in BUDGETS:
        for which, names in SETS.items():
            some = {key: m for key, m in every.measurements.items() if str(key[1]) in names}
            plan = klfast.plan(dataclasses.replace(every, measurements=some), mean_bits=budget)
            found = klfast.evaluate(with_plan(model, plan), text, teacher=model)
            row = {"bits": budget, "formats": which, "predicted": plan.predicted["kl"], "measured": found.kl}
            rows.append({**row, "stderr": found.kl_stderr, "mean_bits": plan.predicted["mean_bits"]})
            print(name, row, flush=True)
    return {"plans": rows, "seconds": round(time.time() - start)}


def main() -> None:
    """Study the bundled models and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--windows", type=int, default=8, help="calibration windows of 256 tokens")
    parser.add_argument("--held-out", type=int, default=24, help="evaluation windows")
    arguments = parser.parse_args()
    register()
    machine = {"torch": torch.__version__, "threads": torch.get_num_threads(), "klfast": klfast.__version__}
    found = {name: study(name, arguments.windows, arguments.held_out) for name in arguments.models}
    write_atomic(arguments.out, json.dumps({"machine": machine, **found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
