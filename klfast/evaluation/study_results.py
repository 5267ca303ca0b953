"""What a study measured, how its metrics agree with perplexity, and its JSON format."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from klfast.core import signed_json
from klfast.core.errors import CheckpointError
from klfast.core.signed_json import is_a
from klfast.evaluation.rank_correlation import estimate, kendall, resampled, spearman
from klfast.evaluation.windowed import Estimate, Values

SCHEMA = "klfast-study/1"
WEIGHTS = "weights"  # the number of a layer's weights: a ranking that measures nothing
_TIE = 1e-6  # relative difference up to which values tie
_REMEDY = "make the study again"


@dataclass(frozen=True, eq=False)
class Alone:
    """Each layer quantized alone, in one precision.

    Attributes:
        layers: their names.
        metrics: by name, larger for worse, float64 [halves, layers]: a row for each half of the calibration text, or
            one. "weights" is the number of a layer's weights.
        perplexity: what it adds to the logarithm of the perplexity (up to a constant), float64 [halves, layers], on
            halves of held-out text.
    """

    layers: tuple[str, ...]
    metrics: Mapping[str, Values]
    perplexity: Values


@dataclass(frozen=True)
class Agreement:
    """How a metric's ranking of the layers agrees with that by measured perplexity; intervals are over layers.

    A figure is None, too, where there is no ranking: of one layer, or where all layers tie.

    Attributes:
        metric: its name, or "perplexity" for the measurement against itself.
        tau: Kendall's tau-b, None for "perplexity".
        rho: Spearman's rho, None for "perplexity".
        gain: tau less that of the first KL in the study; None for that one.
        halves: tau between both halves of the text, None if there are none.
    """

    metric: str
    tau: Estimate | None
    rho: Estimate | None
    gain: Estimate | None
    halves: float | None


@dataclass(frozen=True, eq=False)
class Study:
    """A study of one model.

    Attributes:
        specs: by precision, what it does to each layer alone.
        provenance: free-form facts (model, tokens of the four halves, versions).
    """

    specs: Mapping[str, Alone]
    provenance: dict[str, object] = field(default_factory=dict)

    def agreements(self, spec: str) -> list[Agreement]:
        """Return the agreement of each metric, and last how far perplexity agrees with itself."""
        alone = self.specs[spec]
        truth, weights = _levels(alone.perplexity.mean(0)), resampled(len(alone.layers))
        found: list[Agreement] = []
        first: Values | None = None
        for name, halves in alone.metrics.items():
            values = _levels(halves.mean(0))
            tau = kendall(values, truth, weights)
            gain = None if first is None else _known(tau - first)
            first = tau if first is None else first
            rho = _known(spearman(values, truth, weights))
            found.append(Agreement(name, _known(tau), rho, gain, _between_halves(halves)))
        return [*found, Agreement("perplexity", None, None, None, _between_halves(alone.perplexity))]

    def to_json(self, path: str | os.PathLike[str] | None = None) -> str:
        """Return the study as JSON text; write it atomically to ``path`` if given."""
        specs = {
            spec: {
                "layers": list(alone.layers),
                "metrics": {name: values.tolist() for name, values in alone.metrics.items()},
                "perplexity": alone.perplexity.tolist(),
            }
            for spec, alone in self.specs.items()
        }
        return signed_json.write({"schema": SCHEMA, "specs": specs, "provenance": dict(self.provenance)}, path)

    @classmethod
    def from_json(cls, source: str | os.PathLike[str]) -> Study:
        """Read a file or text that ``to_json`` wrote.

        Raises:
            CheckpointError: no such file, or it is truncated, altered or not a study.
        """
        found, origin = signed_json.read(source, "a study", _REMEDY)
        data: dict[str, Any] = found if isinstance(found, dict) else {}
        if data.get("schema") != SCHEMA:
            raise CheckpointError(f"{origin} is not a study (its schema is not {SCHEMA!r}); give one of klfast study")
        with signed_json.parsed(origin, _REMEDY):
            specs = {spec: _alone(alone) for spec, alone in data["specs"].items()}
            return cls(specs, dict(is_a(dict, data["provenance"], "provenance")))


def _known(statistics: Values) -> Estimate | None:
    """Return the estimate of a correlation; None if it is NaN."""
    return None if np.isnan(statistics[0]) else estimate(statistics)


def _between_halves(values: Values) -> float | None:
    if len(values) != 2:
        return None
    tau = _known(kendall(_levels(values[0]), _levels(values[1]), np.ones((1, values.shape[1]))))
    return None if tau is None else tau.value


def _levels(values: Values) -> Values:
    """Return numbers in the order of float64 [n], the same for neighbours that differ by rounding alone.

    Two layers that change as many predictions tie, however the shares of both halves were summed and, in files of
    klfast 0.1.0, rounded to seven digits.
    """
    order = values.argsort()
    ascending = values[order]
    is_next = ~np.isclose(ascending[1:], ascending[:-1], rtol=_TIE, atol=0)
    levels = np.zeros(len(values))
    levels[order[1:]] = is_next.cumsum()
    return levels


def _alone(data: Mapping[str, Any]) -> Alone:
    layers = tuple(is_a(str, name, "a layer") for name in data["layers"])

    def matrix(values: Any) -> Values:
        made = np.array(values, np.float64)
        if made.ndim != 2 or made.shape[1] != len(layers):
            raise ValueError(f"it has {list(made.shape)} figures for {len(layers)} layers")
        return made

    return Alone(layers, {name: matrix(values) for name, values in data["metrics"].items()}, matrix(data["perplexity"]))
