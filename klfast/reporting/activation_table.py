"""Table of what int8 activations cost, beside the rounding of the weights."""

from __future__ import annotations

import math
from collections.abc import Sequence

from klfast.planning.activation import takes_int8
from klfast.quant.spec import QuantSpec
from klfast.reporting.grouping import by_spec, kind
from klfast.reporting.table import Cell, Table
from klfast.sensitivity.results import METRICS, Measurement, Sensitivities

_KL = METRICS[0]
_Pair = tuple[Measurement, Measurement]  # of a layer's weight and of its input


def activation_costs(sensitivities: Sensitivities) -> Table:
    """Return means by kind of layer and spec, and how many layers ``activation="auto"`` lets round their input.

    There are no rows unless the sweep measured activations.
    """
    pairs: dict[str, dict[QuantSpec, list[_Pair]]] = {}
    for spec, weights in by_spec(sensitivities).items():
        for name, weight in weights.items():
            inputs = sensitivities.int8_activations(name, spec)
            if inputs is not None:
                pairs.setdefault(kind(name), {}).setdefault(spec, []).append((weight, inputs))
    rows = tuple(_row(label, spec, some) for label, specs in pairs.items() for spec, some in specs.items())
    headings = ("kind", "spec", "KL of weights", "of int8 activations", "ratio", "layers that take int8", "of")
    return Table("Int8 activations: mean KL by kind of layer", headings, rows)


def _row(label: str, spec: QuantSpec, pairs: Sequence[_Pair]) -> tuple[Cell, ...]:
    weights, inputs = (math.fsum(pair[part].mean[_KL] for pair in pairs) / len(pairs) for part in (0, 1))
    ratio = inputs / weights if weights else math.nan
    return label, str(spec), weights, inputs, ratio, sum(takes_int8(*pair) for pair in pairs), len(pairs)
