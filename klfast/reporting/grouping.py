"""Layers and measurements by kind, depth and spec."""

from __future__ import annotations

from klfast.core.errors import InvalidInputError
from klfast.models.expert_names import stack_in
from klfast.quant.spec import QuantSpec
from klfast.sensitivity.coverage import require_measurements
from klfast.sensitivity.results import METRICS, Measurement, Sensitivities

BETTER_HIGH = ("sqnr_db", "top1_agree")


def kind(name: str) -> str:
    """Return a layer's name within its block: "x_proj" for "backbone.layers.3.mixer.x_proj".

    A stack of experts keeps "experts." before its own, since a dense or shared MLP may have a layer of that name; its
    experts, one by one, are of its kind.
    """
    parts = stack_in(name).split(".")
    if parts[-2:-1] == ["experts"]:
        return ".".join(parts[-2:])
    return next((part for part in reversed(parts) if not part.isdigit()), name)


def depth(name: str) -> int | None:
    """Return a layer's block: 3 for "backbone.layers.3.mixer.x_proj"; None outside the blocks."""
    return next((int(part) for part in name.split(".") if part.isdigit()), None)


def settle_metric(sensitivities: Sensitivities, asked: str | None) -> str:
    """Return the metric asked for, by default the first one that every candidate has.

    Raises:
        InvalidInputError: nothing was measured, or not this metric.
    """
    require_measurements(sensitivities)
    held = [metric for metric in METRICS if all(metric in m.mean for m in sensitivities.measurements.values())]
    if asked is None and held:
        return held[0]
    if asked is None or asked not in held:
        raise InvalidInputError(
            f"{asked} was not measured for every candidate; choose one of {', '.join(held) or 'none'}"
        )
    return asked


def by_spec(sensitivities: Sensitivities) -> dict[QuantSpec, dict[str, Measurement]]:
    """Return spec -> layer -> measurement; specs in order, layers in module order."""
    specs = sorted({spec for _, spec in sensitivities.measurements})
    found = sensitivities.measurements
    return {spec: {name: found[name, spec] for name in sensitivities.layers if (name, spec) in found} for spec in specs}


def harm(metric: str, measurement: Measurement) -> float:
    """Return the metric with the sign that makes larger values worse."""
    return -measurement.mean[metric] if metric in BETTER_HIGH else measurement.mean[metric]
