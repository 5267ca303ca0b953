"""docs/PERFORMANCE.md, written from the results of ``make bench``: ``python -m bench.document``."""

from __future__ import annotations

from pathlib import Path

from klfast.benchkit.suites import SUITES
from klfast.core.io import write_atomic

from . import results

_ROOT = Path(__file__).parent.parent
RESULTS, DOCUMENT = _ROOT / "bench" / "results", _ROOT / "docs" / "PERFORMANCE.md"

_HEAD = """\
# Performance

`make bench` times klfast against other ways to compute the same, writes its tables into `bench/results/` and this page
from them. `klfast bench --quick` goes through all of it at small sizes in about a minute; `klfast bench --help` lists the
options: suites, shapes, threads, a pinned tier, an earlier run to compare with.

How it is timed:

- Each result is first checked against the plain PyTorch reference. A wrong one gets no figure.
- Weights rotate through more memory than the caches hold, each contender's own.
- Before each call of a peer, klfast's contenders are called and timed, so that every ratio ("vs", how many times as fast
  klfast is) is one of medians of calls that alternated. Each timed call follows an untimed one of the same contender.
- The floor is the time in which all threads together can read the weights (or logits), at a bandwidth measured beside
  each group: sums over the whole working set. TFLOP/s count two operations a weight and row.
- torch's int4pack and int8pack take bfloat16 activations, as klfast's contenders do. OpenVINO runs the graph that NNCF's
  INT4_SYM compression writes, with the same rounded weights; by default it rounds activations to 8 bits.
- "int8" behind klfast's weights: activations rounded to 8 bits; "exact": not rounded.
- Decode is 32 tokens after a prompt of 8, the prompt's time included.
- Hymba has the released size and random weights. Each mixer and feed-forward part is checked by itself, in a prefill, in
  a chunk that goes on from a cache and in a step. "mixed": x_proj, dt_proj, the head and the last block in 8 bits, the rest in 4, groups of 64.
  "reference": the same model on PyTorch's operations alone. memory_gb is the most memory that the run has held so far.
- llama.cpp is timed by its own llama-bench, run in turns with klfast on GGUF files that are given; loading is not counted.
  Its decode has a prompt of 8 tokens, too (-pg 8,32).
"""


def render(folder: Path) -> str:
    """The page, from the CSV files in a folder of results."""
    rows = results.read(folder)
    parts = [_HEAD]
    for suite in SUITES:
        chosen = [row for row in rows if row["suite"] == suite]
        parts.append(
            results.markdown(suite, chosen, level=2)
            if chosen
            else f"## {suite}\n\nNo results of a whole run are here yet.\n"
        )
        if suite == "linear" and chosen:
            parts.append("![Roofline of the linear layers](../bench/results/roofline.png)\n")
    return "\n".join(parts)


if __name__ == "__main__":
    DOCUMENT.parent.mkdir(exist_ok=True)
    write_atomic(DOCUMENT, render(RESULTS))
