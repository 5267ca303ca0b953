"""How soon ``klfast generate`` shows its first token, and in how much memory, with Mamba-1.4B in INT4 (random weights).

Each run is a process of its own: Python's start, imports, loading, lowering, the prompt. What goes beyond the prompt is
the command's own; memory is what the process takes at most after its imports, beside the weights' and the state's size.

    python -m klfast.bench.first_token --out bench/results/first_token.md
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

import klfast
from klfast.core.io import write_atomic
from klfast.core.machine import cpu_name
from klfast.models.linears import linears
from klfast.planning.plan_file import Plan
from klfast.quant.spec import QuantSpec
from klfast.reporting.table import Table

from . import models

PROMPT = "The sea was calm that morning, and the boats lay still. " * 4
HEADINGS = ("seconds in all", "of them the prompt", "beyond it", "peak MB", "weights + state, MB", "ratio")
MEMORY = """
import json, sys
import torch, klfast, klfast.engine.engine, transformers.models.mamba.modeling_mamba
from klfast.generation.engine import engine_of
with open("/proc/self/clear_refs", "w") as file: file.write("5")
def peak(): return 1024 * int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])
before = peak()
model = klfast.load_model(sys.argv[1])
klfast.generate(model, torch.arange(512).unsqueeze(0), 8, eos_token_id=())
weights = sum(t.nbytes for t in {t.data_ptr(): t for t in model.state_dict().values()}.values())
print(json.dumps({"peak": peak() - before, "held": weights + engine_of(model).state().nbytes}))
"""


def save(folder: Path, name: str) -> None:
    """Save a model of bench/models.py in INT4, with a bundled tokenizer."""
    torch.set_default_dtype(torch.bfloat16)  # half the memory
    model = models.plain(name)
    torch.set_default_dtype(torch.float32)
    klfast.quantize_model(model, Plan(dict.fromkeys(linears(model), QuantSpec(4, 64)), "uniform"))
    klfast.save_quantized(model, folder, klfast.load_tokenizer("mamba"))


def first_token(folder: Path) -> tuple[float, float]:
    """Return the seconds of a command that writes one token, and those of its prompt."""
    command = [sys.executable, "-m", "klfast", "generate", str(folder), PROMPT, "--max-new-tokens", "1", "--json"]
    begin = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return time.perf_counter() - begin, json.loads(done.stdout)["speed"]["prompt_seconds"]


def memory(folder: Path) -> tuple[int, int]:
    """Return the bytes that loading and generating take at most, and those of weights and state."""
    done = subprocess.run([sys.executable, "-c", MEMORY, str(folder)], capture_output=True, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    return found["peak"], found["held"]


def main() -> None:
    """Measure, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", default=models.LARGE, choices=models.NAMES)
    parser.add_argument("--runs", type=int, default=5, help="after one that warms the file cache; medians count")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made) / "model"
        save(folder, arguments.model)
        first_token(folder)
        seconds, prompt = map(
            statistics.median, zip(*(first_token(folder) for _ in range(arguments.runs)), strict=True)
        )
        peak, held = memory(folder)
    row = seconds, prompt, seconds - prompt, peak / 1e6, held / 1e6, peak / held
    table = Table(f"{arguments.model}, INT4, prompt of some 60 tokens", HEADINGS, (row,))
    conditions = (
        f"`python -m klfast.bench.first_token` on {cpu_name()}, {torch.get_num_threads()} threads, klfast "
        f"{klfast.__version__}, torch {torch.__version__}; the file was in the page cache."
    )
    write_atomic(arguments.out, "\n".join(["# First token\n", f"{conditions}\n", table.markdown()]))


if __name__ == "__main__":
    main()
