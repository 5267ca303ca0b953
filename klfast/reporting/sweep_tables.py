"""Tables of a sweep."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

from klfast.quant.spec import QuantSpec
from klfast.reporting.activation_table import activation_costs
from klfast.reporting.grouping import BETTER_HIGH, by_spec, depth, harm, kind, settle_metric
from klfast.reporting.table import Cell, Table
from klfast.sensitivity.coverage import measured_note, unfinished_note
from klfast.sensitivity.results import METRICS, Sensitivities


def sweep_tables(sensitivities: Sensitivities, metric: str | None = None, top: int = 10) -> list[Table]:
    """Return the tables of a sweep; the first one tells if the sweep is unfinished.

    They hold the most sensitive layers of each spec, means by kind of layer, by depth and by both, means by role of a
    layer's rows and costs of int8 activations if the sweep measured them, and how well the other metrics agree on the
    ranking.

    Args:
        sensitivities: the sweep's result.
        metric: one that every candidate has; KL(teacher || student) by default, or the metric measured instead.
        top: layers to list for each spec.

    Raises:
        InvalidInputError: nothing was measured, or not this metric.
    """
    metric = settle_metric(sensitivities, metric)
    note = unfinished_note(sensitivities)
    tables = [Table("Unfinished sweep", ("note",), ((note,),) if note else ())]
    how = measured_note(sensitivities)
    tables.append(Table("How it was measured", ("note",), ((how,),) if how else ()))
    tables += [ranking(sensitivities, metric, top), by_kind(sensitivities, metric), by_depth(sensitivities, metric)]
    tables += [by_kind_and_depth(sensitivities, metric, spec) for spec in by_spec(sensitivities)]
    tables += [by_use(sensitivities, metric), activation_costs(sensitivities), agreement(sensitivities, metric)]
    return [table for table in tables if table.rows]


def ranking(sensitivities: Sensitivities, metric: str, top: int) -> Table:
    """Return the ``top`` most sensitive layers of each spec, worst first, with the standard error of the mean."""
    rows: list[tuple[Cell, ...]] = []
    for spec, found in by_spec(sensitivities).items():
        worst = sorted(found.items(), key=lambda item: harm(metric, item[1]), reverse=True)[:top]
        rows += [
            (str(spec), name, m.mean[metric], m.stderr.get(metric, math.nan), "below" if m.below_noise else "")
            for name, m in worst
        ]
    return Table("Most sensitive layers", ("spec", "layer", metric, "standard error", "noise floor"), tuple(rows))


def by_kind(sensitivities: Sensitivities, metric: str) -> Table:
    """Return means over the layers of each kind (the last part of the name: in_proj, x_proj ...), a column per spec."""
    return _means(sensitivities, metric, "By kind of layer", "kind", kind)


def by_depth(sensitivities: Sensitivities, metric: str) -> Table:
    """Return means over the layers of each block, a column per spec."""
    return _means(sensitivities, metric, "By depth", "block", depth)


def by_use(sensitivities: Sensitivities, metric: str) -> Table:
    """Return means over layers of which only the rows of one use were quantized: a row per kind and use."""
    found: dict[tuple[str, str], dict[QuantSpec, list[float]]] = {}
    for (name, use, spec), m in sensitivities.rows.items():
        if metric in m.mean:
            found.setdefault((kind(name), use), {}).setdefault(spec, []).append(m.mean[metric])
    specs = sorted({spec for groups in found.values() for spec in groups})
    rows: tuple[tuple[Cell, ...], ...] = tuple(
        (*label, *(_mean(groups.get(spec, ())) for spec in specs)) for label, groups in found.items()
    )
    return Table(f"By use of a layer's rows: mean {metric}", ("kind", "rows", *map(str, specs)), rows)


def by_kind_and_depth(sensitivities: Sensitivities, metric: str, spec: QuantSpec, parts: int = 3) -> Table:
    """Return means of one spec over the layers within the blocks, by kind and depth.

    A column for each of ``parts`` runs of blocks, of about equal length, and one for all; a row per kind, the most
    sensitive first, and one for all kinds.
    """
    places = {name: depth(name) for name in by_spec(sensitivities).get(spec, {})}
    block_of = {name: block for name, block in places.items() if block is not None}
    values = {name: sensitivities.measurements[name, spec].mean[metric] for name in block_of}
    blocks = sorted(set(block_of.values()))
    ends = [round(len(blocks) * part / parts) for part in range(parts + 1)]
    runs = [blocks[first:end] for first, end in pairwise(ends) if first < end]

    def row(label: str, names: Sequence[str]) -> tuple[Cell, ...]:
        groups = [*([name for name in names if block_of[name] in run] for run in runs), names]
        return (label, *(_mean([values[name] for name in group]) for group in groups))

    kinds: dict[str, list[str]] = {}
    for name in block_of:
        kinds.setdefault(kind(name), []).append(name)
    means = {label: math.fsum(values[name] for name in names) / len(names) for label, names in kinds.items()}
    rows = [
        row(label, kinds[label]) for label in sorted(kinds, key=means.__getitem__, reverse=metric not in BETTER_HIGH)
    ]
    if rows:
        rows.append(row("all kinds", list(block_of)))
    headings = [f"block {run[0]}" if len(run) == 1 else f"blocks {run[0]}-{run[-1]}" for run in runs]
    return Table(f"By kind and depth in {spec}: mean {metric}", ("kind", *headings, "all blocks"), tuple(rows))


def agreement(sensitivities: Sensitivities, metric: str) -> Table:
    """Return Kendall's tau between ``metric`` and the others, per spec, over all layers except the head, an outlier.

    Signs are such that 1 means the same order of harm. Published files add the measured perplexity.
    """
    from scipy.stats import kendalltau

    rows: list[tuple[Cell, ...]] = []
    others = [m for m in METRICS if m != metric]
    for spec, found in by_spec(sensitivities).items():
        blocks = {name: m for name, m in found.items() if depth(name) is not None}
        columns = {other: {name: harm(other, m) for name, m in blocks.items() if other in m.mean} for other in others}
        perplexity = sensitivities.provenance.get("perplexity")
        if isinstance(perplexity, dict):
            columns["perplexity"] = perplexity.get(str(spec), {})
        for other, values in columns.items():
            names = [name for name in blocks if name in values]
            if len(names) > 1:
                tau = kendalltau(
                    [harm(metric, blocks[name]) for name in names], [values[name] for name in names]
                ).statistic
                rows.append((str(spec), other, float(tau), len(names)))
    return Table(f"Kendall's tau with {metric}", ("spec", "metric", "tau", "layers"), tuple(rows))


def _means(
    sensitivities: Sensitivities, metric: str, title: str, heading: str, key: Callable[[str], str | int | None]
) -> Table:
    found = by_spec(sensitivities)
    groups: dict[str | int, dict[QuantSpec, list[float]]] = {}
    for name in sensitivities.layers:
        if (of := key(name)) is not None:
            values = groups.setdefault(of, {})
            for spec, measurements in found.items():
                if name in measurements:
                    values.setdefault(spec, []).append(measurements[name].mean[metric])
    rows: tuple[tuple[Cell, ...], ...] = tuple(
        (str(of), *(_mean(values.get(spec, ())) for spec in found)) for of, values in groups.items() if values
    )
    return Table(f"{title}: mean {metric}", (heading, *map(str, found)), rows)


def _mean(values: Sequence[float]) -> float | None:
    return math.fsum(values) / len(values) if values else None
