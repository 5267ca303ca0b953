"""What an adaptive sweep measures: one spec a layer, then what plans still depend on, at a tenth of the whole work.

A layer's other specs follow from the one that is measured by the squared errors of its weight, to which that of its
output, and so the KL, is close to proportional. What plans hesitate about (racing.py) is measured for itself, or on
twice the text, until they are settled or the work allowed is done.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from klfast.core.window_stats import WindowStats
from klfast.quant.spec import storable_spec
from klfast.sensitivity.racing import Field, contested
from klfast.sensitivity.results import LayerInfo, Measurement
from klfast.sensitivity.steps import NOISE, Step

PARTS = 32  # of the calibration text, at least, so that the first is a small share
ALLOWED = 0.1  # of the work of an exhaustive sweep
_BESIDE = 2  # passes of a part of the text through the network beside the candidates': of the teacher and its noise
_OF_SMALLEST = (1.05, 1.2, 1.5)  # sizes of plans, if none is given, relative to the smallest
_RATIO_ERROR = 0.15  # of the ratio of two specs' KLs by their weights' errors
_TOKEN_ERROR = 4.8  # assumed of a mean over tokens, as a share of it, times their square root
_ASSUMED_DEGREES = 4  # of freedom, for which this assumption counts beside what windows show
_COMMON_DEGREES = 4  # for which what all layers show counts beside what one shows


@dataclass(frozen=True)
class _Entrant:
    """A candidate: row in the tally, bytes as saved, share of the network that it runs through, squared error."""

    row: int
    nbytes: int
    work: float
    square: float


class Schedule:
    """Chooses how many parts of the text each candidate is measured on, round by round.

    Args:
        steps: those of the exhaustive sweep.
        layers: the model's.
        other_bytes: of all that is not quantized.
        max_bytes: of the plan that is wanted; None for plans of several sizes.
        blocks: of the network.
        parts: of the text.
        scale: of the rounding.
    """

    def __init__(
        self,
        steps: Sequence[Step],
        layers: Mapping[str, LayerInfo],
        other_bytes: int,
        max_bytes: int | None,
        blocks: int,
        parts: int,
        scale: str,
    ) -> None:
        self.parts = parts
        self.by_layer: dict[str, list[_Entrant]] = {}
        for step in steps:
            work = 1.0 if isinstance(step.place, str) else (blocks - step.place) / blocks
            for row, one in enumerate(step.candidates, step.first):
                shape = layers[one.name].shape
                nbytes = storable_spec(one.spec, shape[1]).saved_bytes(shape)
                entrant = _Entrant(row, nbytes, work, one.squared_error(scale))
                self.by_layer.setdefault(one.name, []).append(entrant)
        for some in self.by_layer.values():
            some.sort(key=lambda entrant: -entrant.square)  # the reference first: the most error, the least noise
        self.entrants = [entrant for some in self.by_layer.values() for entrant in some]
        self.allowed = ALLOWED * parts * (_BESIDE + sum(entrant.work for entrant in self.entrants))
        fixed = other_bytes + sum(info.float_bytes for name, info in layers.items() if name not in self.by_layer)
        smallest = fixed + sum(min(e.nbytes for e in some) for some in self.by_layer.values())
        sizes = [max_bytes] if max_bytes is not None else [smallest * factor for factor in _OF_SMALLEST]
        self.limits = [size - fixed for size in sizes]
        self.float_bytes = [layers[name].float_bytes for name in self.by_layer]

    def first(self) -> dict[int, int]:
        """Return the parts of the text for the first rows: the noise floor and one spec a layer."""
        return {NOISE: 1} | {some[0].row: 1 for some in self.by_layer.values()}

    def following(self, tally: WindowStats, had: Mapping[int, int], taught: int) -> dict[int, int]:
        """Return the parts for the rows that need more than they have had; none if the plans are settled.

        ``taught`` is the number of parts that the teacher has run on, once a round.
        """
        layers = self._sound(tally)
        if goals := {some[0].row: 1 for some in layers if some and not had.get(some[0].row)}:
            return goals  # since their layers' references were broken
        field = self._field(layers, tally, had)
        doubtful = contested(field, self.limits)
        stakes = field.costs * field.errors
        places = sorted(doubtful.nonzero().tolist(), key=lambda place: -float(stakes[place[0], place[1]]))
        due = set[int]()
        left = self.allowed - self.spent(had) - taught
        for layer, option in places:
            if option == 0:  # full precision costs nothing, as is known
                continue
            entrant = layers[layer][option - 1]
            before = had.get(entrant.row, 0)
            wanted = range(before, min(self.parts, max(1, 2 * before)))
            work = len(wanted) * entrant.work + len(due.union(wanted)) - len(due)  # the latter of the teacher
            if wanted and work <= left:
                goals[entrant.row], left = wanted.stop, left - work
                due.update(wanted)
        return goals

    def spent(self, had: Mapping[int, int]) -> float:
        """Return the work done without the teacher's, in passes of a part of the text through the network."""
        return had.get(NOISE, 0) + sum(had.get(entrant.row, 0) * entrant.work for entrant in self.entrants)

    def derived(self, measured: Mapping[int, Measurement], tally: WindowStats) -> dict[int, Measurement]:
        """Return the measurements of all other rows, which follow from those of their layers' references."""
        found = {}
        for reference, *others in filter(None, self._sound(tally)):
            base = measured.get(reference.row)
            for entrant in others if base is not None else ():
                if entrant.row not in measured:
                    assert base is not None
                    ratio = _ratio(entrant, reference)
                    mean = {name: value * ratio for name, value in base.mean.items()}
                    stderr = {
                        name: ((value * ratio) ** 2 + (_RATIO_ERROR * mean[name]) ** 2) ** 0.5
                        for name, value in base.stderr.items()
                    }
                    found[entrant.row] = replace(base, mean=mean, stderr=stderr, is_derived=True)
        return found

    def _sound(self, tally: WindowStats) -> list[list[_Entrant]]:
        """Return the entrants of each layer without broken ones; the first is its reference."""
        return [[one for one in some if not tally.is_broken(one.row)] for some in self.by_layer.values()]

    def _field(self, layers: Sequence[Sequence[_Entrant]], tally: WindowStats, had: Mapping[int, int]) -> Field:
        options = 1 + max(map(len, self.by_layer.values()))
        costs, errors = (torch.zeros(len(self.by_layer), options, dtype=torch.float64) for _ in range(2))
        nbytes = torch.full_like(costs, torch.inf)
        nbytes[:, 0] = torch.tensor(self.float_bytes)
        common = self._common_variance(tally)
        for layer, some in enumerate(layers):
            if not some:
                continue
            base, base_error = _known(tally, some[0], common)
            for option, entrant in enumerate(some, 1):
                nbytes[layer, option] = entrant.nbytes
                if had.get(entrant.row):
                    costs[layer, option], errors[layer, option] = _known(tally, entrant, common)
                else:
                    costs[layer, option] = base * _ratio(entrant, some[0])
                    errors[layer, option] = (base_error**2 + _RATIO_ERROR**2) ** 0.5
        return Field(costs, errors, nbytes)

    def _common_variance(self, tally: WindowStats) -> float:
        """Return the square of a mean's error after one token, as a share of it: of all candidates together.

        They have read the same windows, so they show it no better than the one with the most windows.
        """
        known = [(own, tally.windows(e.row) - 1) for e in self.entrants if (own := _variance(tally, e.row)) is not None]
        if not known:
            return _TOKEN_ERROR**2
        mean = sum(own * degrees for own, degrees in known) / sum(degrees for _, degrees in known)
        degrees = max(degrees for _, degrees in known)
        return (_ASSUMED_DEGREES * _TOKEN_ERROR**2 + degrees * mean) / (_ASSUMED_DEGREES + degrees)


def _variance(tally: WindowStats, row: int) -> float | None:
    """Return the square of a row's error after one token, as a share of its mean KL; None if it has too few windows."""
    mean, stderr = tally.mean(row)[0], tally.stderr(row)[0]
    return (stderr / mean) ** 2 * tally.tokens(row) if mean > 0 and math.isfinite(stderr) else None


def _known(tally: WindowStats, entrant: _Entrant, common: float) -> tuple[float, float]:
    """Return a measured KL and its error as a share of it, for which few windows say less than all layers together."""
    own, row = _variance(tally, entrant.row), entrant.row
    degrees = 0 if own is None else tally.windows(row) - 1
    variance = (_COMMON_DEGREES * common + degrees * (own or 0.0)) / (_COMMON_DEGREES + degrees)
    return tally.mean(row)[0], (variance / tally.tokens(row)) ** 0.5


def parts_due(had: Mapping[int, int], goals: Mapping[int, int]) -> int:
    """Return the number of parts of the text that any row is to be measured on."""
    return len(set[int]().union(*(range(had.get(row, 0), goal) for row, goal in goals.items())))


def _ratio(entrant: _Entrant, reference: _Entrant) -> float:
    return entrant.square / reference.square if reference.square > 0 else 1.0
