"""What a sweep or a plan says, as tables: plain data, Markdown, JSON, or rich for a terminal; and one plot."""

from __future__ import annotations

import io
import json
import math
import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from klfast.core.errors import InvalidInputError, ModelMismatchError
from klfast.core.io import write_atomic
from klfast.planning.plan_file import Plan
from klfast.quant.types import QuantSpec, storable_spec
from klfast.sensitivity.coverage import require_measurements, unfinished_note
from klfast.sensitivity.results import METRICS, Measurement, Sensitivities

if TYPE_CHECKING:
    import rich.table

FULL = "full precision"
_PREDICTED = {"perplexity": "perplexity on the calibration text, if what the layers add to it adds up"}
_BETTER_HIGH = ("sqnr_db", "top1_agree")

Cell = str | int | float | None


@dataclass(frozen=True)
class Table:
    """Rows of plain values under headings; None is an empty cell. Rendered, floats have four significant digits."""

    title: str
    headings: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]

    def data(self) -> dict[str, object]:
        """For JSON, which lacks NaN and infinity: those are None."""
        rows = [
            [None if isinstance(cell, float) and not math.isfinite(cell) else cell for cell in row] for row in self.rows
        ]
        return {"title": self.title, "headings": list(self.headings), "rows": rows}

    def markdown(self) -> str:
        aligned = ["---:" if self._is_numeric(i) else "---" for i in range(len(self.headings))]
        lines = [self.headings, aligned, *([_text(cell).replace("|", "\\|") for cell in row] for row in self.rows)]
        return f"### {self.title}\n\n" + "".join(f"| {' | '.join(line)} |\n" for line in lines)

    def rich(self) -> rich.table.Table:
        from rich.table import Table as RichTable
        from rich.text import Text

        table = RichTable(title=self.title, title_justify="left")
        for i, heading in enumerate(self.headings):
            table.add_column(heading, justify="right" if self._is_numeric(i) else "left")
        for row in self.rows:
            table.add_row(*(Text(_text(cell)) for cell in row))
        return table

    def _is_numeric(self, column: int) -> bool:
        return all(row[column] is None or isinstance(row[column], (int, float)) for row in self.rows)


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
    metric = _metric(sensitivities, metric)
    note = unfinished_note(sensitivities)
    tables = [Table("Unfinished sweep", ("note",), ((note,),) if note else ())]
    tables += [ranking(sensitivities, metric, top), by_kind(sensitivities, metric), by_depth(sensitivities, metric)]
    tables += [by_kind_and_depth(sensitivities, metric, spec) for spec in _by_spec(sensitivities)]
    return [table for table in [*tables, by_use(sensitivities, metric), agreement(sensitivities, metric)] if table.rows]


def ranking(sensitivities: Sensitivities, metric: str, top: int) -> Table:
    """The ``top`` most sensitive layers of each spec, the worst first, with the standard error of the mean."""
    rows = []
    for spec, found in _by_spec(sensitivities).items():
        worst = sorted(found.items(), key=lambda item: _harm(metric, item[1]), reverse=True)[:top]
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
    found = {name: m for name, m in _by_spec(sensitivities).get(spec, {}).items() if depth(name) is not None}
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
    rows.sort(key=lambda cells: cells[-1], reverse=metric not in _BETTER_HIGH)
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
    for spec, found in _by_spec(sensitivities).items():
        blocks = {name: m for name, m in found.items() if depth(name) is not None}
        columns = {other: {name: _harm(other, m) for name, m in blocks.items() if other in m.mean} for other in others}
        perplexity = sensitivities.provenance.get("perplexity")
        if isinstance(perplexity, dict):
            columns["perplexity"] = perplexity.get(str(spec), {})
        for other, values in columns.items():
            names = [name for name in blocks if name in values]
            if len(names) > 1:
                tau = kendalltau(
                    [_harm(metric, blocks[name]) for name in names], [values[name] for name in names]
                ).statistic
                rows.append((str(spec), other, float(tau), len(names)))
    return Table(f"Kendall's tau with {metric}", ("spec", "metric", "tau", "layers"), tuple(rows))


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
    metric = _metric(sensitivities, metric)
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


def write(path: str | os.PathLike[str], tables: Iterable[Table]) -> None:
    """Write tables as Markdown (.md) or JSON (.json), all of the file or nothing."""
    suffix = Path(path).suffix
    if suffix == ".md":
        write_atomic(path, "\n".join(table.markdown() for table in tables))
    elif suffix == ".json":
        write_atomic(path, json.dumps([table.data() for table in tables], indent=1, allow_nan=False) + "\n")
    else:
        raise InvalidInputError(
            f"a report is written as .md or .json, not {suffix or 'without a suffix'!r}; rename {path}"
        )


