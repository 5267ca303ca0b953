"""The table of a measured front."""

from __future__ import annotations

from klfast.evaluation.front import Front
from klfast.reporting.table import Cell, Table


def front_table(front: Front) -> Table:
    """Return a table of the points by size; the last column marks those that none beats in both size and KL."""
    rows: list[tuple[Cell, ...]] = [
        (
            point.label,
            point.nbytes / 1e6,
            point.plan.predicted.get("kl"),
            point.kl,
            point.perplexity,
            point.tokens_per_second,
            "yes" if front.is_best(point) else "",
        )
        for point in front.points
    ]
    headings = ("model", "MB", "KL predicted", "KL measured", "perplexity", "tokens/s", "on the front")
    return Table("Measured plans", headings, tuple(rows))
