"""Plot of a measured front: KL over size, and over speed."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from klfast.evaluation.front import Front
from klfast.reporting.plot import write

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MARKS = {"planned": "o", "uniform": "s"}  # full precision, whose KL is 0, has no place on a logarithmic axis


def plot_front(front: Front, path: str | os.PathLike[str]) -> None:
    """Draw a front into a .png, .svg or .pdf file.

    Raises:
        ImportError: matplotlib is not installed: ``pip install klfast[plot]``.
        InvalidInputError: the file has another suffix.
    """
    write(path, lambda: _figure(front))


def _figure(front: Front) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for kind, mark in _MARKS.items():
        points = [point for point in front.points if point.kind == kind and point.kl > 0]
        kl = [point.kl for point in points]
        style = {"marker": mark, "linestyle": "-" if kind == "planned" else "", "linewidth": 1}
        left.plot([point.nbytes / 1e6 for point in points], kl, label=kind, **style)
        right.plot([point.tokens_per_second for point in points], kl, label=kind, **style | {"linestyle": ""})
    left.set(xlabel="MB", ylabel="KL measured, nats a token", yscale="log")
    right.set(xlabel="tokens a second")
    left.legend()
    return figure
