"""Tables of a plan."""

from __future__ import annotations

from collections import Counter

from klfast.core.errors import ModelMismatchError
from klfast.planning.plan_file import Plan
from klfast.quant.spec import storable_spec
from klfast.reporting.grouping import kind, settle_metric
from klfast.reporting.table import Cell, Table
from klfast.sensitivity.results import Sensitivities

FULL, INT8 = "full precision", "int8 activations"
_PREDICTED = {
    "perplexity": "perplexity on the calibration text, if the layers' contributions are additive",
    "kl_measured": "kl of the whole plan, measured",
    "seconds": "seconds a token in products with matrices",
}


def plan_tables(plan: Plan, sensitivities: Sensitivities | None = None) -> list[Table]:
    """Return tables of a plan's predictions and notes, and of the number of layers by kind and precision.

    Without ``sensitivities`` the layers that keep full precision are unknown and not counted.
    """
    facts: list[tuple[Cell, ...]] = [
        ("method", plan.method),
        *((_PREDICTED.get(name, name), value) for name, value in plan.predicted.items()),
    ]
    facts += [("note", note) for note in plan.notes]
    names = plan.specs if sensitivities is None else sensitivities.layers
    counts = Counter((kind(name), str(plan.specs.get(name, FULL))) for name in names)
    counts.update((kind(name), INT8) for name, activation in plan.activations.items() if activation == "int8")
    columns = [*map(str, sorted(set(plan.specs.values()))), FULL, INT8]
    columns = [column for column in columns if any(counted == column for _, counted in counts)]
    kinds = dict.fromkeys(kind(name) for name in names)
    rows: tuple[tuple[Cell, ...], ...] = tuple((k, *(counts[k, column] for column in columns)) for k in kinds)
    return [Table("Plan", ("what", "value"), tuple(facts)), Table("Layers by precision", ("kind", *columns), rows)]


def plan_by_layer(plan: Plan, sensitivities: Sensitivities, metric: str | None = None) -> Table:
    """Return a table of every layer's precision, bytes in the saved model and measured ``metric``, in module order.

    The metric is empty for full precision and where it was not measured. A plan with activations has a column of them.

    Raises:
        InvalidInputError: no such metric was measured.
        ModelMismatchError: the plan was made for another model.
    """
    metric = settle_metric(sensitivities, metric)
    of_plan, swept = plan.fingerprint, sensitivities.fingerprint
    differ = of_plan is not None and swept is not None and not of_plan.matches(swept)
    if differ or not plan.specs.keys() <= sensitivities.layers.keys():
        raise ModelMismatchError(
            "the plan and the sensitivities are of different models; give those that the plan was made from"
        )
    means = {key: measurement.mean for key, measurement in sensitivities.measurements.items()}
    measured = {
        (name, storable_spec(spec, sensitivities.layers[name].shape[1])): mean for (name, spec), mean in means.items()
    }
    measured |= means  # of two specs stored as the same one, the one measured as stored counts
    rows: list[tuple[Cell, ...]] = []
    for name, info in sensitivities.layers.items():
        spec = plan.specs.get(name)
        if spec is None:
            rows.append((name, FULL, info.float_bytes, None))
        else:
            rows.append((name, str(spec), spec.saved_bytes(info.shape), measured.get((name, spec), {}).get(metric)))
    headings: tuple[str, ...] = ("layer", "precision", "bytes", metric)
    if plan.activations:
        headings = (*headings, "activations")
        rows = [(*row, plan.activations.get(name)) for row, name in zip(rows, sensitivities.layers, strict=True)]
    return Table("Precision by layer", headings, tuple(rows))
