"""What 20,000 tokens do to the engine's time a token, its memory, and its state.

The bundled models in INT4 read a text token by token. Beside the times of its first and last thousand tokens stand the
growth of the process from the first thousand to the end, and how far the last state is from that of one prefill of the
same tokens.

    python -m klfast.bench.long_text --out bench/results/long_text.md
"""

from __future__ import annotations

import argparse
import resource
import statistics
import time
from pathlib import Path

import torch

import klfast
from klfast.benchkit.runner import distance
from klfast.core.io import write_atomic
from klfast.core.machine import cpu_name
from klfast.models.linears import linears
from klfast.planning.plan_file import Plan
from klfast.quant.spec import QuantSpec
from klfast.reporting.table import Cell, Table

MODELS = ("mamba", "mamba2", "hymba")
PART = 1000  # tokens
HEADINGS = (
    "model",
    "us a token, first 1,000",
    "last 1,000",
    "ratio",
    "growth, MB",
    "of it caches, MB",
    "error of the state",
)


def study(name: str, tokens: int) -> tuple[Cell, ...]:
    """Return a model's row."""
    model, tokenizer = klfast.load_model(name, dtype="float32"), klfast.load_tokenizer(name)
    klfast.quantize_model(model, Plan(dict.fromkeys(linears(model), QuantSpec(4, 64)), "uniform"))
    engine = klfast.lower(model)
    text = klfast.token_batches(
        "evaluation", tokenizer, vocab_size=model.config.vocab_size, length=PART, windows=tokens // PART
    )
    ids = torch.cat([batch.flatten() for batch in text])[:tokens].unsqueeze(0)
    state, seconds, grown, cached = engine.state(), [], 0, 0
    for place in range(ids.shape[1]):
        begin = time.perf_counter()
        engine(ids[:, place : place + 1], state)
        seconds.append(time.perf_counter() - begin)
        if place == PART:
            grown, cached = _peak(), state.nbytes
    grown, cached = _peak() - grown, state.nbytes - cached
    whole = engine.state()
    engine(ids, whole)
    error = max(
        distance(found, expected)
        for found, expected, spec in zip(state.tensors, whole.tensors, state.specs, strict=True)
        if spec.growing is None
    )
    first, last = (statistics.median(part) * 1e6 for part in (seconds[:PART], seconds[-PART:]))
    return name, first, last, last / first, grown / 1e6, cached / 1e6, error


def _peak() -> int:
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def main() -> None:
    """Study the bundled models and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=20000)
    arguments = parser.parse_args()
    rows = tuple(study(name, arguments.tokens) for name in MODELS)
    conditions = (
        f"{arguments.tokens:,} tokens, float32, INT4 in groups of 64. `python -m klfast.bench.long_text` on "
        f"{cpu_name()}, {torch.get_num_threads()} threads, klfast {klfast.__version__}, torch {torch.__version__}."
    )
    write_atomic(
        arguments.out,
        "\n".join(["# A long text\n", f"{conditions}\n", Table("Token by token", HEADINGS, rows).markdown()]),
    )


if __name__ == "__main__":
    main()
