"""Sentences of a plan's notes: what the measurements, patterns and other engines left of the choices."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from klfast.planning.choices import Picks
from klfast.quant.spec import QuantSpec
from klfast.sensitivity.coverage import not_finite_note, unfinished_note, unmeasured
from klfast.sensitivity.results import Sensitivities

if TYPE_CHECKING:
    from klfast.planning.problem import Problem


def of_measurements(
    sensitivities: Sensitivities, metric: str, negative: int, noise: int, broken: Sequence[str]
) -> list[str]:
    """Return notes on the measurements.

    Args:
        sensitivities: that hold them.
        metric: that costs are derived from.
        negative: measurements below 0.
        noise: measurements below the noise floor.
        broken: measurements that are not finite, by their names.
    """
    found = [note for note in (unfinished_note(sensitivities), not_finite_note(sensitivities)) if note]
    if sensitivities.provenance.get("rounding") == "gptq":
        found.append('costs are those of second-order rounding: quantize with rounding="gptq"')
    if negative:
        found.append(f"{negative} negative measurements of {metric} were taken as 0")
    if noise:
        why = "their order is random, their size an upper bound"
        found.append(f"{noise} measurements lie below the noise floor: {why}")
    if broken:
        found.append(f"{some(broken)} left out: {metric} is not finite")
    return found


def of_layers(problem: Problem, picks: Picks) -> list[str]:
    """Return which layers are fixed and by whom, and why others could not but keep full precision."""
    asked = problem.asked
    fused: dict[str, QuantSpec | None] = {}
    for unit in problem.units:
        if unit[0].keys() & asked.keys():
            fused.update({name: choice.spec for name, choice in unit[0].items() if name not in problem.settled})
    found = [f"{names} kept in {spec}, as asked" for spec, names in _by_spec(asked)]
    found += [f"{names} kept in {spec}, as asked of layers fused with them" for spec, names in _by_spec(fused)]
    engines = "that other engines run " if problem.servable else ""
    whole = [name for name in problem.free if picks[name].spec is None]
    alone = [name for name in whole if len(problem.layers[name]) == 1]
    missing = set(unmeasured(problem.sensitivities)) if alone else set()
    bound = {name for unit in problem.units if len(unit) == 1 for name in unit[0]}.difference(alone)
    for why, names in (
        ("not quantized in servable plans", [name for name in problem.settled if name not in asked]),
        ("not measured", [name for name in alone if name in missing]),
        (f"no measured spec {engines}makes it smaller", [name for name in alone if name not in missing]),
        (f"no spec {engines}was measured on all layers fused with it", [name for name in whole if name in bound]),
    ):
        if names:
            found.append(f"{some(names)} keeping full precision: {why}")
    return found


def of_groups(problem: Problem, picks: Picks) -> list[str]:
    """Return which group sizes files cannot hold, and what became of them."""
    changed: Counter[tuple[QuantSpec, QuantSpec, int]] = Counter()
    for name, choice in picks.items():
        k = problem.sensitivities.layers[name].shape[1]
        spec, measured = choice.spec, choice.measured
        if spec is not None and measured is not None and spec.group_length(k) != measured.group_length(k):
            changed[measured, spec, k] += 1
    return [
        f"{asked} became {spec} on {count} layers with {k} inputs: a saved group size must divide the inputs"
        for (asked, spec, k), count in changed.items()
    ]


def of_modes(modes: Mapping[str, str]) -> list[str]:
    """Return how many layers round their input; nothing if the plan is silent."""
    int8 = sum(mode == "int8" for mode in modes.values())
    below = "where they cost less than a tenth of what the weights do"
    return [f"int8 activations in {int8} of {len(modes)} quantized layers, {below}"] if modes else []


def some(names: Sequence[str]) -> str:
    """Return the first name, and how many more there are."""
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


def _by_spec(specs: Mapping[str, QuantSpec | None]) -> Iterable[tuple[str, str]]:
    """Yield each spec, or "full precision", and the layers that have it."""
    found: dict[QuantSpec | None, list[str]] = {}
    for name, spec in specs.items():
        found.setdefault(spec, []).append(name)
    for spec, names in found.items():
        yield str(spec or "full precision"), some(names)
