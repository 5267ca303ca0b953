"""klfast.sweep on a bundled model against the plain way: for each candidate a whole forward pass and the KL in torch."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch

import klfast
from klfast.data import token_batches
from klfast.loading import load_model, load_tokenizer
from klfast.models.layers import linears
from klfast.quantization import fake_quantize
from klfast.types import QuantSpec

from .contest import Contender, Group, Unavailable, distance
from .settings import Settings
from .test_divergence import kl

MODEL = "mamba2"
SPECS = (QuantSpec(4, 64), QuantSpec(8, 64))


def groups(settings: Settings) -> Iterator[Group]:
    windows, length, layers = (2, 64, 3) if settings.quick else (8, 256, None)
    facts = {"windows": windows, "length": length}
    makers = {"klfast": _ours, "torch, whole forwards": _plain}
    arguments = (windows, length, layers, settings.device)
    yield Group(f"{MODEL}, {windows}x{length} tokens", facts, {name: functools.partial(make, *arguments) for name, make in makers.items()})


@functools.lru_cache(maxsize=1)
def _setting(windows: int, length: int, layers: int | None, device: str):
    """The model, the text, and the names of the layers to measure."""
    if device != "cpu":
        raise Unavailable("the sweep is timed on the CPU only")
    model = load_model(MODEL, "float32")
    text = torch.cat(token_batches("calibration", load_tokenizer(MODEL), vocab_size=model.config.vocab_size, length=length, windows=windows))
    return model, text, list(linears(model))[:layers]


def _ours(*arguments: object) -> Contender:
    model, text, names = _setting(*arguments)
    return _contender(model, text, names, lambda: _swept(model, text, names))


def _plain(*arguments: object) -> Contender:
    model, text, names = _setting(*arguments)
    return _contender(model, text, names, lambda: _by_whole_forwards(model, text, names))


def _contender(model, text, names, call) -> Contender:
    # Both ways round in float32; the KL of 8-bit candidates is small enough to show it.
    return Contender([call], lambda: distance(call(), _by_whole_forwards(model, text, names)), 1e-2, facts=lambda seconds: {"tok_s": round(len(names) * len(SPECS) * text.numel() / seconds)})


def _swept(model, text: torch.Tensor, names: list[str]) -> torch.Tensor:
    """The mean KL of each (layer, spec)."""
    found = klfast.sweep(model, text, specs=SPECS, metrics=("kl_teacher_student",), layers=names, progress=False)
    return torch.tensor([found.measurements[name, spec].mean["kl_teacher_student"] for name in names for spec in SPECS])


def _by_whole_forwards(model, text: torch.Tensor, names: list[str]) -> torch.Tensor:
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
