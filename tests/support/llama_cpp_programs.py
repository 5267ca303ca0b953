"""llama.cpp's own programs, where KLFAST_LLAMA_CPP names the folder that holds them (.ci/llama_cpp makes one)."""

import os
import subprocess
from pathlib import Path

import numpy as np
import pytest

PROGRAMS = os.environ.get("KLFAST_LLAMA_CPP")
needs_llama_cpp = pytest.mark.skipif(
    PROGRAMS is None, reason="KLFAST_LLAMA_CPP names no folder of llama.cpp's programs"
)


def run(program, *arguments):
    """Run a program and return what it writes on standard output and error."""
    command = [Path(PROGRAMS) / program, *arguments]
    done = subprocess.run([str(part) for part in command], capture_output=True, timeout=300)
    output = (done.stdout + done.stderr).decode(errors="replace")
    assert done.returncode == 0, output[-2000:]
    return output


def perplexity(model, text, length, *arguments):
    """Run llama-perplexity on windows of ``length`` tokens, one at a time, with states and caches in float32."""
    sizes = ["-c", length, "-b", length, "-ub", length, "-t", 2, "-ctk", "f32", "-ctv", "f32", "-fa", "off"]
    return run("llama-perplexity", "-m", model, "-f", text, *sizes, "--no-warmup", *arguments)


def log_probabilities(model, text, length, out):
    """Return llama.cpp's tokens of a text [W, T] and its log probabilities after the second half of each window.

    The latter are float32 [W, T - 1 - T // 2, V], in 16 bits between the largest and 16 less (tools/perplexity).
    """
    perplexity(model, text, length, "--kl-divergence-base", out)
    raw = np.fromfile(out, np.uint8)
    assert raw[:8].tobytes() == b"_logits_"
    found, vocabulary, windows = raw[8:20].view(np.int32).tolist()
    assert found == length
    end = 20 + 4 * windows * length
    rows = raw[end:].view(np.uint16).reshape(windows, length - 1 - length // 2, -1)
    scale, least = (rows[..., first : first + 2].copy().view(np.float32) for first in (0, 2))
    return raw[20:end].view(np.int32).reshape(windows, length), rows[..., 4 : 4 + vocabulary] * scale + least
