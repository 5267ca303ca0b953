"""What a sweep of a Mamba-130M-sized model costs: the reference's procedure, plain forward passes, and klfast's ways.

The weights are random. An adaptive sweep is run as a whole, and with --whole the fastest exhaustive one. All else is
measured on a part and extrapolated: three candidates on one window by whole forward passes; by klfast those of the
middle block, which go through half of the network, on a few windows. Peaks of memory are Linux's.

    python -m klfast.bench.sweep_cost --whole --out bench/results/sweep_cost.md
"""

from __future__ import annotations

import argparse
import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import klfast
from klfast.core.io import write_atomic
from klfast.core.machine import cpu_name
from klfast.models.linears import linears
from klfast.quant.rounding import fake_quantize
from klfast.quant.spec import QuantSpec
from klfast.reporting.table import Table
from klfast.sensitivity.differences import why_not

from . import models
from .test_divergence import kl

SPECS = (QuantSpec(4, 64), QuantSpec(8, 64))
HEADINGS = (
    "way",
    "seconds a candidate",
    "minutes a sweep",
    "times as fast as the reference",
    "MB beyond the model",
    "how",
)
_PIECE = 4  # windows that klfast measures to extrapolate from


def by_whole_forwards(model: torch.nn.Module, text: torch.Tensor, is_cached: bool) -> float:
    """Return the seconds of a candidate on one window, the mean of three, with the teacher's logits known or not."""
    layers, window = linears(model), text[:1]
    names = list(layers)[:: max(1, len(layers) // 3)][:3]
    teacher = model(window, use_cache=False).logits[:, :-1]
    start = time.perf_counter()
    for name in names:
        weight = layers[name].weight
        kept = weight.data.clone()
        weight.data.copy_(fake_quantize(kept, SPECS[0]))
        student = model(window, use_cache=False).logits[:, :-1]
        weight.data.copy_(kept)
        kl(teacher if is_cached else model(window, use_cache=False).logits[:, :-1], student)
    return (time.perf_counter() - start) / len(names)


def by_klfast(model: torch.nn.Module, text: torch.Tensor, vocabulary: str, suffix: str) -> float:
    """Return the seconds of a candidate of the middle block on one window, with its share of the teacher's."""
    names = list(linears(model))
    blocks = [name.rpartition(".")[0] for name in (names[len(names) // 2], names[-2])]  # the last name is the head's
    how: dict[str, Any] = {"vocabulary": vocabulary, "suffix": suffix, "progress": False}
    middle, last = (
        klfast.sweep(model, text[:_PIECE], SPECS, "kl_teacher_student", layers=f"{block}.*", **how) for block in blocks
    )
    seconds, candidates = middle.provenance["seconds"], len(middle.measurements)
    noise = last.provenance["seconds"]["suffix"]  # nearly all: behind the last block candidates meet a norm alone
    each = (seconds["quantize"] + seconds["own_block"] + seconds["suffix"] - noise) / candidates
    shared = (seconds["teacher"] + noise) / (len(names) * len(SPECS))
    return (each + shared + seconds["divergence"] / (candidates + 1)) / _PIECE  # the noise floor is compared, too


def main() -> None:
    """Measure each way and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", default="mamba-130m", choices=models.NAMES)
    parser.add_argument("--windows", type=int, default=64)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument(
        "--whole", action="store_true", help="run the fastest exhaustive sweep as a whole, half an hour"
    )
    asked = parser.parse_args()
    torch.set_grad_enabled(False)
    model = models.plain(asked.model)
    text = torch.randint(model.config.vocab_size, (asked.windows, asked.length))
    candidates = len(linears(model)) * len(SPECS)
    found: list[tuple[str, str, float, float]] = []

    def measure(way: str, how: str, seconds_a_window: Callable[[], float]) -> None:
        Path("/proc/self/clear_refs").write_text("5")  # so that the peak is that of this way
        before, seconds = _mb("VmRSS"), seconds_a_window() * asked.windows
        found.append((way, how, seconds, _mb("VmHWM") - before))
        print(*found[-1], flush=True)

    def whole(**how: Any) -> float:
        start = time.perf_counter()
        klfast.sweep(model, text, SPECS, **how)
        return (time.perf_counter() - start) / (candidates * len(text))

    measure("klfast, adaptive", "as a whole", functools.partial(whole, budget="adaptive"))
    fast = [] if why_not(torch.device("cpu"), torch.float32) else [("sampled", "int8")]
    for vocabulary, suffix in (*fast, ("sampled", "exact"), ("full", "exact")):
        how = f"{_PIECE} windows, the middle block, extrapolated"
        way = f"klfast, exhaustive, {vocabulary} vocabulary, suffix {suffix}"
        if asked.whole and not found[1:]:
            measure(way, "as a whole", functools.partial(whole, vocabulary=vocabulary, suffix=suffix))
        else:
            measure(way, how, functools.partial(by_klfast, model, text, vocabulary, suffix))
    for is_cached, way in ((True, "plain forward, teacher cached"), (False, "reference: two plain forwards")):
        how = "3 candidates, 1 window, extrapolated"
        measure(way, how, functools.partial(by_whole_forwards, model, text, is_cached))
    reference = found[-1][2]
    rows = [(way, s, s * candidates / 60, reference / s, mb, how) for way, how, s, mb in found]
    conditions = (
        f"{asked.model}-sized, random weights in float32, {asked.windows} x {asked.length} tokens, {candidates} "
        "candidates (INT4 and INT8). A candidate's seconds are for all of the text; of sweeps as a whole they are "
        f"their time by {candidates}. `python -m klfast.bench.sweep_cost` on {cpu_name()}, "
        f"{torch.get_num_threads()} threads, klfast {klfast.__version__}, torch {torch.__version__}."
    )
    write_atomic(asked.out, f"# Cost of a sweep\n\n{conditions}\n\n{Table('Ways', HEADINGS, tuple(rows)).markdown()}")


def _mb(field: str) -> float:
    """Return a field of this process's memory in megabytes; Linux counts in units of 1,024."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024 / 1e6


if __name__ == "__main__":
    main()
