"""How the cost of a sweep grows with layers, tokens, vocabulary and width: measured, and by a count of operations.

The count is that of products with the blocks' weights and the head. Of the measured sweeps, one gives the rate; the
others show how far the count holds. Larger models are counted alone.

    python -m klfast.bench.sweep_scaling --out bench/results/sweep_scaling.md
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import MambaConfig, MambaForCausalLM

import klfast
from klfast.core.io import write_atomic
from klfast.core.machine import cpu_name
from klfast.models.head import is_head_tied
from klfast.models.matrices import matrices
from klfast.reporting.table import Cell, Table

from . import models

SPECS = ("int4-g64-sym", "int8-g64-sym")
_SAMPLED = 129  # rows of the head a token, the target's among them
_TOGETHER = 16  # candidates that share the teacher's logits
_SHARE = 0.1  # of an exhaustive sweep's passes, an adaptive one's
_LENGTH = 256

# Of the counted table; the operations a second are assumptions.
RATE, NODES, NODE_RATE = 10**12, 64, 10**13
TOKENS = 64 * 512


@dataclass(frozen=True)
class Shape:
    """What a sweep's cost depends on.

    Attributes:
        blocks: weights of the blocks that a token meets.
        candidates: in the blocks.
        head: weights of the head; ``in_head`` candidates in it, through the whole network if it ``is_tied``.
    """

    name: str
    blocks: float
    candidates: int
    hidden: int
    head: float
    is_tied: bool = True
    in_head: int = len(SPECS)

    @classmethod
    def of(cls, name: str, model: nn.Module) -> Shape:
        """Return the shape of a model without experts."""
        head = model.get_output_embeddings().weight
        found = [one for one in matrices(model).values() if one.tensor is not head]
        weights = sum(one.tensor.numel() for one in found)
        return cls(name, weights, len(found) * len(SPECS), head.shape[1], head.numel(), is_head_tied(model))

    def passes(self) -> float:
        """Return passes of the text through the whole network: of the teacher, the noise floor and the candidates."""
        return 2 + self.candidates / 2 + self.in_head * self.is_tied

    def operations(self, tokens: float, vocabulary: str) -> float:
        """Return multiplications and additions of an exhaustive sweep."""
        if vocabulary == "full":
            compared = self.head * (1 + 1 / _TOGETHER) * (1 + self.candidates)
        else:
            compared = self.head + self.hidden * _SAMPLED * (1 + self.candidates)
        return 2 * tokens * (self.blocks * self.passes() + compared + 2 * self.head * self.in_head)


LARGE = (  # counted by hand: weights that a token meets, and layers of all kinds
    # 54 Mamba-2 and 54 MLP blocks with two matrices, 10 of attention with four (arXiv:2504.03624).
    Shape("Nemotron-H-56B", 54e9, (108 * 2 + 10 * 4) * len(SPECS), 8192, 131072 * 8192, False),
    # 30 blocks of delta nets with five matrices, 10 of attention with four, each with two stacks of experts and three
    # matrices of the shared one.
    Shape("Qwen3.6-35B-A3B", 2.5e9, (30 * 5 + 10 * 4 + 40 * 5) * len(SPECS), 2048, 248320 * 2048, False),
)


def build(layers: int = 8, vocab: int = 8192, hidden: int = 256) -> MambaForCausalLM:
    """Return a Mamba with random weights."""
    config = MambaConfig(vocab_size=vocab, hidden_size=hidden, num_hidden_layers=layers, initializer_range=0.02)
    return MambaForCausalLM(config).eval()


CASES = (
    *(("base", {}, 8), ("4 layers", {"layers": 4}, 8), ("16 layers", {"layers": 16}, 8)),
    *(("1,024 tokens", {}, 4), ("4,096 tokens", {}, 16)),
    *(("vocabulary of 32,768", {"vocab": 32768}, 8), ("vocabulary of 131,072", {"vocab": 131072}, 8)),
    *(("width 128", {"hidden": 128}, 8), ("width 512", {"hidden": 512}, 8)),
)
MEASURED = (
    *("model", "token-forwards", "seconds, full vocabulary", "counted", "sampled vocabulary", "counted"),
    "10^9 operations/s, sampled",
)
COUNTED = (
    *("model", "candidates", "10^6 token-forwards", "10^15 operations"),
    *("hours", "adaptive, hours", f"minutes on {NODES} nodes"),
)


def measured() -> Iterator[tuple[Cell, ...]]:
    """Yield rows of the first table."""
    rates: dict[str, float] = {}  # the base's
    for name, changes, windows in CASES:
        torch.manual_seed(0)
        model = build(**changes)
        text = torch.randint(model.config.vocab_size, (windows, _LENGTH))
        shape, row, rate = Shape.of(name, model), list[Cell](), 0.0
        for vocabulary in ("full", "sampled"):
            found = klfast.sweep(model, text, SPECS, "kl_teacher_student", vocabulary=vocabulary, progress=False)
            seconds, operations = sum(found.provenance["seconds"].values()), shape.operations(text.numel(), vocabulary)
            rate = operations / seconds
            row += [seconds, operations / rates.setdefault(vocabulary, rate)]
        row = [name, found.provenance["token_forwards"], *row, rate / 1e9]
        print(*row, flush=True)
        yield tuple(row)


def counted() -> Iterator[tuple[Cell, ...]]:
    """Yield rows of the second table."""
    with torch.device("meta"):
        small = [Shape.of(name, models.plain(name)) for name in ("mamba-130m", "qwen3.5-0.8b", "granite-4.0-h-1b")]
    for shape in (*small, *LARGE):
        operations = shape.operations(TOKENS, "sampled")
        hours, minutes = operations / RATE / 3600, operations / (NODES * NODE_RATE) / 60
        facts = shape.name, shape.candidates + shape.in_head, TOKENS * shape.passes() / 1e6, operations / 1e15
        yield (*facts, hours, hours * _SHARE, minutes)


def main() -> None:
    """Measure, count, and write both tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--counted", action="store_true", help="write only what needs no measurement")
    asked = parser.parse_args()
    page = (
        f"Counted: exhaustive sweeps with a sampled vocabulary of {TOKENS:,} tokens, {' and '.join(SPECS)}. Hours at "
        f"{RATE:,} operations a second, minutes on {NODES} nodes of {NODE_RATE:,} each: assumptions, not "
        "measurements. An adaptive sweep is taken for a tenth.\n\n"
        f"{Table('Counted', COUNTED, tuple(counted())).markdown()}"
    )
    if not asked.counted:
        klfast.sweep(build(layers=2), torch.zeros(1, 8, dtype=torch.int64), SPECS[0], progress=False)  # a slow first
        page += (
            f"\nMeasured: a Mamba of 8 layers, width 256 and 8,192 entries, random weights, {8 * _LENGTH:,} tokens; "
            "the other rows change one of these. Counted seconds: operations at the first row's rate. "
            f"`python -m klfast.bench.sweep_scaling` on {cpu_name()}, {torch.get_num_threads()} threads, "
            f"klfast {klfast.__version__}, torch {torch.__version__}.\n\n"
            f"{Table('Measured', MEASURED, tuple(measured())).markdown()}"
        )
    write_atomic(asked.out, f"# Growth of a sweep's cost\n\n{page}")


if __name__ == "__main__":
    main()
