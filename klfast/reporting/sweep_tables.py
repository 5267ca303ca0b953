"""What a sweep says, as tables."""

from __future__ import annotations

import math

from klfast.quant.spec import QuantSpec
from klfast.reporting.grouping import BETTER_HIGH, by_spec, depth, harm, kind, settle_metric
from klfast.reporting.table import Cell, Table
from klfast.sensitivity.coverage import unfinished_note
from klfast.sensitivity.results import METRICS, Sensitivities


def sweep_tables(sensitivities: Sensitivities, metric: str | None = None, top: int = 10) -> list[Table]:
    """What a sweep found, in tables: the most sensitive layers of each spec, means by kind of layer, by depth and by both, means
    by use of a layer's rows if the sweep measured them, and how well the other metrics agree on the ranking. The first table
    says so if the sweep is unfinished.

    Args:
        metric: one that every candidate has; KL(teacher || student) by default, or what was measured instead.
        top: layers to list for each spec.

    Raises:
        InvalidInputError: nothing measured, or not this metric.
    """
    metric = settle_metric(sensitivities, metric)
    note = unfinished_note(sensitivities)
    tables = [Table("Unfinished sweep", ("note",), ((note,),) if note else ())]
    tables += [ranking(sensitivities, metric, top), by_kind(sensitivities, metric), by_depth(sensitivities, metric)]
    tables += [by_kind_and_depth(sensitivities, metric, spec) for spec in by_spec(sensitivities)]
    return [table for table in [*tables, by_use(sensitivities, metric), agreement(sensitivities, metric)] if table.rows]


def ranking(sensitivities: Sensitivities, metric: str, top: int) -> Table:
    """The ``top`` most sensitive layers of each spec, the worst first, with the standard error of the mean."""
    rows = []
    for spec, found in by_spec(sensitivities).items():
        worst = sorted(found.items(), key=lambda item: harm(metric, item[1]), reverse=True)[:top]
        rows += [
            (str(spec), name, m.mean[metric], m.stderr.get(metric, math.nan), "below" if m.below_noise else "")
            for name, m in worst
        ]
    return Table("Most sensitive layers", ("spec", "layer", metric, "standard error", "noise floor"), tuple(rows))


def by_kind(sensitivities: Sensitivities, metric: str) -> Table:
    """Means over the layers of one kind (the last part of the name: in_proj, x_proj ...), a column a spec."""
    return _means(sensitivities, metric, "By kind of layer", "kind", kind)


def by_depth(sensitivities: Sensitivities, metric: str) -> Table:
    """Means over the layers of one block, a column a spec."""
    return _means(sensitivities, metric, "By depth", "block", depth)


def by_use(sensitivities: Sensitivities, metric: str) -> Table:
    """Means over all layers of one kind in which only the rows of one use were quantized, a column a spec."""
    found = {key: m.mean[metric] for key, m in sensitivities.rows.items() if metric in m.mean}
    specs = sorted({spec for *_, spec in found})
    rows = []
    for label in dict.fromkeys((kind(name), use) for name, use, _ in found):
        groups = [
            [value for (name, use, s), value in found.items() if (kind(name), use) == label and s == spec]
            for spec in specs
        ]
        rows.append((*label, *(math.fsum(group) / len(group) if group else None for group in groups)))
    return Table(f"By use of a layer's rows: mean {metric}", ("kind", "rows", *map(str, specs)), tuple(rows))


def by_kind_and_depth(sensitivities: Sensitivities, metric: str, spec: QuantSpec, parts: int = 3) -> Table:
    """Means of one spec over the layers of one kind: a column for each run of blocks (``parts`` of about equal length) and
    one for all, a row a kind of layer within the blocks, the most sensitive first, and one for all kinds.
    """
    found = {name: m for name, m in by_spec(sensitivities).get(spec, {}).items() if depth(name) is not None}
    blocks = sorted({depth(name) for name in found})
    ends = [round(len(blocks) * part / parts) for part in range(parts + 1)]
    runs = [blocks[first:end] for first, end in zip(ends, ends[1:], strict=False) if first < end]

    def row(label: str, names: list[str]) -> tuple[Cell, ...]:
        groups = [*([name for name in names if depth(name) in run] for run in runs), names]
        return (
            label,
            *(
                math.fsum(found[name].mean[metric] for name in group) / len(group) if group else None
                for group in groups
            ),
        )

    rows = [row(label, [name for name in found if kind(name) == label]) for label in dict.fromkeys(map(kind, found))]
    rows.sort(key=lambda cells: cells[-1], reverse=metric not in BETTER_HIGH)
    if rows:
        rows.append(row("all kinds", list(found)))
    headings = [f"block {run[0]}" if len(run) == 1 else f"blocks {run[0]}-{run[-1]}" for run in runs]
    return Table(f"By kind and depth in {spec}: mean {metric}", ("kind", *headings, "all blocks"), tuple(rows))


def agreement(sensitivities: Sensitivities, metric: str) -> Table:
    """Kendall's tau between ``metric`` and each other, per spec, over the layers but the head (which is an outlier).

    Signs are such that 1 means the same order of harm. Published files add the measured perplexity.
    """
    from scipy.stats import kendalltau

    rows, others = [], [m for m in METRICS if m != metric]
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


def _means(sensitivities: Sensitivities, metric: str, title: str, heading: str, key) -> Table:
    found = by_spec(sensitivities)
    keys = [k for k in dict.fromkeys(map(key, sensitivities.layers)) if k is not None]
    rows = []
    for k in keys:
        groups = [
            [m.mean[metric] for name, m in measurements.items() if key(name) == k] for measurements in found.values()
        ]
        if any(groups):
            rows.append((str(k), *(math.fsum(group) / len(group) if group else None for group in groups)))
    return Table(f"{title}: mean {metric}", (heading, *map(str, found)), tuple(rows))
