"""The rule of ``activation="auto"``: where rounding a layer's input to int8 costs next to nothing."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from klfast.core.errors import InvalidInputError
from klfast.quant.spec import QuantSpec
from klfast.sensitivity.coverage import broken_candidates
from klfast.sensitivity.results import Measurement, Sensitivities

CHOICES = ("exact", "auto")
_SHARE = 0.1
_DECIBELS = 10 / math.log(10)  # in a factor of e


def takes_int8(weight: Measurement, inputs: Measurement, kl: str = "kl_teacher_student") -> bool:
    """Return True if rounding a layer's input costs less than a tenth of what rounding its weight does."""
    return inputs.mean[kl] < _SHARE * weight.mean[kl]


def with_int8(
    sensitivities: Sensitivities, weights: Mapping[tuple[str, QuantSpec], Measurement], kl: str, metric: str
) -> dict[tuple[str, QuantSpec], Measurement]:
    """Return the candidates that take int8 activations, with the cost of both roundings together, as if additive.

    Layers whose int8 activations make a NaN or an infinity, which the sweep names, do not.

    Args:
        sensitivities: of a sweep with ``activations=True``.
        weights: all candidates, with the measurements of their rounded weights.
        kl: the KL that decides, by its name in METRICS.
        metric: another metric that the plan needs.

    Raises:
        InvalidInputError: int8 activations were not measured for a candidate, or not by these metrics.
    """
    found, missing = {}, []
    broken = broken_candidates(sensitivities.provenance)
    for (name, spec), weight in weights.items():
        inputs = sensitivities.int8_activations(name, spec)
        if inputs is None and f"{name} with int8 activations" in broken:
            continue
        if inputs is None or not {kl, metric} <= inputs.mean.keys() & weight.mean.keys():
            missing.append(f"{name} in the groups of {spec}")
        elif takes_int8(weight, inputs, kl):
            found[name, spec] = replace(weight, mean=_together(weight.mean, inputs.mean))
    if missing:
        what = " and ".join(dict.fromkeys((kl, metric)))
        more = f" and {len(missing) - 1} more" if missing[1:] else ""
        raise InvalidInputError(
            f'activation="auto" needs {what} of int8 activations, which was not measured for {missing[0]}{more}; '
            "sweep with activations=True (--activations)"
        )
    return found


def _together(a: Mapping[str, float], b: Mapping[str, float]) -> dict[str, float]:
    """Return the metrics of two independent small errors at once: noise powers and divergences add up."""
    found = {metric: a[metric] + b[metric] for metric in a if metric in b}
    if "sqnr_db" in found:
        found["sqnr_db"] = -_DECIBELS * float(np.logaddexp(-a["sqnr_db"] / _DECIBELS, -b["sqnr_db"] / _DECIBELS))
    if "top1_agree" in found:
        found["top1_agree"] -= 1.0
    return found
