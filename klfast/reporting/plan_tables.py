"""What a plan says, as tables."""

from __future__ import annotations

from collections import Counter

from klfast.core.errors import ModelMismatchError
from klfast.planning.plan_file import Plan
from klfast.quant.spec import storable_spec
from klfast.reporting.grouping import kind, settle_metric
from klfast.reporting.table import Cell, Table
from klfast.sensitivity.results import Sensitivities

FULL = "full precision"


_PREDICTED = {"perplexity": "perplexity on the calibration text, if what the layers add to it adds up"}


def plan_tables(plan: Plan, sensitivities: Sensitivities | None = None) -> list[Table]:
    """What a plan says: its predictions and notes, and how many layers of each kind have each precision.

    Without ``sensitivities`` the layers that keep full precision are not known, and not counted.
    """
    facts: list[tuple[Cell, ...]] = [
        ("method", plan.method),
        *((_PREDICTED.get(name, name), value) for name, value in plan.predicted.items()),
    ]
    facts += [("note", note) for note in plan.notes]
    names = plan.specs if sensitivities is None else sensitivities.layers
    counts = Counter((kind(name), str(plan.specs.get(name, FULL))) for name in names)
    specs = [str(spec) for spec in sorted(set(plan.specs.values()))] + [FULL]
    specs = [spec for spec in specs if any(s == spec for _, s in counts)]
    kinds = dict.fromkeys(kind(name) for name in names)
    rows = tuple((k, *(counts[k, spec] for spec in specs)) for k in kinds)
    return [Table("Plan", ("what", "value"), tuple(facts)), Table("Layers by precision", ("kind", *specs), rows)]


def plan_by_layer(plan: Plan, sensitivities: Sensitivities, metric: str | None = None) -> Table:
    """Every layer with its precision, the bytes that it takes in the saved model and the ``metric`` measured there, in module
    order; the metric is empty for full precision, and where it was not measured.

    Raises:
        InvalidInputError: no such metric was measured.
        ModelMismatchError: the plan was made for another model.
    """
    metric = settle_metric(sensitivities, metric)
    models = (plan.fingerprint, sensitivities.fingerprint)
    if (
        None not in models and not models[0].matches(models[1])
    ) or not plan.specs.keys() <= sensitivities.layers.keys():
        raise ModelMismatchError(
            "the plan and the sensitivities are of different models; give those that the plan was made from"
        )
    means = {key: measurement.mean for key, measurement in sensitivities.measurements.items()}
    measured = {
        (name, storable_spec(spec, sensitivities.layers[name].shape[1])): mean for (name, spec), mean in means.items()
    }
    measured |= means  # of two that are stored as the same spec, the one that was measured as stored
    rows = []
    for name, info in sensitivities.layers.items():
        spec = plan.specs.get(name)
        nbytes = info.float_bytes if spec is None else spec.saved_bytes(info.shape)
        rows.append((name, FULL if spec is None else str(spec), nbytes, measured.get((name, spec), {}).get(metric)))
    return Table("Precision by layer", ("layer", "precision", "bytes", metric), tuple(rows))
