"""What klfast reads, each with a folder of valid files to damage and a call that reads them."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import NamedTuple

import gguf_files
import saved_models
import sweep_models
import tiny_folder
import torch
from http_bodies import post, write_bodies
from tiny_models import tiny

import klfast
from klfast.sensitivity import kl_ssm_quant


class Reader(NamedTuple):
    """A reader.

    Attributes:
        write: writes valid files into an empty folder.
        read: reads the folder, of which one file was damaged.
        damaged: patterns of the files to damage.
    """

    write: Callable[[Path], object]
    read: Callable[[Path], object]
    damaged: tuple[str, ...] = ("*",)


@cache
def _swept() -> klfast.Sensitivities:
    return klfast.sweep(tiny("mamba"), sweep_models.tokens(), specs=["int4-g32-sym"])


def _plan() -> klfast.Plan:
    return klfast.plan(_swept(), mean_bits=8)


def _write_sensitivities(folder: Path) -> None:
    _swept().to_json(folder / "file.json")
    figures = dict.fromkeys(
        ("perplexity", "sqnr_db", "kl_teacher_to_student", "kl_student_to_teacher", "delta_cross_entropy"), 26.5
    )
    published = dict.fromkeys(kl_ssm_quant._MODELS[0].shapes(), figures)
    (folder / "published_4bits.json").write_text(json.dumps(published))


def _write_timings(folder: Path) -> None:
    from klfast.benchkit.product_times import time_products

    time_products(_swept()).to_json(folder / "file.json")


def _write_comparison(folder: Path) -> None:
    klfast.compare(tiny("mamba"), tiny("mamba", seed=1), sweep_models.tokens()).to_json(folder / "file.json")


def _write_front(folder: Path) -> None:
    from klfast.evaluation.front import Front, FrontPoint

    points = (
        FrontPoint("planned", _plan(), None, 0.1, 0.01, 20.0, 50.0),
        FrontPoint("uniform", _plan(), "int4", *[1.0] * 4),
    )
    Front(points, {"model": "tiny"}).to_json(folder / "file.json")


def _write_study(folder: Path) -> None:
    import numpy as np

    from klfast.evaluation.study_results import Alone, Study

    values = np.arange(6.0).reshape(2, 3)
    alone = Alone(("a", "b", "c"), {"kl_teacher_student": values, "weights": values}, values)
    Study({"int4-g64-sym": alone}, {"model": "tiny"}).to_json(folder / "file.json")


def _write_state(folder: Path) -> None:
    engine = klfast.lower(_state_model())
    state = engine.state(2)
    engine(torch.zeros(2, 5, dtype=torch.int64), state)
    klfast.save_state(folder / "state", state, _state_model())


@cache
def _state_model() -> torch.nn.Module:
    return tiny("granite_hybrid")


def _sweep(folder: Path) -> object:
    return klfast.sweep(tiny("mamba"), sweep_models.tokens(1), specs=["int4-g32-sym"], resume=folder / "file.json")


def _write_quantized(folder: Path) -> None:
    klfast.save_quantized(saved_models.quantized("mamba", tied=True), folder / "model")


def _load_quantized(folder: Path) -> object:
    model = folder / "model"
    try:
        intact = json.loads((model / "klfast.json").read_bytes())
        if isinstance(intact, dict) and isinstance(intact.get("files"), dict):
            saved_models.sign(model)  # so that what lies behind the digests is read, too
    except (ValueError, UnicodeError, RecursionError):
        pass
    return klfast.load_quantized(model)


def _write_model(folder: Path) -> None:
    model = tiny_folder.save_model(folder / "model")
    whole = model / "model.safetensors"
    if not whole.exists():
        return
    index = {"metadata": {}, "weight_map": dict.fromkeys(_names(whole), "model-00001-of-00001.safetensors")}
    whole.rename(model / "model-00001-of-00001.safetensors")
    (model / "model.safetensors.index.json").write_text(json.dumps(index))


def _names(path: Path) -> list[str]:
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        return list(file.keys())


def _write_gguf(folder: Path) -> None:
    gguf_files.write(folder / "file.gguf", "mamba", gguf_files.tiny("mamba"), {"*": "Q8_0"})


def _only(read: Callable[[Path], object]) -> Callable[[Path], object]:
    """Return a reader of the damaged file alone."""
    return lambda folder: read(next(path for path in folder.iterdir() if path.name.startswith("damaged-")))


READERS = {
    "plan": Reader(lambda folder: _plan().to_json(folder / "file.json"), _only(klfast.Plan.from_json)),
    "sensitivities": Reader(_write_sensitivities, _only(klfast.Sensitivities.from_json)),
    "timings": Reader(_write_timings, _only(klfast.Timings.from_json)),
    "comparison": Reader(_write_comparison, _only(klfast.Comparison.from_json)),
    "front": Reader(_write_front, _only(klfast.Front.from_json)),
    "study": Reader(_write_study, _only(klfast.Study.from_json)),
    "state": Reader(_write_state, _only(lambda path: klfast.load_state(path, _state_model()))),
    "resume": Reader(_sweep, _sweep, ("file.json",)),
    "quantized": Reader(_write_quantized, _load_quantized, ("model/*",)),
    "model": Reader(
        _write_model, lambda folder: klfast.load_model(folder / "model"), ("model/*config*", "model/*.safetensors*")
    ),
    "tokenizer": Reader(_write_model, lambda folder: klfast.load_tokenizer(folder / "model"), ("model/*token*",)),
    "gguf": Reader(_write_gguf, lambda folder: klfast.load_model(folder / "file.gguf", gguf="exact"), ("file.gguf",)),
    "gguf_tokenizer": Reader(_write_gguf, lambda folder: klfast.load_tokenizer(folder / "file.gguf"), ("file.gguf",)),
    "http": Reader(write_bodies, _only(post)),
}
