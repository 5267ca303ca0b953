"""How soon ``klfast generate`` shows its first token, and in how much memory, with Mamba-1.4B in INT4 (random weights).

Each run is a process of its own, timed to its first output: Python's start, imports, loading, lowering, the prompt.
What goes beyond the prompt cannot fall below the time to import torch and the model's class, which is measured between
the runs; memory is what the process takes at most after its imports, beside the weights' and the state's size.

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
SECONDS = ("seconds in all", "of them the prompt", "beyond it", "to import torch", "and the model's class")
HEADINGS = (*SECONDS, "peak MB", "weights + state, MB", "ratio")
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


def save(folder: Path, name: str) -> str:
    """Save a model of bench/models.py in INT4, with a bundled tokenizer; return the module of its class."""
    torch.set_default_dtype(torch.bfloat16)  # half the memory
    model = models.plain(name)
    torch.set_default_dtype(torch.float32)
    klfast.quantize_model(model, Plan(dict.fromkeys(linears(model), QuantSpec(4, 64)), "uniform"))
    klfast.save_quantized(model, folder, klfast.load_tokenizer("mamba"))
    return type(model).__module__


def first_token(folder: Path) -> tuple[float, float]:
    """Return the seconds of a command that writes one token, and those of its prompt."""
    command = ["-m", "klfast", "generate", str(folder), PROMPT, "--max-new-tokens", "1", "--json"]
    seconds, output = first_output(*command)
    return seconds, json.loads(output)["speed"]["prompt_seconds"]


def importing(*modules: str) -> float:
    """Return the seconds that Python takes to start and import modules."""
    return first_output("-c", f"import {', '.join(modules)}; print()")[0]


def first_output(*arguments: str) -> tuple[float, str]:
    """Run Python; return the seconds until it writes something, and all that it writes."""
    begin = time.perf_counter()
    with subprocess.Popen([sys.executable, *arguments], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        first = process.stdout.read(1)
        seconds = time.perf_counter() - begin
        output = first + process.stdout.read()
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, process.args)
    return seconds, output


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
        module = save(folder, arguments.model)
        first_token(folder)
        runs = [(*first_token(folder), importing("torch"), importing("torch", module)) for _ in range(arguments.runs)]
        seconds, prompt, torchs, classes = map(statistics.median, zip(*runs, strict=True))
        peak, held = memory(folder)
    row = seconds, prompt, seconds - prompt, torchs, classes, peak / 1e6, held / 1e6, peak / held
    table = Table(f"{arguments.model}, INT4, prompt of some 60 tokens", HEADINGS, (row,))
    conditions = (
        f"`python -m klfast.bench.first_token` on {cpu_name()}, {torch.get_num_threads()} threads, klfast "
        f"{klfast.__version__}, torch {torch.__version__}; the file was in the page cache."
    )
    write_atomic(arguments.out, "\n".join(["# First token\n", f"{conditions}\n", table.markdown()]))


if __name__ == "__main__":
    main()
