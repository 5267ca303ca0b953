"""What every method plans from: for each layer, the precisions it can have, with their bytes and costs."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass

from klfast.errors import InfeasibleBudgetError, InvalidInputError
from klfast.sensitivity.results import METRICS, Sensitivities
from klfast.types import SHAPE_BYTES, Plan, QuantSpec, storable_spec

KL_METRICS = ("kl_teacher_student", "kl_student_teacher")


@dataclass(frozen=True)
class Choice:
    """One precision of one layer.

    Attributes:
        spec: as it will be stored; None for full precision.
        nbytes: of the layer in that precision, as saved.
        cost: what the method minimises; adds up over layers.
        kl: measured KL in nats per token, None if it was not measured.
        delta_ce: measured growth of the cross-entropy, nats per token; None if it was not measured.
        measured: the spec that the cost was measured with.
    """

    spec: QuantSpec | None
    nbytes: int
    cost: float
    kl: float | None
    delta_ce: float | None
    measured: QuantSpec | None = None

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weights alone, scales and zero points included: what bits per weight are reckoned from."""
        return self.nbytes if self.spec is None else self.nbytes - SHAPE_BYTES


class Problem:
    """Sensitivities as choices.

    Attributes:
        layers: name -> choices: full precision first, then by falling bytes.
        n_weights: weights in all quantizable layers together.
        metric: the metric that costs are made of.
        notes: what was found while reading the measurements.
    """

    def __init__(self, sensitivities: Sensitivities, metric: str | None):
        self.sensitivities = sensitivities
        self.notes: list[str] = []
        if not sensitivities.layers or not sensitivities.measurements:
            raise InvalidInputError("the sensitivities hold no measurements; run klfast.sweep first")
        self.metric = self._metric(metric)
        self.kl_metric = self.metric if self.metric in KL_METRICS else next(filter(self._all_have, KL_METRICS), None)
        self.n_weights = sum(math.prod(info.shape) for info in sensitivities.layers.values())
        self.layers = {name: [Choice(None, info.float_bytes, 0.0, 0.0, 0.0)] for name, info in sensitivities.layers.items()}
        negative, noise, broken = 0, 0, []
        for (name, measured), measurement in sensitivities.measurements.items():
            if name not in self.layers:
                raise InvalidInputError(f"the sensitivities measure {name!r}, which is not among their layers; sweep anew")
            cost = _cost(self.metric, measurement.mean[self.metric])
            if not math.isfinite(cost):
                broken.append(f"{name} at {measured}")
                continue
            negative += cost < 0
            noise += measurement.below_noise
            kl = None if self.kl_metric is None else measurement.mean[self.kl_metric]
            kl = max(kl, 0.0) if kl is not None and math.isfinite(kl) else None
            shape = sensitivities.layers[name].shape
            spec = storable_spec(measured, shape[1])
            self.layers[name].append(Choice(spec, spec.saved_bytes(shape), max(cost, 0.0), kl, measurement.mean.get("delta_ce"), measured))
        for name, choices in self.layers.items():
            self.layers[name] = _unique(choices)
        self._note_measurements(negative, noise, broken)

    def _all_have(self, metric: str) -> bool:
        return all(metric in m.mean for m in self.sensitivities.measurements.values())

    def _metric(self, asked: str | None) -> str:
        if asked is None:
            asked = next(filter(self._all_have, KL_METRICS), KL_METRICS[0])
            if asked != KL_METRICS[0]:
                self.notes.append(f"planned by {asked}: {KL_METRICS[0]} was not measured")
        if asked not in METRICS:
            raise InvalidInputError(f"unknown metric {asked!r}; choose one of {', '.join(METRICS)}")
        for (name, spec), measurement in self.sensitivities.measurements.items():
            if asked not in measurement.mean:
                held = ", ".join(measurement.mean) or "nothing"
                raise InvalidInputError(f"{asked} was not measured for {name} at {spec} (only {held}); pass another metric or sweep with it")
        return asked

    def _note_measurements(self, negative: int, noise: int, broken: list[str]) -> None:
        if missing := [name for name, choices in self.layers.items() if len(choices) == 1]:
            self.notes.append(f"{_some(missing)} keeping full precision: no measured spec makes it smaller")
        if negative:
            self.notes.append(f"{negative} negative measurements of {self.metric} were taken as 0")
        if noise:
            self.notes.append(f"{noise} measurements lie below the noise floor: their order is chance, their size an upper bound")
        if broken:
            self.notes.append(f"{_some(broken)} left out: {self.metric} is not finite")

    @property
    def other_bytes(self) -> int:
        return self.sensitivities.other_bytes

    def plan(self, picks: dict[str, Choice], method: str, notes: list[str] = []) -> Plan:  # noqa: B006 (never changed)
        """The Plan of these choices, with what it is predicted to cost."""
        predicted = {
            "bytes": sum(choice.nbytes for choice in picks.values()) + self.other_bytes,
            "mean_bits": 8 * sum(choice.weight_bytes for choice in picks.values()) / self.n_weights,
        }
        if all(choice.kl is not None for choice in picks.values()):
            predicted["kl"] = math.fsum(choice.kl for choice in picks.values())
        teacher = self.sensitivities.provenance.get("ce_teacher")
        if isinstance(teacher, (int, float)) and all(choice.delta_ce is not None for choice in picks.values()):
            nll = teacher + math.fsum(choice.delta_ce for choice in picks.values())
            if math.isfinite(nll):
                predicted["perplexity"] = math.exp(min(nll, 700.0))
        specs = {name: choice.spec for name, choice in picks.items() if choice.spec is not None}
        notes = [*self.notes, *self._note_groups(picks), *notes]
        return Plan(specs, method, self.sensitivities.fingerprint, predicted, tuple(notes))

    def _note_groups(self, picks: dict[str, Choice]) -> list[str]:
        changed = Counter()
        for name, choice in picks.items():
            k = self.sensitivities.layers[name].shape[1]
            if choice.measured is not None and choice.spec.group_length(k) != choice.measured.group_length(k):
                changed[choice.measured, choice.spec, k] += 1
        return [
            f"{asked} became {spec} on {count} layers with {k} inputs: a saved group size must divide the inputs"
            for (asked, spec, k), count in changed.items()
        ]


