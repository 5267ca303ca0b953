"""Writes docs/PERFORMANCE.md from the results of ``make bench``: ``python -m bench.document``."""

from __future__ import annotations

from pathlib import Path

from klfast.benchkit.suites import SUITES
from klfast.core.io import write_atomic

from . import results

_ROOT = Path(__file__).parent.parent
RESULTS, DOCUMENT = _ROOT / "bench" / "results", _ROOT / "docs" / "PERFORMANCE.md"

_HEAD = """\
# Performance

`make bench` times klfast against other implementations, writes its tables to `bench/results/` and renders this page
from them. `klfast bench --quick` runs everything at small sizes in about a minute; `klfast bench --help` lists the
options: suites, shapes, threads, a pinned tier, an earlier run to compare with.

How it is timed:

- Each result is first checked against the plain PyTorch reference. Wrong results are not timed.
- The weights of linear rotate through more memory than the caches hold (OpenVINO's small ones through less: it gets 128
  copies at most). The other suites have one copy of what they read. Whole models, logits and heads are larger than most
  caches; scan's inputs and states are not.
- Before each call of a peer, klfast's contenders are called and timed, so that every ratio ("vs", how many times as
  fast klfast is) is one of medians of alternating calls. Each timed call follows an untimed one of the same contender.
- The floor is the time in which all threads together can read the weights (or logits), at a bandwidth measured beside
  each group: sums over the whole working set. TFLOP/s count two operations per weight and row. A share of the floor
  above 1 says that caches held a part, or that the memory was faster than when its bandwidth was measured, once, as the
  group began. Decode's floor is that of the weights alone. States come on top: for each token 2.4 MB of Mamba-130M's
  and 18.9 MB of Mamba2-130M's, read and written in float32, beside 68 MB of weights in INT4.
- torch's int4pack and int8pack take bfloat16 activations, as klfast's contenders do. OpenVINO runs the graph that
  NNCF's INT4_SYM compression writes, with the same rounded weights; by default it rounds activations to 8 bits.
- "int8" after klfast's weights: activations rounded to 8 bits; "exact": not rounded. What that costs in KL is in
  [FORMATS.md](FORMATS.md#int8-activations).
- Decode is 32 tokens after a prompt of 8, including the prompt's time.
- gemm_s and scan_s are the seconds in linear layers and SSM ops in one profiled run, rest_s is what the median has
  beyond them. It is empty where the profiled run was slower than that.
- serve: a server in a process of its own, with random weights in INT4 and 16 bits, and clients that stream, on the same
  cores. Each asks once for 32 tokens after a prompt of 32 to 128; the median is the time of all of them together.
  first, between: milliseconds to the first token and from token to token as clients see them, 50th and 99th percentile
  of all. A turn has 16 new tokens after 1,024 that the prefix cache has, or would have.
- Hymba has the released size and random weights. Each mixer and feed-forward part is checked separately, in a prefill,
  in a chunk that continues a cache and in a step. "mixed": x_proj, dt_proj, the head and the last block in 8 bits, the
  rest in 4, groups of 64. "reference": the same model on PyTorch's operations. memory_gb is the peak memory of the run
  so far. The table joins two runs of one hour, prefill and decode; memory read 16 to 31 GB/s meanwhile, so parts of the
  floor are rough.
- llama.cpp is timed by its own llama-bench, in turns with klfast, on given GGUF files (`--gguf`) or on random weights
  of the same sizes in Q4_0 (the head in Q6_K, as llama-quantize has it); loading is not counted. Its decode also has a
  prompt of 8 tokens (-pg 8,32). Build llama-bench in llama.cpp's sources, which are in llama-cpp-python's source
  archive, too (vendor/llama.cpp): `cmake -B FOLDER -DGGML_NATIVE=ON && cmake --build FOLDER --target llama-bench`. Then
  `klfast bench decode families --llama-cpp FOLDER`; making the files needs `klfast[gguf]`. For the table of families
  it was built with `-DCMAKE_C_FLAGS="-mno-amx-tile -mno-amx-int8 -mno-amx-bf16"` and the same for C++: with AMX it
  crashed on that machine.
- Of released sizes are all families but Nemotron-H, Jamba and Bamba, which have as many layers as fit. The
  table joins two runs of one day; the second had `--models zamba2,bamba,lfm2`.
"""


def render(folder: Path) -> str:
    """Return the page for the CSV files in a folder of results."""
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