def plot(sensitivities: Sensitivities, path: str | os.PathLike[str], metric: str | None = None) -> None:
    """Draw the metric of every layer over depth, a panel a spec, a colour a kind, into a .png, .svg or .pdf file.

    Raises:
        ImportError: matplotlib is absent: ``pip install klfast[plot]``.
        InvalidInputError: nothing measured, not this metric, or another kind of file.
    """
    metric = _metric(sensitivities, metric)
    suffix = Path(path).suffix
    if suffix not in (".png", ".svg", ".pdf"):
        raise InvalidInputError(
            f"a plot is written as .png, .svg or .pdf, not {suffix or 'without a suffix'!r}; rename {path}"
        )
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install klfast[plot]") from error
    figure = _figure(sensitivities, metric)
    image = io.BytesIO()
    figure.savefig(image, format=suffix[1:], dpi=150)
    write_atomic(path, image.getvalue())


def _figure(sensitivities: Sensitivities, metric: str):
    """The matplotlib figure of ``plot``, its legend beside the panels."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    found = _by_spec(sensitivities)
    kinds = dict.fromkeys(
        kind(name) for measurements in found.values() for name in measurements if depth(name) is not None
    )
    colors = {name_kind: colormaps["tab10"](i % 10) for i, name_kind in enumerate(kinds)}
    figure = Figure(figsize=(5 * len(found) + 1.5, 3.5), layout="constrained")
    for axes, (spec, measurements) in zip(
        figure.subplots(1, len(found), sharey=True, squeeze=False)[0], found.items(), strict=True
    ):
        blocks = {name: m for name, m in measurements.items() if depth(name) is not None}
        for name_kind, color in colors.items():
            if points := [(depth(name), m.mean[metric]) for name, m in blocks.items() if kind(name) == name_kind]:
                axes.plot(*zip(*points, strict=True), marker=".", linewidth=1, label=name_kind, color=color)
        for name in measurements.keys() - blocks.keys():  # a line across
            axes.axhline(measurements[name].mean[metric], label=kind(name), color="gray", linestyle=":")
        axes.set(title=str(spec), xlabel="block", yscale="linear" if metric in (*_BETTER_HIGH, "delta_ce") else "log")
    figure.axes[0].set_ylabel(metric)
    labelled = {
        label: line for axes in figure.axes for line, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(labelled.values(), labelled.keys(), loc="outside right upper", fontsize="small")
    return figure


def kind(name: str) -> str:
    """What a layer is called within its block: "x_proj" of "backbone.layers.3.mixer.x_proj"."""
    return next((part for part in reversed(name.split(".")) if not part.isdigit()), name)


def depth(name: str) -> int | None:
    """The block that a layer lies in: 3 of "backbone.layers.3.mixer.x_proj"; None outside of blocks."""
    return next((int(part) for part in name.split(".") if part.isdigit()), None)


def _metric(sensitivities: Sensitivities, asked: str | None) -> str:
    require_measurements(sensitivities)
    held = [metric for metric in METRICS if all(metric in m.mean for m in sensitivities.measurements.values())]
    if asked is None and held:
        return held[0]
    if asked not in held:
        raise InvalidInputError(
            f"{asked} was not measured for every candidate; choose one of {', '.join(held) or 'none'}"
        )
    return asked


def _by_spec(sensitivities: Sensitivities) -> dict[QuantSpec, dict[str, Measurement]]:
    """Spec -> layer -> measurement; specs in order, layers in module order."""
    specs = sorted({spec for _, spec in sensitivities.measurements})
    found = sensitivities.measurements
    return {spec: {name: found[name, spec] for name in sensitivities.layers if (name, spec) in found} for spec in specs}


def _harm(metric: str, measurement: Measurement) -> float:
    """The metric with the sign that makes more worse."""
    return -measurement.mean[metric] if metric in _BETTER_HIGH else measurement.mean[metric]


def _means(sensitivities: Sensitivities, metric: str, title: str, heading: str, key) -> Table:
    found = _by_spec(sensitivities)
    keys = [k for k in dict.fromkeys(map(key, sensitivities.layers)) if k is not None]
    rows = []
    for k in keys:
        groups = [
            [m.mean[metric] for name, m in measurements.items() if key(name) == k] for measurements in found.values()
        ]
        if any(groups):
            rows.append((str(k), *(math.fsum(group) / len(group) if group else None for group in groups)))
    return Table(f"{title}: mean {metric}", (heading, *map(str, found)), tuple(rows))


def _text(cell: Cell) -> str:
    if cell is None:
        return ""
    if isinstance(cell, float):
        return "" if math.isnan(cell) else f"{cell:.4g}" if abs(cell) < 1e4 or math.isinf(cell) else f"{cell:,.0f}"
    return f"{cell:,}" if isinstance(cell, int) else cell
