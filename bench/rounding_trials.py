"""What klfast does not do yet and would gain: rotated inputs, and rows of a fused in_proj in other precisions.

Two tables. In the first, models are rounded by GPTQ uniformly, as they are and with the inputs of some layers rotated:
W x = (W R) (R^T x) with R the product of random signs and a Hadamard matrix, so that outliers spread before W R is
rounded. In the second, one kind of row of in_proj after another is rounded to nearest, in all blocks at once.

    python -m klfast.bench.rounding_trials --out bench/results/rounding_trials.md
"""

from __future__ import annotations

import argparse
import copy
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch
from torch import nn

import klfast
from klfast.core.io import write_atomic
from klfast.core.machine import cpu_name
from klfast.models.linears import linears
from klfast.quant.rounding import fake_quantize
from klfast.quant.spec import QuantSpec
from klfast.quant.tensor import QuantizedTensor
from klfast.reporting.table import Cell, Table
from klfast.rounding import walk
from klfast.rounding.head_rows import Rows
from klfast.rounding.moments import Moments

from .bundled import LENGTH, Bundled

SPEC = QuantSpec.of("int4-g64-sym")
ROTATED = ("out_proj", "x_proj")  # layers whose input no norm or matrix can rotate for them
ROWS = {  # of in_proj in the bundled models
    "mamba": {"x": 512, "z": 512},
    "mamba2": {"z": 512, "x": 512, "B": 64, "C": 64, "dt": 8},
}


class Rotated(NamedTuple):
    """A quantized weight [N, K] of rotated inputs, which unpacks to that of plain ones."""

    qt: QuantizedTensor
    turn: torch.Tensor

    def dequantize(self, dtype: torch.dtype) -> torch.Tensor:
        """Return it for plain inputs."""
        return (self.qt.dequantize(torch.float32) @ self.turn.T).to(dtype)


def rotation(k: int) -> torch.Tensor:
    """Return random signs times Hadamard matrices of the largest power of two that divides k, orthogonal [k, k]."""
    hadamard = torch.ones(1, 1)
    while len(hadamard) < (k & -k):
        hadamard = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]]), hadamard)
    blocks = torch.block_diag(*[hadamard / math.sqrt(len(hadamard))] * (k // len(hadamard)))
    return torch.randint(2, (k, 1), generator=torch.Generator().manual_seed(0)) * 2 * blocks - blocks


def rotating(usual: Callable[..., QuantizedTensor]) -> Callable[..., object]:
    """Return ``usual``, the step that rounds a matrix by its moments, for rotated inputs of the layers of ROTATED."""

    def rounded(self: object, name: str, weight: torch.Tensor, moments: Moments, *rows: Rows) -> object:
        if not name.endswith(ROTATED):
            return usual(self, name, weight, moments, *rows)
        turn, turned = rotation(weight.shape[1]), copy.copy(moments)
        turned.hessian, turned.cross = (turn.T @ each @ turn for each in (moments.hessian, moments.cross))
        return Rotated(usual(self, name, (weight.float() @ turn).contiguous(), turned, *rows), turn)

    return rounded


class Trial(Bundled):
    """What is tried with a bundled model."""

    def rotations(self) -> tuple[Cell, ...]:
        """Return the KL without and with rotated inputs, and the ratio."""
        specs = dict.fromkeys(linears(self.teacher), SPEC)
        usual = walk._Walk._second_order
        found = []
        for step in (usual, rotating(usual)):
            with mock.patch.object(walk._Walk, "_second_order", step):
                rounded = walk.round_model(self.teacher, specs, self.calibration, progress=False).tensors
            found.append(self._kl({name: rounded[name].dequantize(torch.float32) for name in specs}))
        return self.name, *found, found[1] / found[0]

    def rows(self) -> Iterator[tuple[Cell, ...]]:
        """Yield the KL of rounding one kind of row of each in_proj."""
        first = 0
        for kind, count in ROWS.get(self.name, {}).items():
            weights = {}
            for name, layer in linears(self.teacher).items():
                if name.endswith("in_proj"):
                    weights[name] = layer.weight.detach().float().clone()
                    part = slice(first, first + count)
                    weights[name][part] = fake_quantize(weights[name], SPEC)[part]
            first += count
            kl = self._kl(weights)
            yield self.name, kind, count, kl, kl / count

    def _kl(self, weights: dict[str, torch.Tensor]) -> float:
        student: nn.Module = copy.deepcopy(self.teacher)
        layers = linears(student)
        for name, weight in weights.items():
            layers[name].weight.data.copy_(weight)
        return self.kl_of(student)


def main() -> None:
    """Measure the bundled models and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--models", nargs="+", default=("mamba", "mamba2", "hymba"))
    parser.add_argument("--windows", type=int, default=32, help=f"calibration windows of {LENGTH} tokens")
    parser.add_argument("--held-out", type=int, default=32, help="evaluation windows")
    asked = parser.parse_args()
    rotated: list[tuple[Cell, ...]] = []
    of_rows: list[tuple[Cell, ...]] = []
    for name in asked.models:
        trial = Trial(name, asked.windows, asked.held_out)
        of_rows += trial.rows()
        rotated.append(trial.rotations())
        print(*of_rows, *rotated, sep="\n", flush=True)
        tables = (
            Table("Rotated inputs of out_proj and x_proj, GPTQ", ("model", "KL", "rotated", "ratio"), tuple(rotated)),
            Table("Rows of in_proj, to nearest", ("model", "kind", "rows", "KL", "KL a row"), tuple(of_rows)),
        )
        write_atomic(asked.out, _page("\n\n".join(table.markdown() for table in tables), asked.windows, asked.held_out))


def _page(tables: str, windows: int, held_out: int) -> str:
    conditions = (
        f"KL divergence in nats a token from the model in full precision, of {SPEC}, on {held_out * LENGTH:,} tokens "
        f"of the bundled evaluation text; GPTQ is calibrated on {windows * LENGTH:,} tokens of the bundled "
        f"calibration text. `python -m klfast.bench.rounding_trials` on {cpu_name()}, klfast {klfast.__version__}, "
        f"torch {torch.__version__}."
    )
    return f"# Trials of rounding\n\n{conditions}\n\n{tables}"


if __name__ == "__main__":
    main()
