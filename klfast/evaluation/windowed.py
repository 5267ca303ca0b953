"""Estimates over tokens with 95 % confidence intervals, for tokens that are correlated within their windows.

Windows of a text are (nearly) independent, their tokens are not. A mean over tokens is a ratio of sums over windows;
its interval is Student's t on the linearised standard error (Cochran, Sampling Techniques, 3rd ed. 1977, sections 2.11
and 6.3). That of a quantile is Woodruff's (JASA 47, 1952, p. 635): the interval of the share of tokens below it, read
off the empirical distribution. Nothing is drawn at random.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Values = npt.NDArray[np.float64]
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Estimate:
    """A figure and its 95 % confidence interval; ``low`` and ``high`` are None where there is none.

    A maximum has no interval, nor has any figure of a single window.
    """

    value: float
    low: float | None = None
    high: float | None = None

    def through(self, function: Callable[[float], float]) -> Estimate:
        """Return the estimate of a rising function of the figure."""
        if self.low is None or self.high is None:
            return Estimate(function(self.value))
        return Estimate(function(self.value), function(self.low), function(self.high))


def half_width(stderr: float, windows: int) -> float | None:
    """Return half the width of the interval of a mean over windows, by its standard error; None for fewer than two."""
    from scipy.special import stdtrit

    return float(stdtrit(windows - 1, (1 + CONFIDENCE) / 2)) * stderr if windows > 1 else None


class Windows:
    """The windows that some tokens belong to.

    Args:
        of_token: integers [N], the window of each token.
    """

    def __init__(self, of_token: npt.NDArray[np.integer]) -> None:
        _, self._of_token, counts = np.unique(of_token, return_inverse=True, return_counts=True)
        self._counts = counts.astype(np.float64)

    def mean(self, values: Values, least: float = -math.inf, most: float = math.inf) -> Estimate:
        """Return the mean of float64 [N], whose interval ends at the bounds of what it can be."""
        mean = float(values.mean())
        half = self._half(values, mean)
        return Estimate(mean) if half is None else Estimate(mean, max(mean - half, least), min(mean + half, most))

    def quantile(self, values: Values, share: float) -> Estimate:
        """Return the value below which a share of float64 [N] lies, interpolated between neighbours."""
        value = float(np.quantile(values, share))
        below = (values <= value).astype(np.float64)
        half = self._half(below, float(below.mean()))
        if half is None:
            return Estimate(value)
        low, high = np.quantile(values, (max(share - half, 0.0), min(share + half, 1.0))).tolist()
        return Estimate(value, low, high)

    def _half(self, values: Values, mean: float) -> float | None:
        """Return half the width of the mean's interval; None with a single window. As ``WindowStats.stderr``."""
        windows = len(self._counts)
        if windows < 2:
            return None
        residuals = np.bincount(self._of_token, values, windows) - self._counts * mean
        stderr = math.sqrt(windows / (windows - 1) * float(residuals @ residuals)) / len(values)
        return half_width(stderr, windows)
