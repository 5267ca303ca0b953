"""The input of every method: each layer's possible precisions with their bytes and costs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType

from klfast.core.errors import InvalidInputError
from klfast.models.selection import Patterns
from klfast.planning import notes
from klfast.planning.activation import CHOICES, with_int8
from klfast.planning.choices import TOO_LARGE, Choice, Picks, bytes_of, cost_of, counted, unique
from klfast.planning.constraints import Keep, settled
from klfast.planning.numbers_given import require_sizes
from klfast.planning.plan_file import Plan
from klfast.planning.servable import SERVED, fused, is_served, unread
from klfast.planning.timings import Product, Timings
from klfast.quant.spec import SCALES, QuantSpec, storable_spec
from klfast.sensitivity.results import METRICS, Sensitivities

KL_METRICS = ("kl_teacher_student", "kl_student_teacher")


class Problem:
    """Sensitivities as choices.

    Attributes:
        full: name -> full precision.
        units: what is decided at once: the possible choices of one layer, or of layers with one precision, by name.
        servable: the plan is one that other engines load.
        layers: name -> choices. Full precision first, then by falling bytes; a single choice where the user fixed one.
        asked: name -> the spec (None: full precision) that the user fixed.
        settled: the same, and what ``servable`` fixes.
        free: layers whose precision the planner may choose: neither settled nor fused with one that is.
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
        asked: Mapping[str, QuantSpec | None] | None = None,
        activation: str = "exact",
        servable: bool = False,
        timings: Timings | None = None,
    ) -> None:
        self.sensitivities = sensitivities
        self.timings = timings
        self.asked = dict(asked or {})
        self.settled = {**dict.fromkeys(unread(sensitivities.layers) if servable else ()), **self.asked}
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
                f"{self.metric} is not finite in any measurement ({notes.some(broken)}); pass another metric "
                "or sweep again"
            )
        self.layers = {name: self._choices(name, choices) for name, choices in found.items()}
        groups = fused(list(self.layers)) if servable else [[name] for name in self.layers]
        self.units = [self._unit(names) for names in groups]
        held = {name for names in groups if self.settled.keys() & set(names) for name in names}
        self.free = [name for name in self.layers if name not in held]
        self.notes += notes.of_measurements(sensitivities, self.metric, negative, noise, broken)

    @classmethod
    def of(
        cls,
        sensitivities: Sensitivities,
        *,
        metric: str | None = None,
        layers: Patterns | None = None,
        exclude: Patterns | None = None,
        keep: Keep | None = None,
        activation: str = "exact",
        servable: bool = False,
        timings: Timings | None = None,
    ) -> Problem:
        """Return the problem that these arguments of ``klfast.plan`` pose; the errors are those."""
        if not isinstance(sensitivities, Sensitivities):
            raise InvalidInputError(f"plan takes Sensitivities (from klfast.sweep), got {type(sensitivities).__name__}")
        if activation not in CHOICES:
            raise InvalidInputError(
                f'activation must be "exact" or "auto", got {activation!r}; quantize_model takes "int8" for all layers'
            )
        asked = settled(sensitivities.layers, layers, exclude, keep)
        return cls(sensitivities, metric, asked, activation, servable, timings)

    def seconds(self, name: str, spec: QuantSpec | None, activation: str = "exact") -> float | None:
        """Return the seconds of a layer's product with a token; None without timings."""
        shape = self.sensitivities.layers[name].shape
        return None if self.timings is None else self.timings.of(Product(shape, spec, activation))

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

    @property
    def other_bytes(self) -> int:
        """Bytes of everything that is never quantized."""
        return int(self.sensitivities.other_bytes)

    def plan(
        self, picks: Picks, method: str, added: Sequence[str] = (), measured: Mapping[str, float] = MappingProxyType({})
    ) -> Plan:
        """Return the Plan of these choices with its predicted cost, and what was measured of it."""
        specs = {name: choice.spec for name, choice in picks.items() if choice.spec is not None}
        modes = {name: picks[name].activation for name in specs} if self.activation == "auto" else {}
        said = (*self.notes, *notes.of_layers(self, picks), *notes.of_groups(self, picks), *notes.of_modes(modes))
        scale = self.sensitivities.provenance.get("scale")
        known_scale = next((known for known in SCALES if scale == known), None)
        predicted = {**self._predicted(picks), **measured}
        return Plan(specs, method, self.sensitivities.fingerprint, predicted, (*said, *added), known_scale, modes)

    def _predicted(self, picks: Picks) -> dict[str, float]:
        predicted: dict[str, float] = {
            "bytes": bytes_of(picks) + self.other_bytes,
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


def _sum(values: Sequence[float]) -> float:
    """Return the exactly rounded sum; NaN if undefined (infinities of both signs) or out of the range of floats."""
    try:
        return math.fsum(values)
    except (OverflowError, ValueError):
        return math.nan
