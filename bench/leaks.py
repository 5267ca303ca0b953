"""Whether klfast keeps memory that it no longer needs: what a process has after many calls of one kind.

Each kind runs in a process of its own, with a tiny model of random weights. Memory is what the system counts as
resident, in all but the server without garbage and what malloc keeps for later calls. The slope is that of a straight
line through the second half of the points.

    python -m klfast.bench.leaks --out bench/results/leaks.md
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import multiprocessing
import os
import random
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch

import klfast
from klfast.core.io import write_atomic
from klfast.core.machine import cpu_name
from klfast.quant.spec import QuantSpec
from klfast.reporting.table import Table

from . import models, servers

MODEL = "mamba-tiny"
POINTS = 10
CLIENTS, PROMPT, NEW = 8, 16, 8

# A kind of call: what makes it so many times, and the process whose memory counts.
Calls = tuple[Callable[[int], object], int]


def resident(process: int) -> int:
    """Return the bytes of memory that a process has."""
    return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _generate() -> Calls:
    model = models.ours(MODEL, (QuantSpec(4, 64),), "exact")
    prompt = torch.arange(PROMPT).unsqueeze(0)
    return _repeated(lambda: klfast.generate(model, prompt, NEW, eos_token_id=())), os.getpid()


def _sweep() -> Calls:
    model, text = models.plain(MODEL), [torch.arange(64).reshape(2, 32)]
    return _repeated(lambda: klfast.sweep(model, text, specs=["int4-g64-sym", "int8-g64-sym"])), os.getpid()


def _load() -> Calls:
    folder = servers.folder(MODEL)
    return _repeated(lambda: klfast.load_quantized(folder)), os.getpid()


def _requests() -> Calls:
    server, chance = servers.Server(servers.folder(MODEL), "--prefix-cache", "4MB"), random.Random(0)

    def ask(number: int) -> None:
        server.ask_all([servers.prompt(chance, PROMPT) for _ in range(number)], NEW, CLIENTS)

    return ask, server.process


def _repeated(call: Callable[[], object]) -> Callable[[int], None]:
    def repeat(number: int) -> None:
        for _ in range(number):
            call()

    return repeat


KINDS = {
    "klfast.generate": (_generate, 5000),
    "klfast.sweep": (_sweep, 500),
    "klfast.load_quantized": (_load, 500),
    "requests to klfast serve": (_requests, 10_000),
}


def measure(kind: str, number: int) -> list[int]:
    """Return the bytes that are resident after each tenth of so many calls."""
    make, process = KINDS[kind][0]()
    found = []
    for _ in range(POINTS):
        make(number // POINTS)
        if process == os.getpid():
            gc.collect()
            ctypes.CDLL(None).malloc_trim(0)
        found.append(resident(process))
    return found


def slope(found: list[int], number: int) -> float:
    """Return the bytes that a call adds, by the second half of the points."""
    calls = np.arange(1, POINTS + 1) * (number / POINTS)
    half = POINTS // 2
    return float(np.polyfit(calls[half:], found[half:], 1)[0])


def main() -> None:
    """Measure, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--share", type=float, default=1.0, help="of the calls, for a quick look")
    arguments = parser.parse_args()
    rows = []
    for kind, (_, most) in KINDS.items():
        number = int(most * arguments.share)
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as alone:
            found = alone.submit(measure, kind, number).result()
        megabytes = (round(found[i] / 1e6, 1) for i in (0, 1, POINTS // 2 - 1, -1))
        rows.append((kind, number, *megabytes, round(slope(found, number))))
        print(rows[-1], flush=True)
    headings = ("calls", "number", *(f"MB after {part}" for part in ("a tenth", "a fifth", "half", "all")))
    table = Table(f"{MODEL}, INT4; sweeps of full precision", (*headings, "bytes a call, second half"), tuple(rows))
    conditions = (
        f"`python -m klfast.bench.leaks` on {cpu_name()}, {torch.get_num_threads()} threads, klfast "
        f"{klfast.__version__}, torch {torch.__version__}. Prompts of {PROMPT} tokens, answers of {NEW}; {CLIENTS} "
        "clients at a time of a server whose prefix cache has 4 MB."
    )
    write_atomic(arguments.out, "\n".join(["# Memory after many calls\n", f"{conditions}\n", table.markdown()]))


if __name__ == "__main__":
    main()
