"""HTML as text: elements, escaped, and tables."""

from __future__ import annotations

import html
from collections.abc import Iterable

from klfast.reporting.table import Table, shown


class Markup(str):
    """Text that is HTML already."""

    __slots__ = ()


Child = str | Markup | None
_VOID = ("meta", "input", "circle", "line", "path", "rect", "polyline")


def tag(element: str, /, *children: Child, **attributes: object) -> Markup:
    """Return an element; text is escaped, Markup is not.

    Underscores in the names of attributes are hyphens, one at the end is dropped (``class_``); a value of None or False
    leaves its attribute out, True gives it no value.
    """
    given = "".join(
        _attribute(key, value) for key, value in attributes.items() if value is not None and value is not False
    )
    if element in _VOID and not children:
        return Markup(f"<{element}{given}>" if element in ("meta", "input") else f"<{element}{given}/>")
    return Markup(f"<{element}{given}>{joined(children)}</{element}>")


def joined(children: Iterable[Child]) -> Markup:
    """Return children side by side."""
    return Markup(
        "".join(one if isinstance(one, Markup) else _escaped(one, quote=False) for one in children if one is not None)
    )


def _attribute(key: str, value: object) -> str:
    name = key.rstrip("_").replace("_", "-")
    return f" {name}" if value is True else f' {name}="{_escaped(str(value))}"'


def _escaped(text: str, *, quote: bool = True) -> str:
    """Return text as HTML; bytes of a file's name that are not UTF-8 appear as escapes."""
    return html.escape(text.encode("utf-8", "backslashreplace").decode("utf-8"), quote)


def section(title: str, identity: str, *children: Child) -> Markup:
    """Return a section with its heading."""
    return tag("section", tag("h2", title, id=identity), *children, aria_labelledby=identity)


def wide(label: str, *children: Child) -> Markup:
    """Return a box that scrolls sideways on narrow screens, by keyboard, too."""
    return tag("div", *children, class_="wide", tabindex=0, role="region", aria_label=label)


def data_table(table: Table) -> Markup:
    """Return a table as HTML, its first column as the rows' headings."""
    classes = ["number" if table.is_numeric(i) else None for i in range(len(table.headings))]
    head = [tag("th", text, scope="col", class_=kind) for text, kind in zip(table.headings, classes, strict=True)]
    rows = [
        tag(
            "tr",
            tag("th", shown(row[0]), scope="row"),
            *(tag("td", shown(cell), class_=kind) for cell, kind in zip(row[1:], classes[1:], strict=True)),
        )
        for row in table.rows
    ]
    return wide(
        table.title, tag("table", tag("caption", table.title), tag("thead", tag("tr", *head)), tag("tbody", *rows))
    )


def numbers(label: str, table: Table) -> Markup:
    """Return a table that opens on demand, for what a drawing shows."""
    return tag("details", tag("summary", label), data_table(table))
