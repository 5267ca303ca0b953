"""klfast.sweep against the plain way: a whole forward pass per candidate, and the KL in torch.

On the CPU with a bundled model in float32. On GPUs with a model of Mamba-1.4B's size and random weights, checked in
float32 on some layers and timed in bfloat16, since random weights amplify rounding until two bfloat16 runs have little
in common.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

import klfast
from klfast.benchkit.runner import Contender, Group, distance
from klfast.benchkit.settings import Settings
from klfast.checkpoint.by_name import load_model, load_tokenizer
from klfast.models.linears import linears
from klfast.quant.rounding import fake_quantize
from klfast.quant.spec import QuantSpec
from klfast.text import token_batches

from . import models
from .test_divergence import kl

MODEL = "mamba2"
SPECS = (QuantSpec(4, 64), QuantSpec(8, 64))
CHECKED_LAYERS, CHECKED_WINDOWS = 6, 1  # for a model on a GPU


@dataclass
class Setting:
    """A model, token windows [W, T], the names of the layers to measure, and the dtype that is timed."""

    model: torch.nn.Module
    text: torch.Tensor
    names: list[str]
    timed: torch.dtype

    def error(self) -> float:
        """Return the error of klfast's measurements in float32, of all or, for a large model, some layers."""
        names, text = self.names, self.text
        if self.timed != torch.float32:
            names, text = names[:: max(1, len(names) // CHECKED_LAYERS)], text[:CHECKED_WINDOWS]
        return distance(swept(self.model, text, names), by_whole_forwards(self.model, text, names))


def groups(settings: Settings) -> Iterator[Group]:
    windows, length, layers = (2, 64, 3) if settings.quick else (8, 256, None)
    name = MODEL if settings.device == "cpu" else "mamba-tiny" if settings.quick else models.LARGE
    facts = {"windows": windows, "length": length}
    makers = {"klfast": _ours, "torch, whole forwards": _plain}
    arguments = (name, windows, length, layers, settings.device)
    yield Group(
        f"{name}, {windows}x{length} tokens",
        facts,
        {title: functools.partial(make, *arguments) for title, make in makers.items()},
    )


def bundled(name: str, windows: int, length: int, layers: int | None) -> Setting:
    model = load_model(name, "float32")
    text = torch.cat(
        token_batches(
            "calibration", load_tokenizer(name), vocab_size=model.config.vocab_size, length=length, windows=windows
        )
    )
    return Setting(model, text, list(linears(model))[:layers], torch.float32)


def random(name: str, windows: int, length: int, layers: int | None, device: str) -> Setting:
    model = klfast.accelerate(models.plain(name).to(device))
    text = torch.randint(0, model.config.vocab_size, (windows, length), device=device)
    return Setting(model, text, list(linears(model))[:layers], torch.bfloat16)


@functools.lru_cache(maxsize=1)
def _ready(name: str, windows: int, length: int, layers: int | None, device: str) -> tuple[Setting, float]:
    """Return the setting in the timed dtype, and its error."""
    setting = (
        bundled(name, windows, length, layers) if device == "cpu" else random(name, windows, length, layers, device)
    )
    error = setting.error()
    setting.model.to(setting.timed)
    return setting, error


def _ours(*arguments: object) -> Contender:
    setting, error = _ready(*arguments)
    return _contender(setting, lambda: swept(setting.model, setting.text, setting.names), error)


def _plain(*arguments: object) -> Contender:
    setting, _ = _ready(*arguments)
    return _contender(setting, lambda: by_whole_forwards(setting.model, setting.text, setting.names), 0.0)


def _contender(setting: Setting, call: Callable[[], torch.Tensor], error: float) -> Contender:
    # Both round in float32; the KL of 8-bit candidates is small enough to show it.
    candidates = len(setting.names) * len(SPECS)
    return Contender(
        [call], lambda: error, 1e-2, facts=lambda seconds: {"tok_s": round(candidates * setting.text.numel() / seconds)}
    )


def swept(model: torch.nn.Module, text: torch.Tensor, names: list[str]) -> torch.Tensor:
    """Return klfast's mean KL of each (layer, spec)."""
    found = klfast.sweep(
        model, text, specs=SPECS, metrics=("kl_teacher_student",), layers=names, dtype=None, progress=False
    )
    return torch.tensor([found.measurements[name, spec].mean["kl_teacher_student"] for name in names for spec in SPECS])


def by_whole_forwards(model: torch.nn.Module, text: torch.Tensor, names: list[str]) -> torch.Tensor:
    layers, found = linears(model), []
    teacher = model(text, use_cache=False).logits[:, :-1]
    for name in names:
        weight = layers[name].weight
        kept = weight.data.clone()
        for spec in SPECS:
            weight.data.copy_(fake_quantize(kept, spec))
            found.append(kl(teacher, model(text, use_cache=False).logits[:, :-1]).mean())
        weight.data.copy_(kept)
    return torch.stack(found)


def test_sweep(group, name, run, benchmark):
    run.time("sweep", group, name, benchmark)
