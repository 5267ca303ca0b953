"""Tables of a comparison: the KL card, and KL by position and token frequency."""

from __future__ import annotations

from collections.abc import Sequence

from klfast.evaluation.comparison import KLD, Comparison, Part
from klfast.evaluation.windowed import Estimate
from klfast.reporting.table import Cell, Table

_LIMITS = ("95 % from", "to")


def comparison_tables(comparison: Comparison) -> list[Table]:
    """Return the KL card, then tables by position and by token frequency if the comparison has them."""
    card = Table(
        f"KL card, {comparison.tokens:,} tokens in {comparison.windows:,} windows",
        ("figure", "value", *_LIMITS),
        tuple((name, *_cells(one)) for name, one in comparison.figures.items()),
    )
    by_part = (
        ("KL by position", "tokens before", comparison.by_position),
        ("KL by token frequency", "occurrences in the text", comparison.by_frequency),
    )
    return [card, *(_by(title, heading, parts) for title, heading, parts in by_part if parts)]


def _by(title: str, heading: str, parts: Sequence[Part]) -> Table:
    others = [name for name in parts[0].figures if name != KLD]
    rows: list[tuple[Cell, ...]] = [
        (str(part), part.tokens, *_cells(part.figures[KLD]), *(part.figures[name].value for name in others))
        for part in parts
    ]
    return Table(title, (heading, "tokens", KLD, *_LIMITS, *others), tuple(rows))


def _cells(one: Estimate) -> tuple[Cell, ...]:
    return one.value, one.low, one.high
