"""A table of cells by submodule and block: of sensitivities, or of a plan's precisions."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from klfast.reporting.grouping import depth, kind
from klfast.reporting.page.colors import DEPTH, HEAT, style
from klfast.reporting.page.markup import Markup, tag, wide

_OUTSIDE = "outside"


@dataclass(frozen=True)
class Square:
    """What a cell says and shows: its text, a longer one for the pointer, and its place on the ramp, 0 to 1."""

    text: str
    title: str
    share: float


def layer_map(
    caption: str, names: Iterable[str], square: Callable[[Sequence[str]], Square | None], *, is_plan: bool = False
) -> Markup:
    """Return a table with a row for each kind of layer and a column for each block.

    Args:
        caption: of the table.
        names: the layers.
        square: what the cell of some layers, of one kind in one block, shows; None for nothing.
        is_plan: use the colours of precisions, not of harm.
    """
    places: dict[tuple[str, int | None], list[str]] = {}
    for name in names:
        places.setdefault((kind(name), depth(name)), []).append(name)
    blocks = sorted({block for _, block in places if block is not None})
    columns: list[int | None] = [*([None] if any(block is None for _, block in places) else []), *blocks]
    squares = {place: found for place, some in places.items() if (found := square(some)) is not None}
    heads = [tag("th", _OUTSIDE if block is None else str(block), scope="col") for block in columns]
    rows = [
        tag("tr", tag("th", label, scope="row"), *(_cell(squares, label, block, is_plan) for block in columns))
        for label in dict.fromkeys(label for label, _ in places)
    ]
    head = tag("tr", tag("th", "block", scope="col"), *heads)
    table = tag("table", tag("caption", caption), tag("thead", head), tag("tbody", *rows), class_="map")
    return wide(caption, table)


def _cell(squares: Mapping[tuple[str, int | None], Square], label: str, block: int | None, is_plan: bool) -> Markup:
    found = squares.get((label, block))
    if found is None:
        return tag("td", class_="empty")
    return tag("td", found.text, title=found.title, style=style(found.share, DEPTH if is_plan else HEAT))
