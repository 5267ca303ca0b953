"""llama.cpp's own benchmark as a peer: prefill and decode of a GGUF model."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

from .contest import Unavailable


def bench(program: Path, gguf: Path, *, prompt: int, new: int, threads: int) -> dict[str, float]:
    """Seconds of the prefill of ``prompt`` tokens and of decoding ``new`` ones, medians of five runs."""
    binary = next((path for path in (program, program / "llama-bench", program / "build" / "bin" / "llama-bench") if path.is_file()), None)
    if binary is None or not gguf.is_file():
        raise Unavailable(f"there is no {program if binary is None else gguf}")
    command = [binary, "-m", gguf, "-p", str(prompt), "-n", str(new), "-t", str(threads), "-r", "5", "-o", "json"]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=1800)
    if done.returncode:
        raise Unavailable(f"llama-bench failed on {gguf.name} (exit {done.returncode}): {done.stderr.strip()[-200:]}")
    seconds = {}
    for test in json.loads(done.stdout):
        samples = sorted(test["samples_ns"])
        seconds["decode" if test["n_gen"] else "prefill"] = samples[len(samples) // 2] / 1e9
    return seconds
