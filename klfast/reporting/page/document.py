"""The whole page: sections one after another, with the style sheet inside."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from klfast import __version__
from klfast.core.bundled import ASSETS
from klfast.evaluation.comparison import KLD, Comparison
from klfast.evaluation.front import Front
from klfast.planning.plan_file import Plan
from klfast.reporting.grouping import settle_metric
from klfast.reporting.page.axis import number
from klfast.reporting.page.front import front, measured_section, points
from klfast.reporting.page.markup import Markup, joined, tag
from klfast.reporting.page.matching import cards_of
from klfast.reporting.page.sections import card_section, cost, plan_section, ranking, sensitivity_maps
from klfast.sensitivity.coverage import measured_note, unfinished_note
from klfast.sensitivity.results import Sensitivities

_T = TypeVar("_T")
_PREDICTED = {
    "bytes": ("size of plan", lambda value: f"{value / 1e6:.2f} MB"),
    "mean_bits": ("bits a weight", lambda value: f"{value:.2f}"),
    "kl": ("KL predicted", number),
}
_POLICY = "default-src 'none'; style-src 'unsafe-inline'"  # so that a browser would refuse any request


def html_page(
    sensitivities: Sensitivities,
    plans: Sequence[Plan] = (),
    comparisons: Sequence[Comparison] = (),
    fronts: Sequence[Front] = (),
    metric: str | None = None,
    top: int = 10,
) -> str:
    """Return a page on a sweep, the plans made of it, measured fronts, and comparisons of the models made by them.

    Raises:
        InvalidInputError: nothing was measured, or not this metric.
        ModelMismatchError: a plan was made for another model.
    """
    metric = settle_metric(sensitivities, metric)
    cards = [cards_of(plan, comparisons, sensitivities.layers) for plan in plans]
    shown = cards[0] if len(plans) == 1 else () if plans else comparisons
    sections = [
        sensitivity_maps(sensitivities, metric),
        ranking(sensitivities, metric, top),
        front(points(sensitivities, list(zip(plans, cards, strict=True)))),
        *(measured_section(one, index) for index, one in _numbered(fronts)),
        *(plan_section(one, sensitivities, metric, index) for index, one in _numbered(plans)),
        *(card_section(one, index) for index, one in _numbered(comparisons)),
        cost(sensitivities),
    ]
    name = str(sensitivities.provenance.get("model", "a model"))
    notes = filter(None, (unfinished_note(sensitivities), measured_note(sensitivities)))
    body = [
        tag("a", "Skip to the content", href="#content", class_="skip"),
        tag("header", tag("h1", f"klfast: {name}"), _themes()),
        tag(
            "main",
            *(tag("p", note, class_="note") for note in notes),
            _facts(sensitivities, plans, shown),
            *sections,
            id="content",
        ),
        tag("footer", f"Made by klfast {__version__}. KL in nats a token, of the full-precision model's predictions."),
    ]
    head = [
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("title", f"klfast report: {name}"),
        tag("style", Markup((ASSETS / "report" / "style.css").read_text(encoding="utf-8"))),
    ]
    return f"<!doctype html>\n{tag('html', tag('head', *head), tag('body', *body), lang='en')}\n"


def _numbered(some: Sequence[_T]) -> list[tuple[int | None, _T]]:
    """Return the items with their numbers, None for an only one."""
    return [(index if len(some) > 1 else None, one) for index, one in enumerate(some, 1)]


def _themes() -> Markup:
    """Return the choice of colours, which the style sheet alone follows."""
    choices = [
        tag("label", tag("input", type="radio", name="theme", id=f"theme-{theme}", checked=theme == "auto"), theme)
        for theme in ("auto", "light", "dark")
    ]
    return tag("fieldset", tag("legend", "Colours", class_="unseen"), *choices, class_="choice")


def _facts(sensitivities: Sensitivities, plans: Sequence[Plan], cards: Sequence[Comparison]) -> Markup:
    """Return the few figures that matter most; a measured KL if there is one card."""
    found: list[tuple[str, str]] = [
        ("layers", f"{len(sensitivities.layers)}"),
        ("measurements", f"{len(sensitivities.measurements)}"),
        ("full precision", f"{_megabytes(sensitivities):.2f} MB"),
    ]
    if len(plans) == 1:
        predicted = plans[0].predicted
        found += [(what, show(predicted[key])) for key, (what, show) in _PREDICTED.items() if key in predicted]
    if len(cards) == 1:
        found.append(("KL measured", number(cards[0].figures[KLD].value)))
    return tag("dl", joined(tag("div", tag("dt", what), tag("dd", value)) for what, value in found), class_="facts")


def _megabytes(sensitivities: Sensitivities) -> float:
    return (sensitivities.other_bytes + sum(info.float_bytes for info in sensitivities.layers.values())) / 1e6
