"""What klfast writes: commands, and the saving of a model, each with its output."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import command_line
import tiny_folder
import torch

import klfast
from klfast.cli import app, output
from klfast.core.errors import KlfastError
from klfast.sensitivity import resume_file

_TEXT = ("--windows", "3", "--length", "32")
_SPECS = ("--spec", "int4-g32-sym", "--spec", "int8-g32-sym")


class Job(NamedTuple):
    """A job.

    Attributes:
        out: the name of its file or folder.
        run: does it: of the folder of the inputs, and the path of the output, which may exist.
    """

    out: str
    run: Callable[[Path, Path], None]


def make_inputs(folder: Path) -> None:
    """Write what the jobs read."""
    tiny_folder.save_model(folder / "model")
    (folder / "text.txt").write_text(command_line.TEXT)
    sensitivities = klfast.sweep(klfast.load_model(folder / "model"), torch.arange(64).view(2, 32), ["int4", "int8"])
    sensitivities.to_json(folder / "sensitivities.json")


def _command(name: str, *more: str, model: str = "model", text: str = "--calibration") -> Callable[[Path, Path], None]:
    def run(inputs: Path, out: Path) -> None:
        resume_file._SAVE_SECONDS = -1.0  # save wherever it can
        given = (text, str(inputs / "text.txt"), *_TEXT) if text else ()
        files = [str(inputs / one) for one in more if one.endswith(".json")]
        options = [one for one in more if not one.endswith(".json")]
        arguments = [name, str(inputs / model), *files, "--out", str(out), "--force", *given, *options]
        output.run(lambda: app(arguments, prog_name="klfast"))

    return run


def _save(inputs: Path, out: Path) -> None:
    try:
        model = klfast.load_model(inputs / "model")
        plan = klfast.plan(klfast.Sensitivities.from_json(inputs / "sensitivities.json"), mean_bits=6)
        klfast.quantize_model(model, plan)
        tokenizer = klfast.load_tokenizer(inputs / "model")
        klfast.save_quantized(model, out, tokenizer, overwrite=True, max_shard_size="50KB")
    except (OSError, KlfastError) as error:
        sys.exit(f"klfast: {error}")
    except KeyboardInterrupt:
        sys.exit(130)


JOBS = {
    "sweep": Job("found.json", _command("sweep", *_SPECS)),
    "adaptive": Job("found.json", _command("sweep", *_SPECS, "--budget", "adaptive", "--windows", "12")),
    "study": Job("study.json", _command("study", "--spec", "int4-g32-sym")),
    "pareto": Job("front.json", _command("pareto", "sensitivities.json", "--plans", "3", text="--text")),
    "quantize": Job("mixed", _command("quantize", "--uniform", "int4-g32-sym", "--rounding", "gptq")),
    "save": Job("saved", _save),
    "gguf": Job("model.gguf", _command("export", "--no-tokenizer", text="")),
    "openvino": Job("graph", _command("export", "--format", "openvino", text="")),
}
