"""The plan that puts one spec on every layer of a model, without a sweep."""

from __future__ import annotations

from torch import nn

from klfast.models.matrices import matrices
from klfast.models.selection import Patterns, select
from klfast.planning.plan_file import Plan
from klfast.quant.spec import QuantSpec, storable_spec


def plan_everywhere(
    model: nn.Module,
    spec: QuantSpec,
    layers: Patterns | None = None,
    exclude: Patterns | None = None,
    scale: str | None = None,
) -> Plan:
    """Return the plan with ``spec`` on all selected linear layers and stacks of experts, in groups that files can hold.

    ``klfast.models.selection.matching`` explains the patterns.

    Raises:
        UnknownLayerError: a pattern matches no layer.
    """
    found = matrices(model)
    specs = {name: storable_spec(spec, found[name].shape[1]) for name in select(found, layers, exclude)}
    return Plan(specs, "uniform", scale=scale)
