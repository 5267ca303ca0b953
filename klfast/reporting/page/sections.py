"""The page's sections: maps of sensitivity, ranking, plan, KL card, cost of the sweep."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from functools import partial
from statistics import fmean
from typing import Any

from klfast.core import signed_json
from klfast.evaluation.comparison import KLD, Comparison
from klfast.evaluation.windowed import Estimate, half_width
from klfast.models.expert_names import stack_in, stacked
from klfast.planning.plan_file import Plan
from klfast.quant.spec import QuantSpec
from klfast.reporting.comparison_tables import comparison_tables
from klfast.reporting.grouping import BETTER_HIGH, by_spec, depth, harm, kind
from klfast.reporting.page.axis import Axis, number
from klfast.reporting.page.intervals import Row, interval_table
from klfast.reporting.page.layer_map import Square, layer_map
from klfast.reporting.page.markup import Markup, data_table, numbers, section, tag
from klfast.reporting.plan_tables import FULL, plan_by_layer, plan_tables
from klfast.reporting.sweep_tables import by_kind
from klfast.reporting.table import Table
from klfast.sensitivity.coverage import tokens_of, windows_of
from klfast.sensitivity.results import Sensitivities

_FULL_BITS = 16
_BOUNDS = {  # of metrics that have any
    **dict.fromkeys(("kl_teacher_student", "kl_student_teacher", "mse"), (0.0, math.inf)),
    "jsd": (0.0, math.log(2)),
    "top1_agree": (0.0, 1.0),
}


def sensitivity_maps(sensitivities: Sensitivities, metric: str) -> Markup:
    """Return a map of each spec, of which one is shown at a time."""
    found = by_spec(sensitivities)
    axes = {spec: Axis.spanning(harm(metric, m) for m in some.values()) for spec, some in found.items()}
    factor, unit = (1000, "thousandths of a nat") if metric not in (*BETTER_HIGH, "mse") else (1, metric)

    def square(spec: QuantSpec, names: Sequence[str]) -> Square | None:
        held = [found[spec][name] for name in names if name in found[spec]]
        if not held:
            return None
        value = math.fsum(m.mean[metric] for m in held) / len(held)
        worst = math.fsum(harm(metric, m) for m in held) / len(held)
        return Square(
            number(factor * value), f"{', '.join(stacked(names))}: {metric} {value:.4g}", axes[spec].share(worst)
        )

    maps = [
        tag(
            "details",
            tag("summary", str(spec)),
            layer_map(f"{metric} in {spec}, {unit}", sensitivities.layers, partial(square, spec)),
            name="spec",  # so that one of them is open
            open=index == 0,
        )
        for index, spec in enumerate(found)
    ]
    said = "One layer at a time is quantized, all else is in full precision. The darker (on a dark page, the brighter) "
    return section(
        "What each layer suffers",
        "maps",
        tag("p", f"{said}a cell, the worse; each precision has its own scale."),
        *maps,
        numbers("Means by kind of layer", by_kind(sensitivities, metric)),
    )


def ranking(sensitivities: Sensitivities, metric: str, top: int) -> Markup:
    """Return the most sensitive layers of the coarsest spec, with intervals."""
    spec, measurements = next(iter(by_spec(sensitivities).items()))
    worst = sorted(measurements.items(), key=lambda item: harm(metric, item[1]), reverse=True)[:top]
    rows = []
    for name, m in worst:
        value, stderr = m.mean[metric], m.stderr.get(metric, math.nan)
        half = None if math.isnan(stderr) else half_width(stderr, windows_of(sensitivities, m))
        rows.append(Row(_short(name), _bounded(metric, value, half), name))
    return section(
        "Most sensitive layers", "ranking", interval_table(f"{metric} of one layer in {spec}", "layer", rows)
    )


def _bounded(metric: str, value: float, half: float | None) -> Estimate:
    """Return a metric with its interval, which ends where the metric does; no interval if ``half`` is None."""
    if half is None:
        return Estimate(value)
    least, most = _BOUNDS.get(metric, (-math.inf, math.inf))
    return Estimate(value, min(value, max(value - half, least)), max(value, min(value + half, most)))


def plan_section(plan: Plan, sensitivities: Sensitivities, metric: str, index: int | None) -> Markup:
    """Return a plan: a map of precisions, its predictions and a list of all layers."""
    bits = [spec.bits for spec in plan.specs.values()]
    lowest = min(bits, default=_FULL_BITS)

    def square(names: Sequence[str]) -> Square:
        specs = [plan.specs.get(name) for name in names]
        widths = [_FULL_BITS if one is None else one.bits for one in specs]
        width, spec = min(widths), specs[widths.index(min(widths))]
        text = "full" if spec is None else str(width) + ("" if spec.group_size < 0 else f" g{spec.group_size}")
        if max(widths) > width:  # experts of a layer, of which each has a precision
            text = f"{width} to {'full' if None in specs else max(widths)}"
        counts = Counter((stack_in(name), str(one or FULL)) for name, one in zip(names, specs, strict=True))
        said = ", ".join(f"{name} {one}{f' x{n}' if n > 1 else ''}" for (name, one), n in counts.items())
        return Square(text, said, (width - lowest) / max(_FULL_BITS - lowest, 1))

    by_layer = plan_by_layer(plan, sensitivities, metric)
    facts, counts = plan_tables(plan, sensitivities)
    suffix = "" if index is None else f" {index}"
    return section(
        f"The plan{suffix}",
        f"plan{suffix.strip()}",
        layer_map("Bits of each layer, and weights in a group (g)", sensitivities.layers, square, is_plan=True),
        data_table(facts),
        data_table(counts),
        numbers("Every layer", by_layer),
    )


def card_section(comparison: Comparison, index: int | None) -> Markup:
    """Return a comparison: the KL card, and KL by position and by token frequency."""
    given = comparison.provenance
    has_names = {"base", "model", "text"} <= given.keys()
    named = f"{given['model']} against {given['base']}, on {given['text']}." if has_names else None
    suffix = "" if index is None else f" {index}"
    card = comparison_tables(comparison)[0]
    parts = [
        interval_table(
            f"{KLD} by {what}",
            heading,
            [Row(str(part), part.figures[KLD], f"{part.tokens:,} tokens") for part in chosen],
        )
        for what, heading, chosen in (
            ("position", "tokens before", comparison.by_position),
            ("token frequency", "occurrences", comparison.by_frequency),
        )
        if chosen
    ]
    what = tag("p", named) if named else None
    return section(f"KL card{suffix}", f"card{suffix.strip()}", what, data_table(card), *parts)


def cost(sensitivities: Sensitivities) -> Markup | None:
    """Return what the sweep took; None for published files, which do not say.

    Raises:
        CheckpointError: times or counts in an edited file are not numbers.
    """
    given: dict[str, Any] = sensitivities.provenance
    seconds, forwards = given.get("seconds"), given.get("token_forwards")
    if not isinstance(seconds, dict):
        return None
    with signed_json.parsed("what the sweep took", "run the sweep again"):
        seconds = {stage: signed_json.number(value, f"the seconds of {stage}") for stage, value in seconds.items()}
        forwards = None if forwards is None else signed_json.whole(forwards, "token_forwards")
    total = math.fsum(seconds.values())
    candidates = len(sensitivities.measurements) + len(sensitivities.rows) + len(sensitivities.activations)
    least, most = tokens_of(sensitivities)
    tokens = fmean(m.tokens for m in sensitivities.measurements.values())
    facts = (
        ("seconds", total),
        ("candidates", candidates),
        ("tokens measured of each", most if least == most else f"{least:,} to {most:,}"),
        ("seconds a candidate and 1,000 tokens", total / candidates / tokens * 1000),
        ("tokens through the whole network", forwards),
        ("computed in", str(given.get("dtype", ""))),
    )
    rows = tuple((stage.replace("_", " "), value, value / total if total else 0.0) for stage, value in seconds.items())
    return section(
        "What the sweep took",
        "cost",
        data_table(Table("The sweep", ("what", "value"), facts)),
        data_table(Table("Seconds by stage", ("stage", "seconds", "share"), rows)),
    )


def _short(name: str) -> str:
    """Return a layer's name as people say it: "block 3, x_proj"."""
    block = depth(name)
    return kind(name) if block is None else f"block {block}, {kind(name)}"
