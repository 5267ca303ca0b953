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
    axis = Axis.of(
        value for row in rows for value in (row.figure.value, row.figure.high, *_drawn_low(row.figure)) if value != 0
    )
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


def _drawn_low(figure: Estimate) -> tuple[float, ...]:
    """Return the interval's lower end if a logarithmic axis can show it."""
    return () if figure.low is None or figure.low <= 0 < figure.value else (figure.low,)


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
