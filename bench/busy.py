"""How fast ``klfast generate`` decodes beside other programs that never rest, and llama.cpp with it.

Each run is a process of its own. The other programs are loops in Python, one thread each; medians of the runs count.

    python -m klfast.bench.busy --llama-cpp FOLDER --out bench/results/busy.md
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

import klfast
from klfast.benchkit.settings import Settings
from klfast.core.io import write_atomic
from klfast.core.machine import cpu_name
from klfast.reporting.table import Table

from . import gguf_models, llama_cpp, models
from .first_token import save

NEW = 64
HEADINGS = ("model", "engine", "none", "one", "two", "with one, of the rate alone")
OTHERS = (0, 1, 2)


@contextmanager
def busy(programs: int) -> Iterator[None]:
    """Let so many other programs compute."""
    started = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(programs)]
    try:
        yield
    finally:
        for process in started:
            process.kill()
            process.wait()


def decoded(folder: Path) -> float:
    """Return the tokens a second of ``klfast generate`` after the prompt."""
    command = [sys.executable, "-m", "klfast", "generate", str(folder), "The sea was calm.", "--json"]
    command += ["--max-new-tokens", str(NEW)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)["speed"]["tokens_per_second"]


def rows(name: str, settings: Settings, runs: int) -> Iterator[tuple[object, ...]]:
    """Measure a model with klfast, and with llama.cpp if its folder is given."""
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made) / "model"
        save(folder, name)
        engines = {"klfast int4": lambda: decoded(folder)}
        if settings.llama_cpp is not None:
            gguf = gguf_models.made(name)
            engines["llama.cpp q4_0"] = lambda: NEW / llama_cpp.seconds(settings, gguf, prompt=0, new=NEW)
        for engine, rate in engines.items():
            rates = []
            for programs in OTHERS:
                with busy(programs):
                    rates.append(statistics.median(rate() for _ in range(runs)))
            yield (name, engine, *rates, rates[1] / rates[0])


def main() -> None:
    """Measure, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--llama-cpp", type=Path, help="llama-bench, or its folder")
    parser.add_argument("--runs", type=int, default=3)
    arguments = parser.parse_args()
    settings = Settings(llama_cpp=arguments.llama_cpp, threads=torch.get_num_threads())
    llama_cpp.require(settings)
    found = [row for name in models.MODELS for row in rows(name, settings, arguments.runs)]
    conditions = (
        f"`python -m klfast.bench.busy` on {cpu_name()}, {torch.get_num_threads()} threads, "
        f"klfast {klfast.__version__}, torch {torch.__version__}."
    )
    table = Table("Tokens a second beside other programs, one thread each", HEADINGS, found)
    write_atomic(arguments.out, "\n".join(["# On a busy machine\n", f"{conditions}\n", table.markdown()]))


if __name__ == "__main__":
    main()
