"""A table of figures with their intervals drawn beside them, on one axis."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from klfast.evaluation.windowed import Estimate
from klfast.reporting.page.axis import Axis, number
from klfast.reporting.page.markup import Markup, tag, wide


@dataclass(frozen=True)
class Row:
    """A labelled figure; ``title`` is its full name."""

    label: str
    figure: Estimate
    title: str | None = None


def interval_table(caption: str, heading: str, rows: Sequence[Row]) -> Markup:
    """Return the table; its last column draws a dot at each figure and a bar over its interval."""
    axis = _axis([row.figure for row in rows])
    ticks = [tag("span", number(tick), style=f"left:{axis.share(tick):.2%}") for tick in axis.ticks()]
    head = tag(
        "tr",
        tag("th", heading, scope="col"),
        tag("th", "value", scope="col", class_="number"),
        tag("th", "95 % interval", scope="col", class_="number"),
        tag(
            "th",
            tag("span", "drawn", class_="unseen"),
            tag("div", *ticks, class_="ticks", aria_hidden="true"),
            scope="col",
        ),
    )
    body = [_row(row, axis) for row in rows]
    return wide(caption, tag("table", tag("caption", caption), tag("thead", head), tag("tbody", *body), class_="drawn"))


def _axis(figures: Sequence[Estimate]) -> Axis:
    """Return an axis that holds figures and intervals; on a logarithmic one, those that reach 0 start at its end."""
    held = [(one.value, one.high, one.low) for one in figures]
    drawn = [value for one in held for value in one if value and (value > 0 or one[0] <= 0)]
    axis = Axis.of(drawn)
    return axis if axis.is_logarithmic else Axis.of(value for one in held for value in one)


def _row(row: Row, axis: Axis) -> Markup:
    figure = row.figure
    interval, bar = "none", None
    if figure.low is not None and figure.high is not None:
        interval = f"{number(figure.low)} to {number(figure.high)}"
        low, high = axis.share(figure.low), axis.share(figure.high)
        bar = tag("span", class_="bar", style=f"left:{low:.2%};width:{high - low:.2%}")
    dot = tag("span", class_="dot", style=f"left:{axis.share(figure.value):.2%}")
    return tag(
        "tr",
        tag("th", row.label, scope="row", title=row.title),
        tag("td", number(figure.value), class_="number"),
        tag("td", interval, class_="number"),
        tag("td", tag("div", bar, dot, class_="track", aria_hidden="true")),
    )
