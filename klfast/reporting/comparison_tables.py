"""Tables of a comparison: the KL card, and KL by position and token frequency."""

from __future__ import annotations

from collections.abc import Sequence

from klfast.evaluation.comparison import KLD, Comparison, Part
from klfast.evaluation.windowed import Estimate
from klfast.reporting.table import Cell, Table

_LIMITS = ("95 % from", "to")


def comparison_tables(comparison: Comparison) -> list[Table]:
    """Return the KL card and, if the text is longer than one part, tables by position and by token frequency."""
    card = Table(
        f"KL card, {comparison.tokens:,} tokens in {comparison.windows:,} windows",
        ("figure", "value", *_LIMITS),
        tuple((name, *_cells(one)) for name, one in comparison.figures.items()),
    )
    return [
        card,
        _by("KL by position", "tokens before", comparison.by_position),
        _by("KL by token frequency", "occurrences in the text", comparison.by_frequency),
    ]


def _by(title: str, heading: str, parts: Sequence[Part]) -> Table:
    others = [name for name in parts[0].figures if name != KLD]
    rows: list[tuple[Cell, ...]] = [
        (str(part), part.tokens, *_cells(part.figures[KLD]), *(part.figures[name].value for name in others))
        for part in parts
    ]
    return Table(title, (heading, "tokens", KLD, *_LIMITS, *others), tuple(rows))


def _cells(one: Estimate) -> tuple[Cell, ...]:
    return one.value, one.low, one.high
