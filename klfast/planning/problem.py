"""The input of every method: each layer's possible precisions with their bytes and costs."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from types import MappingProxyType

from klfast.core.errors import InvalidInputError
from klfast.planning.activation import with_int8
from klfast.planning.choices import TOO_LARGE, Choice, Picks, cost_of, counted, unique
from klfast.planning.numbers_given import require_sizes
from klfast.planning.plan_file import Plan
from klfast.planning.servable import SERVED, fused, is_served
from klfast.planning.timings import Product, Timings
from klfast.quant.spec import SCALES, QuantSpec, storable_spec
from klfast.sensitivity.coverage import not_finite_note, unfinished_note, unmeasured
from klfast.sensitivity.results import METRICS, Sensitivities

KL_METRICS = ("kl_teacher_student", "kl_student_teacher")


class Problem:
    """Sensitivities as choices.

    Attributes:
        full: name -> full precision.
        units: what is decided at once: the possible choices of one layer, or of layers with one precision, by name.
        servable: the plan is one that other engines load.
        layers: name -> choices. Full precision first, then by falling bytes; a single choice where the user fixed one.
        settled: name -> the spec (None: full precision) that the user fixed; the other layers are free.
        n_weights: the number of weights in all linear layers.
        metric: the metric that costs are derived from.
        notes: findings about the measurements.
        n_left_out: measurements that no plan can use, since the metric is not finite.
        activation: "exact", or "auto" if layers round their input to int8 where it costs next to nothing.
        timings: of the layers' products, if plans count them.
    """

    def __init__(
        self,
        sensitivities: Sensitivities,
        metric: str | None,
        settled: Mapping[str, QuantSpec | None] | None = None,
        activation: str = "exact",
        servable: bool = False,
        timings: Timings | None = None,
    ) -> None:
        self.sensitivities = sensitivities
        self.timings = timings
        self.settled = dict(settled or {})
        self.servable = servable
        self.activation = activation
        self.notes: list[str] = []
        require_sizes(sensitivities)
        if timings is not None:
            timings.require_model(sensitivities)
        self._measurements = {key: m for key, m in sensitivities.measurements.items() if self._may_be(*key)}
        self.metric = self._metric(metric)
        self.kl_metric = self.metric if self.metric in KL_METRICS else next(filter(self._all_have, KL_METRICS), None)
        deciding = self.kl_metric or KL_METRICS[0]
        int8 = with_int8(sensitivities, self._measurements, deciding, self.metric) if activation == "auto" else {}
        self._measurements |= int8
        self.n_weights = sum(math.prod(info.shape) for info in sensitivities.layers.values())
        self.full = {
            name: Choice(None, int(info.float_bytes), 0.0, 0.0, 0.0, seconds=self.seconds(name, None))
            for name, info in sensitivities.layers.items()
        }
        negative, noise, broken = 0, 0, []
        found: dict[str, list[Choice]] = {name: [] for name in self.full}
        for (name, measured), measurement in self._measurements.items():
            cost = cost_of(self.metric, measurement.mean[self.metric])
            if not abs(cost) < TOO_LARGE:
                broken.append(f"{name} at {measured}")
                continue
            negative += cost < 0
            noise += measurement.below_noise
            kl = None if self.kl_metric is None else measurement.mean[self.kl_metric]
            kl = counted(kl) if kl is not None and abs(kl) < TOO_LARGE else None
            shape = sensitivities.layers[name].shape
            spec = storable_spec(measured, shape[1])
            delta_ce = measurement.mean.get("delta_ce")
            chosen = "int8" if (name, measured) in int8 else "exact"
            seconds = self.seconds(name, spec, chosen)
            choice = Choice(spec, spec.saved_bytes(shape), counted(cost), kl, delta_ce, measured, chosen, seconds)
            found[name].append(choice)
        self.n_left_out = len(broken)
        if broken and not any(found.values()):
            raise InvalidInputError(
                f"{self.metric} is not finite in any measurement ({_some(broken)}); pass another metric or sweep again"
            )
        self.layers = {name: self._choices(name, choices) for name, choices in found.items()}
        groups = fused(list(self.layers)) if servable else [[name] for name in self.layers]
        self.units = [self._unit(names) for names in groups]
        self._note_layers()
        self._note_measurements(negative, noise, broken)

    def seconds(self, name: str, spec: QuantSpec | None, activation: str = "exact") -> float | None:
        """Return the seconds of a layer's product with a token; None without timings."""
        shape = self.sensitivities.layers[name].shape
        return None if self.timings is None else self.timings.of(Product(shape, spec, activation))

    @property
    def free(self) -> list[str]:
        """Layers whose precision the planner may choose."""
        return [name for name in self.full if name not in self.settled]

    def _unit(self, names: Sequence[str]) -> list[Picks]:
        """Return the choices that layers have in common; those of the first say in which order."""
        found = []
        for first in self.layers[names[0]]:
            each = [next((one for one in self.layers[name] if one.spec == first.spec), None) for name in names]
            picks = {name: choice for name, choice in zip(names, each, strict=True) if choice is not None}
            if len(picks) == len(names):
                found.append(picks)
        if not found:
            raise InvalidInputError(
                f"{', '.join(names)} have no precision in common, which a servable plan needs; keep the same for all"
            )
        return found

    @property
    def start(self) -> Picks:
        """Full precision for each layer that may have it: the user has fixed neither it nor one fused with it."""
        return self.together([0] * len(self.units))

    def together(self, chosen: Sequence[int]) -> Picks:
        """Return the choices of all layers, in the layers' order, given the index of each unit's."""
        found: Picks = {}
        for unit, index in zip(self.units, chosen, strict=True):
            found |= unit[index]
        return {name: found[name] for name in self.layers}

    def _may_be(self, name: str, measured: QuantSpec) -> bool:
        k = self.sensitivities.layers[name].shape[1]
        if self.servable and not is_served(storable_spec(measured, k), name):
            return False
        if name not in self.settled:
            return True
        wanted = self.settled[name]
        return wanted is not None and storable_spec(wanted, k) == storable_spec(measured, k)

    def _choices(self, name: str, found: list[Choice]) -> list[Choice]:
        if name not in self.settled:
            return unique(self.full[name], found)
        wanted = self.settled[name]
        if wanted is None:
            return [self.full[name]]
        if self.servable and not is_served(storable_spec(wanted, self.sensitivities.layers[name].shape[1]), name):
            raise InvalidInputError(f"keep asks for {wanted} on {name}, which no other engine runs; {SERVED}")
        if not found:
            specs = ", ".join(str(spec) for layer, spec in self.sensitivities.measurements if layer == name)
            why = (
                f"{self.metric} of {name} at {wanted} is not finite"
                if self._measured(name)
                else f"{name} was not measured at {wanted}"
            )
            raise InvalidInputError(
                f"{why} (measured: {specs or 'nothing'}), so keep cannot ask for it; choose another spec, or sweep it"
            )
        return [next((choice for choice in found if choice.spec == choice.measured), found[0])]

    def _measured(self, name: str) -> bool:
        return any(layer == name for layer, _ in self._measurements)

    def _all_have(self, metric: str) -> bool:
        return all(metric in m.mean for m in self._measurements.values())

    def _metric(self, asked: str | None) -> str:
        if asked is None:
            asked = next(filter(self._all_have, KL_METRICS), KL_METRICS[0])
            if asked != KL_METRICS[0]:
                self.notes.append(f"planned by {asked}: {KL_METRICS[0]} was not measured")
        if asked not in METRICS:
            raise InvalidInputError(f"unknown metric {asked!r}; choose one of {', '.join(METRICS)}")
        for (name, spec), measurement in self._measurements.items():
            if asked not in measurement.mean:
                held = ", ".join(measurement.mean) or "nothing"
                raise InvalidInputError(
                    f"{asked} was not measured for {name} at {spec} (only {held}); pass another metric or sweep with it"
                )
        return asked

    def _note_layers(self) -> None:
        """Note which layers the user fixed, and which the planner cannot quantize."""
        for note in (unfinished_note(self.sensitivities), not_finite_note(self.sensitivities)):
            if note:
                self.notes.append(note)
        if self.sensitivities.provenance.get("rounding") == "gptq":
            self.notes.append('costs are those of second-order rounding: quantize with rounding="gptq"')
        by_spec: dict[QuantSpec | None, list[str]] = {}
        for name, spec in self.settled.items():
            by_spec.setdefault(spec, []).append(name)
        self.notes += [
            f"{_some(names)} kept in {spec or 'full precision'}, as asked" for spec, names in by_spec.items()
        ]
        single = [name for name in self.free if len(self.layers[name]) == 1]
        missing = set(unmeasured(self.sensitivities)) if single else set()
        known = "measured spec that other engines run" if self.servable else "measured spec"
        for why, names in (
            ("not measured", [name for name in single if name in missing]),
            (f"no {known} makes it smaller", [name for name in single if name not in missing]),
        ):
            if names:
                self.notes.append(f"{_some(names)} keeping full precision: {why}")

    def _note_measurements(self, negative: int, noise: int, broken: list[str]) -> None:
        if negative:
            self.notes.append(f"{negative} negative measurements of {self.metric} were taken as 0")
        if noise:
            self.notes.append(
                f"{noise} measurements lie below the noise floor: their order is random, their size an upper bound"
            )
        if broken:
            self.notes.append(f"{_some(broken)} left out: {self.metric} is not finite")

    @property
    def other_bytes(self) -> int:
        """Bytes of everything that is never quantized."""
        return int(self.sensitivities.other_bytes)

    def plan(
        self, picks: Picks, method: str, notes: Sequence[str] = (), measured: Mapping[str, float] = MappingProxyType({})
    ) -> Plan:
        """Return the Plan of these choices with its predicted cost, and what was measured of it."""
        specs = {name: choice.spec for name, choice in picks.items() if choice.spec is not None}
        modes = {name: picks[name].activation for name in specs} if self.activation == "auto" else {}
        notes = (*self.notes, *self._note_groups(picks), *_note_modes(modes), *notes)
        scale = self.sensitivities.provenance.get("scale")
        known_scale = next((known for known in SCALES if scale == known), None)
        predicted = {**self._predicted(picks), **measured}
        return Plan(specs, method, self.sensitivities.fingerprint, predicted, notes, known_scale, modes)

    def _predicted(self, picks: Picks) -> dict[str, float]:
        predicted: dict[str, float] = {
            "bytes": sum(choice.nbytes for choice in picks.values()) + self.other_bytes,
            "mean_bits": 8 * sum(choice.weight_bytes for choice in picks.values()) / self.n_weights,
        }
        kl = [choice.kl for choice in picks.values() if choice.kl is not None]
        if len(kl) == len(picks):
            predicted["kl"] = math.fsum(kl)
        seconds = [choice.seconds for choice in picks.values() if choice.seconds is not None]
        if len(seconds) == len(picks):
            predicted["seconds"] = math.fsum(seconds)
        teacher = self.sensitivities.provenance.get("ce_teacher")
        delta_ce = [choice.delta_ce for choice in picks.values() if choice.delta_ce is not None]
        if isinstance(teacher, (int, float)) and len(delta_ce) == len(picks):
            nll = _sum([teacher, *delta_ce])
            if math.isfinite(nll):
                predicted["perplexity"] = math.exp(min(nll, 700.0))
        return predicted

    def _note_groups(self, picks: Picks) -> list[str]:
        changed: Counter[tuple[QuantSpec, QuantSpec, int]] = Counter()
        for name, choice in picks.items():
            k = self.sensitivities.layers[name].shape[1]
            spec, measured = choice.spec, choice.measured
            if spec is not None and measured is not None and spec.group_length(k) != measured.group_length(k):
                changed[measured, spec, k] += 1
        return [
            f"{asked} became {spec} on {count} layers with {k} inputs: a saved group size must divide the inputs"
            for (asked, spec, k), count in changed.items()
        ]


def _sum(values: Sequence[float]) -> float:
    """Return the exactly rounded sum; NaN if undefined (infinities of both signs) or out of the range of floats."""
    try:
        return math.fsum(values)
    except (OverflowError, ValueError):
        return math.nan


def _note_modes(modes: Mapping[str, str]) -> list[str]:
    """Note how many layers round their input."""
    int8 = sum(mode == "int8" for mode in modes.values())
    below = "where they cost less than a tenth of what the weights do"
    return [f"int8 activations in {int8} of {len(modes)} quantized layers, {below}"] if modes else []


def _some(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"
