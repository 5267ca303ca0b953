"""Streaming means and standard errors of metrics over windows; the state can be saved and restored bit for bit."""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping

import torch

from klfast.core.errors import CheckpointError


class WindowStats:
    """Sums over windows, which yield each metric's mean over tokens and its standard error.

    Tokens of one window are correlated, windows are (nearly) not: the standard error is that of a ratio of window sums,
    sqrt(W / (W - 1) * sum_w (S_w - n_w m)^2) / N for W windows with n_w tokens and metric sums S_w, N = sum n_w and
    m = sum S_w / N. Windows may differ in length.
    """

    def __init__(self, candidates: int, metrics: int) -> None:
        self._parts = {
            "sum": torch.zeros(candidates, metrics, dtype=torch.float64),
            "square": torch.zeros(candidates, metrics, dtype=torch.float64),  # sum of S_w^2
            "cross": torch.zeros(candidates, metrics, dtype=torch.float64),  # sum of n_w S_w
            "counts": torch.zeros(candidates, 3, dtype=torch.float64),  # N, W, sum of n_w^2
        }

    def add(self, first: int, window_sums: torch.Tensor, tokens: int) -> None:
        """Add sums of B windows of ``tokens`` tokens each, float64 [C, metrics, B], to candidates from ``first`` on."""
        rows = slice(first, first + window_sums.shape[0])
        window_sums = window_sums.cpu()
        windows = window_sums.shape[-1]
        self._parts["sum"][rows] += window_sums.sum(-1)
        self._parts["square"][rows] += window_sums.square().sum(-1)
        self._parts["cross"][rows] += tokens * window_sums.sum(-1)
        self._parts["counts"][rows] += torch.tensor(
            [tokens * windows, windows, tokens * tokens * windows], dtype=torch.float64
        )

    def tokens(self, candidate: int) -> int:
        """Return the number of tokens added to a candidate."""
        return int(self._parts["counts"][candidate, 0])

    def windows(self, candidate: int) -> int:
        """Return the number of windows added to a candidate."""
        return int(self._parts["counts"][candidate, 1])

    def is_broken(self, candidate: int) -> bool:
        """Return True if a metric was NaN in any window."""
        return bool(self._parts["sum"][candidate].isnan().any())

    def mean(self, candidate: int) -> list[float]:
        """Return each metric's mean over tokens."""
        means: list[float] = (self._parts["sum"][candidate] / self._parts["counts"][candidate, 0]).tolist()
        return means

    def stderr(self, candidate: int) -> list[float]:
        """Return each mean's standard error: NaN with fewer than two windows, or where the metric is NaN."""
        tokens, windows, token_squares = self._parts["counts"][candidate].tolist()
        if windows < 2:
            return [math.nan] * self._parts["sum"].shape[1]
        mean = self._parts["sum"][candidate] / tokens
        square, cross = self._parts["square"][candidate], self._parts["cross"][candidate]
        squares = square - 2 * mean * cross + mean.square() * token_squares
        errors: list[float] = (squares.clamp(min=0) * windows / (windows - 1)).sqrt().div(tokens).tolist()
        return errors

    def to_data(self) -> dict[str, str]:
        """Return all sums, bit for bit, as values that JSON can hold."""
        return {name: base64.b64encode(part.numpy().tobytes()).decode() for name, part in self._parts.items()}

    def load(self, data: Mapping[str, str]) -> None:
        """Restore the sums from ``to_data``; raise CheckpointError if they do not fit."""
        for name, part in self._parts.items():
            try:
                raw = base64.b64decode(data[name], validate=True)
            except (KeyError, TypeError, ValueError) as error:
                raise CheckpointError(f"the sums of the sweep are damaged ({type(error).__name__}: {error})") from error
            if len(raw) != part.numel() * part.element_size():
                raise CheckpointError("the sums of the sweep are damaged (wrong size)")
            values = torch.frombuffer(bytearray(raw), dtype=part.dtype).view_as(part)
            if values.isinf().any() or (name == "counts" and not (values >= 0).all()):
                raise CheckpointError("the sums of the sweep are damaged (an infinity, or a count that is none)")
            part.copy_(values)
