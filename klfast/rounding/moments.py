"""Second moments of a layer's inputs: all that rounding needs to know of the calibration text."""

from __future__ import annotations

import torch


class Moments:
    """Sums over tokens, float32 on the inputs' device.

    Attributes:
        hessian: [K, K], y^T y of the inputs y in the partly rounded model.
        cross: [K, K], y^T x with the inputs x in the full-precision model.
        tokens: their number.
        are_paired: False once inputs were left out since those of the two models are not of the same tokens.
    """

    def __init__(self, k: int, device: torch.device) -> None:
        self.hessian, self.cross = (torch.zeros(k, k, device=device) for _ in range(2))
        self.tokens, self.are_paired = 0, True

    def add(self, student: torch.Tensor, teacher: torch.Tensor) -> None:
        """Add the inputs of more tokens, [..., K] each."""
        y, x = (inputs.reshape(-1, inputs.shape[-1]).float() for inputs in (student, teacher))
        self.hessian.addmm_(y.T, y)
        self.cross.addmm_(y.T, x)
        self.tokens += len(y)

    def why_useless(self) -> str:
        """Return why they say too little to round by, a clause; empty if they say enough."""
        if not self.are_paired:
            return "only some of the tokens reach it"
        needed = len(self.hessian)
        if self.tokens < needed:
            return f"only {self.tokens} of the {needed} tokens that are needed reach it"
        return "" if self.hessian.any() else "its input is always 0"
