"""llama.cpp's own benchmark as a peer: prefill and decode of a GGUF model."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

from klfast.benchkit.settings import Settings
from klfast.core.errors import InvalidInputError

from . import models


def require(settings: Settings) -> None:
    """Raise InvalidInputError if llama-bench is missing, or if a GGUF file is not named after a model."""
    if settings.llama_cpp is not None:
        _program(settings.llama_cpp)
    elif settings.gguf:
        raise InvalidInputError("--gguf needs --llama-cpp, the folder of llama-bench")
    for path in settings.gguf:
        if not path.name.startswith(models.NAMES):
            raise InvalidInputError(f"the name of {path.name} does not begin with one of {', '.join(models.NAMES)}")


def variants(name: str, settings: Settings) -> dict[str, Path | None]:
    """Return the given files of a model by what their names add to its own; None stands for one that is to be made."""
    if settings.llama_cpp is None:
        return {}
    given = {path.stem[len(name) :].lstrip("-_."): path for path in settings.gguf if path.name.startswith(name)}
    return given or {"q4_0": None}


def seconds(settings: Settings, gguf: Path, *, prompt: int, new: int) -> float:
    """Return llama-bench's time for ``prompt`` tokens and then ``new`` single ones; loading is not counted.

    Raises:
        RuntimeError: llama-bench failed.
    """
    assert settings.llama_cpp is not None
    what = ["-p", prompt, "-n", 0] if not new else ["-p", 0, "-n", 0, "-pg", f"{prompt},{new}"]
    command = [_program(settings.llama_cpp), "-m", gguf, *what, "-t", settings.threads, "-r", 1, "-o", "json"]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=1800)
    if done.returncode:
        raise RuntimeError(f"llama-bench failed on {gguf.name} (exit {done.returncode}): {done.stderr.strip()[-200:]}")
    (test,) = json.loads(done.stdout)
    return test["samples_ns"][0] / 1e9


def _program(place: Path) -> Path:
    for path in (place, place / "llama-bench", place / "bin" / "llama-bench", place / "build" / "bin" / "llama-bench"):
        if path.is_file():
            return path
    raise InvalidInputError(f"there is no llama-bench in {place}")
