"""``klfast.study``: how well each metric ranks layers, measured by the perplexity that their quantization costs."""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from klfast import __version__
from klfast.core.errors import InvalidInputError
from klfast.core.progress import Progress
from klfast.evaluation.study_results import WEIGHTS, Alone, Study
from klfast.evaluation.windowed import Values
from klfast.models.batches import Batches, read
from klfast.models.head import linear_head
from klfast.models.selection import Patterns
from klfast.quant.spec import QuantSpec
from klfast.sensitivity.coverage import broken_candidates, left_out_note
from klfast.sensitivity.results import METRICS, Sensitivities
from klfast.sensitivity.sweeping import sweep

SPECS = ("int4-channel-sym", "int4-g64-sym", "int8-channel-sym")
_PERPLEXITY = "delta_ce"  # ln(perplexity) is the cross-entropy
_BETTER_HIGH = ("sqnr_db", "top1_agree")


def study(
    model: nn.Module,
    calibration: Batches,
    held_out: Batches,
    specs: Sequence[QuantSpec | str] = SPECS,
    *,
    layers: Patterns | None = None,
    resume: str | os.PathLike[str] | None = None,
    progress: Progress = None,
) -> Study:
    """Quantize each layer alone, and compare what the metrics say with the perplexity that it costs.

    The metrics are measured on calibration text, perplexity on held-out text, each on two halves (every other window),
    so that the study shows how much of a ranking is chance. It takes as long as a sweep over both texts.

    Args:
        model: as for ``klfast.sweep``.
        calibration: text for the metrics, as for ``klfast.sweep``; at least two windows.
        held_out: text for the perplexity; at least two windows.
        specs: the precisions to study.
        layers: as for ``klfast.sweep``.
        resume: a path; four files beside it, PATH.1 to PATH.4, keep the state of a study, which goes on from there.
        progress: as for ``klfast.sweep``.

    Returns:
        The study. A candidate that makes a NaN or an infinity on any of the four halves is left out of all;
        "not_finite" in the provenance names it.

    Raises:
        InvalidInputError: as ``klfast.sweep``, a text of one window, or no candidate that is finite everywhere.
    """
    halves = [*_halves(calibration, model, "calibration"), *_halves(held_out, model, "held_out")]
    found = [
        sweep(
            model,
            half,
            specs,
            resume=None if resume is None else f"{os.fspath(resume)}.{number}",
            layers=layers,
            progress=progress,
        )
        for number, half in enumerate(halves, 1)
    ]
    tokens = [sum(len(row) - 1 for row in half) for half in halves]
    provenance = {**found[0].provenance, "tokens": tokens, "klfast": __version__}
    for entry in ("windows", "micro_batches", "seconds", "token_forwards", "calibration_sha256", "ce_teacher"):
        provenance.pop(entry, None)  # of a half alone
    if broken := list(dict.fromkeys(name for one in found for name in broken_candidates(one.provenance))):
        provenance["not_finite"] = broken
    alone = {str(spec): _alone(found, spec) for spec in _specs(found[0])}
    alone = {spec: one for spec, one in alone.items() if one.layers}
    if not alone:
        raise InvalidInputError(
            f"there is nothing to compare: {left_out_note(provenance)}; study other layers or precisions"
        )
    return Study(alone, provenance)


def published(sensitivities: Sensitivities) -> Study:
    """Return the study of published kl-ssm-quant results, which hold KL(student || teacher), SQNR and perplexity.

    Raises:
        InvalidInputError: there are no perplexities in them.
    """
    given = sensitivities.provenance.get("perplexity")
    if not isinstance(given, dict):
        raise InvalidInputError("these sensitivities hold no measured perplexity; give published files, or a model")
    found = {}
    for spec in _specs(sensitivities):
        perplexity = given[str(spec)]
        layers = tuple(name for name in sensitivities.layers if (name, spec) in sensitivities.measurements)
        metrics = {name: _harms([sensitivities], layers, spec, name) for name in ("kl_student_teacher", "sqnr_db")}
        metrics[WEIGHTS] = _weights(sensitivities, layers)
        logarithms = np.log([[perplexity[name] for name in layers]])
        found[str(spec)] = Alone(layers, metrics, logarithms - logarithms.min())  # the files lack full precision's
    return Study(found, {"model": sensitivities.provenance["model"], "source": sensitivities.provenance["source"]})


def _halves(batches: Batches, model: nn.Module, name: str) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    rows = [row for batch in read(batches, linear_head(model).out_features) for row in batch.rows]
    if len(rows) < 2:
        raise InvalidInputError(f"{name} has one window; a study halves it, so give two or more")
    return rows[::2], rows[1::2]


def _alone(found: Sequence[Sensitivities], spec: QuantSpec) -> Alone:
    """Return what one spec does, from the sweeps of both halves of either text."""
    calibration, held_out = found[:2], found[2:]
    layers = tuple(name for name in found[0].layers if all((name, spec) in one.measurements for one in found))
    metrics = {name: _harms(calibration, layers, spec, name) for name in METRICS}
    metrics[WEIGHTS] = _weights(found[0], layers)
    return Alone(layers, metrics, _harms(held_out, layers, spec, _PERPLEXITY))


def _specs(sensitivities: Sensitivities) -> list[QuantSpec]:
    return sorted({spec for _, spec in sensitivities.measurements})


def _harms(found: Sequence[Sensitivities], layers: Sequence[str], spec: QuantSpec, metric: str) -> Values:
    """Return a metric, larger for worse, float64 [sweeps, layers]."""
    sign = -1.0 if metric in _BETTER_HIGH else 1.0
    return np.array([[sign * one.measurements[name, spec].mean[metric] for name in layers] for one in found])


def _weights(sensitivities: Sensitivities, layers: Sequence[str]) -> Values:
    return np.array([[float(np.prod(sensitivities.layers[name].shape)) for name in layers]])
