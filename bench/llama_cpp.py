"""llama.cpp's own benchmark as a peer: prefill and decode of a GGUF model."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

from klfast.benchkit.runner import UnavailableError


def seconds(program: Path, gguf: Path, *, prompt: int, new: int, threads: int) -> float:
    """Return llama-bench's time for ``prompt`` tokens and then ``new`` single ones; loading is not counted."""
    places = (program, program / "llama-bench", program / "build" / "bin" / "llama-bench")
    binary = next((path for path in places if path.is_file()), None)
    if binary is None or not gguf.is_file():
        raise UnavailableError(f"there is no {program if binary is None else gguf}")
    what = ["-p", prompt, "-n", 0] if not new else ["-p", 0, "-n", 0, "-pg", f"{prompt},{new}"]
    command = [binary, "-m", gguf, *what, "-t", threads, "-r", 1, "-o", "json"]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=1800)
    if done.returncode:
        raise UnavailableError(
            f"llama-bench failed on {gguf.name} (exit {done.returncode}): {done.stderr.strip()[-200:]}"
        )
    (test,) = json.loads(done.stdout)
    return test["samples_ns"][0] / 1e9
