"""The Pareto front of plans, bytes against KL, as a drawing and as a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from klfast.evaluation.comparison import KLD, Comparison
from klfast.evaluation.front import Front
from klfast.planning.front import front_plans, uniform_plans
from klfast.planning.plan_file import Plan
from klfast.planning.problem import KL_METRICS
from klfast.reporting.front_tables import front_table
from klfast.reporting.page.axis import Axis, number
from klfast.reporting.page.markup import Markup, joined, numbers, section, tag
from klfast.reporting.table import Table
from klfast.sensitivity.results import Sensitivities

_KINDS = {"planned": "best plan of its size", "uniform": "one precision for all"}
_WIDTH, _HEIGHT = 640, 380
_LEFT, _RIGHT, _TOP, _BOTTOM = 84, 24, 40, 52


@dataclass(frozen=True)
class Point:
    """A model of some size and KL; ``kind`` is "planned", "uniform", "plan" or "measured"."""

    kind: str
    label: str
    megabytes: float
    kl: float


def points(sensitivities: Sensitivities, plans: Sequence[tuple[Plan, Sequence[Comparison]]]) -> list[Point]:
    """Return plans of about twenty sizes, uniform ones of each spec, and those given; nothing if no KL was swept.

    Args:
        sensitivities: of a sweep.
        plans: to be marked among the others, each with the comparisons of its model.
    """
    measurements = sensitivities.measurements.values()
    if not any(all(name in m.mean for m in measurements) for name in KL_METRICS):
        return []
    found = []
    for made in front_plans(sensitivities):
        found += _point("planned", f"planned, {made.predicted['mean_bits']:.2f} bits a weight", made)
    for spec, made in uniform_plans(sensitivities).items():
        found += _point("uniform", f"uniform {spec}", made)
    for index, (plan, cards) in enumerate(plans, 1):
        label = "the plan" if len(plans) == 1 else f"plan {index}"
        if own := _point("plan", label, plan):
            measured = (one.figures[KLD].value for one in cards)
            found += [*own, *(Point("measured", f"{label}, measured", own[0].megabytes, kl) for kl in measured)]
    return list(dict.fromkeys(found))


def front(found: Sequence[Point]) -> Markup | None:
    """Return the section, None without points."""
    if not found:
        return None
    table = Table(
        "Size and KL", ("model", "MB", "KL, nats a token"), tuple((p.label, p.megabytes, p.kl) for p in found)
    )
    kinds = {**_KINDS, "plan": "the plan given", "measured": "the same, measured as a whole"}
    note = "KL predicted as the sum over the layers, unless measured. Lower left is better."
    return _section("Size against KL", "front", found, kinds, note, table)


def measured_section(front: Front, index: int | None) -> Markup:
    """Return the section of a measured front."""
    found = [
        Point(point.kind, point.label, point.nbytes / 1e6, point.kl)
        for point in front.points
        if point.kl > 0  # which full precision's, 0, is not
    ]
    suffix = "" if index is None else f" {index}"
    of = [str(front.provenance[name]) for name in ("machine", "tier", "dtype") if name in front.provenance]
    note = f"KL of whole models, measured on {front.provenance.get('tokens', 'some')} tokens. Lower left is better."
    note += f" Tokens per second: {', '.join(of)}." if of else ""
    table = front_table(front)
    title, identity = f"Measured plans{suffix}", f"measured{suffix.strip()}"
    return _section(title, identity, found, _KINDS, note, table)


def _section(
    title: str, identity: str, found: Sequence[Point], kinds: Mapping[str, str], note: str, table: Table
) -> Markup:
    """Return a section with a drawing of points, its legend and a table."""
    legend = [
        tag("li", tag("svg", _mark(kind, 8, 8), viewBox="0 0 16 16", aria_hidden="true"), label)
        for kind, label in kinds.items()
        if any(point.kind == kind for point in found)
    ]
    return section(
        title,
        identity,
        tag("figure", _drawing(found), tag("figcaption", note), tag("ul", *legend, class_="legend")),
        numbers("The points as a table", table),
    )


def _point(kind: str, label: str, plan: Plan) -> list[Point]:
    predicted = plan.predicted
    known = "bytes" in predicted and predicted.get("kl", 0.0) > 0
    return [Point(kind, label, predicted["bytes"] / 1e6, predicted["kl"])] if known else []


def _drawing(found: Sequence[Point]) -> Markup:
    across = Axis.of((point.megabytes for point in found), linear=True)
    up = Axis.of(point.kl for point in found)

    def x(value: float) -> float:
        return round(_LEFT + across.share(value) * (_WIDTH - _LEFT - _RIGHT), 1)

    def y(value: float) -> float:
        return round(_HEIGHT - _BOTTOM - up.share(value) * (_HEIGHT - _TOP - _BOTTOM), 1)

    floor, ceiling, end = _HEIGHT - _BOTTOM, _TOP, _WIDTH - _RIGHT
    grid = []
    for tick in across.ticks():
        grid.append(tag("line", x1=x(tick), x2=x(tick), y1=floor, y2=ceiling, class_="grid"))
        grid.append(tag("text", number(tick), x=x(tick), y=floor + 20, text_anchor="middle"))
    for tick in up.ticks():
        grid.append(tag("line", x1=_LEFT, x2=end, y1=y(tick), y2=y(tick), class_="grid"))
        grid.append(tag("text", number(tick), x=_LEFT - 8, y=y(tick) + 5, text_anchor="end"))
    line = sorted({(point.megabytes, point.kl) for point in found if point.kind == "planned"})
    path = tag("polyline", points=" ".join(f"{x(a)},{y(b)}" for a, b in line), class_="line")
    marks = [
        tag("g", _mark(p.kind, x(p.megabytes), y(p.kl)), tag("title", f"{p.label}: {p.megabytes:.2f} MB, {p.kl:.3g}"))
        for p in found
    ]
    names = [
        tag("text", "MB", x=end, y=_HEIGHT - 8, text_anchor="end", class_="axis"),
        tag("text", "KL, nats a token", x=4, y=18, class_="axis"),
    ]
    title = f"Size against KL of {len(found)} models; the table below has the numbers"
    return tag(
        "svg", tag("title", title), joined([*grid, path, *marks, *names]), viewBox=f"0 0 {_WIDTH} {_HEIGHT}", role="img"
    )


def _mark(kind: str, x: float, y: float) -> Markup:
    """Return the mark of a kind of point, each of its own shape."""
    if kind == "planned":
        return tag("circle", cx=x, cy=y, r=4, class_="planned")
    if kind == "uniform":
        return tag("rect", x=x - 5, y=y - 5, width=10, height=10, class_="uniform")
    size = 8 if kind == "plan" else 7
    return tag("path", d=f"M{x} {y - size}L{x + size} {y}L{x} {y + size}L{x - size} {y}Z", class_=kind)
