"""Plot of a sweep: sensitivity over depth."""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from klfast.core.io import require_suffix, write_atomic
from klfast.reporting.grouping import BETTER_HIGH, by_spec, depth, kind, settle_metric
from klfast.sensitivity.results import Sensitivities

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PLOT_SUFFIXES = (".png", ".svg", ".pdf")


def plot(sensitivities: Sensitivities, path: str | os.PathLike[str], metric: str | None = None) -> None:
    """Draw the metric of every layer over depth into a .png, .svg or .pdf file: a panel per spec, a colour per kind.

    Raises:
        ImportError: matplotlib is not installed: ``pip install klfast[plot]``.
        InvalidInputError: nothing was measured, or not this metric, or the file has another suffix.
    """
    metric = settle_metric(sensitivities, metric)
    write(path, lambda: figure(sensitivities, metric))


def write(path: str | os.PathLike[str], draw: Callable[[], Figure]) -> None:
    """Write the figure that ``draw`` returns to a file; raise as ``require_plot``."""
    require_plot(path)
    image = io.BytesIO()
    draw().savefig(image, format=Path(path).suffix[1:], dpi=150)
    write_atomic(path, image.getvalue())


def require_plot(path: str | os.PathLike[str]) -> None:
    """Raise unless a plot can be written to a file of that name.

    Raises:
        ImportError: matplotlib is not installed: ``pip install klfast[plot]``.
        InvalidInputError: its suffix is not .png, .svg or .pdf.
    """
    require_suffix(path, "a plot", PLOT_SUFFIXES)
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install klfast[plot]") from error


def figure(sensitivities: Sensitivities, metric: str) -> Figure:
    """Return the figure of ``plot``, with its legend beside the panels."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    found = by_spec(sensitivities)
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
        for name in measurements.keys() - blocks.keys():  # a horizontal line
            axes.axhline(measurements[name].mean[metric], label=kind(name), color="gray", linestyle=":")
        axes.set(title=str(spec), xlabel="block", yscale="linear" if metric in (*BETTER_HIGH, "delta_ce") else "log")
    figure.axes[0].set_ylabel(metric)
    labelled = {
        label: line for axes in figure.axes for line, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(labelled.values(), labelled.keys(), loc="outside right upper", fontsize="small")
    return figure
