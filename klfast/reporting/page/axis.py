"""An axis: where values lie between its ends, and its ticks."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

_LOGARITHMIC_FROM = 20.0  # largest over smallest value
_FIRST, _LAST = -307, 308  # powers of ten that float64 has with all digits
_MOST = 1e300  # magnitude of a linear axis' ends, so that it has a finite length


@dataclass(frozen=True)
class Axis:
    """A logarithmic or linear axis from ``low`` to ``high``."""

    low: float
    high: float
    is_logarithmic: bool = False

    @classmethod
    def of(cls, values: Iterable[float | None], *, linear: bool = False) -> Axis:
        """Return an axis that holds all finite values, logarithmic if the largest is over 20 times the smallest one.

        On a logarithmic axis, values of zero or less lie at its lower end.
        """
        held = [value for value in values if value is not None and math.isfinite(value)]
        positive = [value for value in held if value > 0]
        if not linear and positive and min(held) >= 0 and max(positive) > _LOGARITHMIC_FROM * min(positive):
            first, last = math.floor(math.log10(min(positive))), math.ceil(math.log10(max(positive)))
            return cls(10.0 ** max(first, _FIRST), 10.0 ** min(max(last, _FIRST + 1), _LAST), True)
        low, high = (_held(min(held)), _held(max(held))) if held else (0.0, 1.0)
        room = (high - low) / 20 or abs(high) / 20 or 1.0
        return cls(max(low - room, 0.0) if low >= 0 else low - room, high + room)

    @classmethod
    def spanning(cls, values: Iterable[float]) -> Axis:
        """Return an axis from the smallest value to the largest one, logarithmic if all are positive."""
        held = [value for value in values if math.isfinite(value)] or [0.0]
        low, high = _held(min(held)), _held(max(held))
        return cls(low, high, low > 0) if low < high else cls(low - max(abs(low), 1.0), high)

    def share(self, value: float) -> float:
        """Return where a value lies, 0 at the lower and 1 at the upper end."""
        if not self.is_logarithmic:
            place = (value - self.low) / (self.high - self.low)
        elif value <= 0:
            place = 0.0
        else:
            low, high = math.log10(self.low), math.log10(self.high)
            place = (math.log10(value) - low) / (high - low)
        return min(max(place, 0.0), 1.0)

    def ticks(self, most: int = 5) -> list[float]:
        """Return round values on the axis, at most ``most`` or so."""
        if self.is_logarithmic:
            first, last = round(math.log10(self.low)), round(math.log10(self.high))
            step = max(1, math.ceil((last - first) / most))
            return [10.0**power for power in range(first, last + 1, step)]
        rough = (self.high - self.low) / most
        unit = 10 ** math.floor(math.log10(rough))
        step = next(unit * factor for factor in (1, 2, 5, 10) if unit * factor >= rough)
        return [step * i for i in range(math.ceil(self.low / step), math.floor(self.high / step) + 1)]


def _held(value: float) -> float:
    return min(max(value, -_MOST), _MOST)


def number(value: float) -> str:
    """Return a value with few digits: "0.00067", "11", "1.2e-05"."""
    return f"{value:.2g}" if abs(value) < 100 else f"{value:,.0f}"