@dataclass(frozen=True)
class Budget:
    """A limit on the summed size of the quantizable layers, or on the summed cost.

    Attributes:
        name: the argument of klfast.plan that it came from.
        value: as the user gave it.
        limit: what the sum may not exceed: size (an int, see ``size``), or cost.
    """

    name: str
    value: float
    limit: float

    @classmethod
    def of(cls, problem: Problem, **given: float | None) -> Budget | None:
        """The one budget among ``given`` (max_bytes, mean_bits, max_kl); None if all are None."""
        given = {name: value for name, value in given.items() if value is not None}
        if not given:
            return None
        if len(given) > 1:
            raise InvalidInputError(f"give one budget, not {' and '.join(given)}")
        [(name, value)] = given.items()
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
            raise InvalidInputError(f"{name} must be a finite number, at least 0, got {value!r}")
        if name == "max_bytes":
            return cls(name, value, math.floor(value) - problem.other_bytes)
        if name == "mean_bits":  # rounded up by less than a byte, so that a plan's own predicted mean_bits is enough for it
            return cls(name, value, math.floor(value * problem.n_weights / 8 * (1 + 1e-12)))
        if problem.metric not in KL_METRICS:
            raise InvalidInputError(f"max_kl limits a KL, but the metric is {problem.metric}; use {' or '.join(KL_METRICS)}, or max_bytes")
        return cls(name, value, float(value))

    @property
    def of_bytes(self) -> bool:
        return self.name != "max_kl"

    def size(self, choice: Choice) -> int:
        """The bytes of a choice that the budget limits; under max_kl, those that are to be few."""
        return choice.weight_bytes if self.name == "mean_bits" else choice.nbytes

    def used(self, picks: dict[str, Choice]) -> float:
        return sum(map(self.size, picks.values())) if self.of_bytes else math.fsum(c.cost for c in picks.values())

    def met(self, picks: dict[str, Choice]) -> bool:
        return self.used(picks) <= self.limit

    def require(self, problem: Problem, smallest: dict[str, Choice], remedy: str) -> None:
        """Raise InfeasibleBudgetError unless ``smallest``, the least that the method reaches, meets the budget."""
        if self.met(smallest):
            return
        used = self.used(smallest)
        total = sum(choice.nbytes for choice in smallest.values()) + problem.other_bytes
        if self.name == "max_bytes":
            what, least = f"{math.floor(self.value):,} bytes", f"{total:,} bytes"
        elif self.name == "mean_bits":
            what, least = f"{self.value:g} bits per weight", f"{8 * used / problem.n_weights:.4f} ({total:,} bytes)"
        else:
            what, least = f"a KL of {self.value:g} nats per token", f"{used:.6g}"
        raise InfeasibleBudgetError(f"no plan meets {what}: the smallest reachable is {least}; {remedy}")


def _cost(metric: str, mean: float) -> float:
    """The additive cost of one measurement."""
    if metric == "sqnr_db":  # noise power relative to the signal's
        return 10.0 ** (-mean / 10.0) if mean > -3000 else math.inf
    if metric == "top1_agree":
        return 1.0 - mean
    return mean


def _unique(choices: list[Choice]) -> list[Choice]:
    """One choice a stored spec, none that saves nothing over full precision; by falling bytes, then bits.

    Of two measured specs that are stored as the same one, the one that needed no change counts.
    """
    full, rest = choices[0], choices[1:]
    by_spec: dict[QuantSpec, Choice] = {}
    for choice in rest:
        if choice.nbytes < full.nbytes and (choice.spec not in by_spec or choice.spec == choice.measured):
            by_spec[choice.spec] = choice
    return [full, *sorted(by_spec.values(), key=lambda c: (-c.nbytes, -c.spec.bits, c.spec))]


def _some(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"
