"""What second-order rounding minimises: the squared change of a layer's output on calibration text.

Let x be the inputs in the full-precision model and y those in the partly rounded one, [T, K] each. A weight W [N, K] is
rounded to the V that minimises |y V^T - x W^T|^2 + d |V - W|^2. Up to a constant, that is (V - U) H (V - U)^T summed
over the rows, with H = y^T y + d I and U^T = H^-1 (y^T x + d I) W^T. Where x is not given, U is W: GPTQ's objective
(Frantar et al., arXiv 2210.17323). d, the damping, keeps V near W where the text says nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from klfast.core.errors import InvalidInputError

_DAMPING = 0.01  # of the mean of H's diagonal, as in GPTQ; ten times as much until H has a Cholesky factor


@dataclass(frozen=True, eq=False)
class Objective:
    """The objective of a layer; float32 on its device.

    Attributes:
        hessian: [K, K], H.
        correction: [K, K], H^-1 (y^T x + d I), by which W^T becomes the target; None if that is W^T itself.
        order: int64 [K], the input features, those with the largest mean square first.
        feedback: [K, K], upper triangular with a diagonal of ones, in that order. H is feedback diag(c) feedback^T:
            the objective of a row with errors e is the sum over k of c_k (e_k + sum over j < k of e_j feedback_jk)^2.
    """

    hessian: torch.Tensor
    correction: torch.Tensor | None
    order: torch.Tensor
    feedback: torch.Tensor

    @classmethod
    def of(cls, hessian: torch.Tensor, cross: torch.Tensor | None = None) -> Objective:
        """Make it from y^T y and y^T x, both [K, K], divided by the number of tokens or not.

        Raises:
            InvalidInputError: the hessian is 0, or has a NaN or an infinity.
        """
        second = hessian.detach().cpu().double()  # some GPUs have no float64
        mean = second.diagonal().mean().item()
        if not (second.isfinite().all() and mean > 0):
            raise InvalidInputError("the Hessian must be finite and not 0; are its inputs?")
        rising = second.diagonal().argsort(stable=True)
        damping, info = _DAMPING * mean, 1
        while info:
            damped = second + damping * torch.eye(len(second), dtype=torch.float64)
            # The factor of the reversed matrix is lower triangular; reversed, it is the upper one with H = R R^T.
            factor, found = torch.linalg.cholesky_ex(damped[rising][:, rising])
            info = int(found)
            damping *= 10
        upper = factor.flip(0, 1)
        correction = None
        if cross is not None:
            shift = damped - second
            solved = torch.cholesky_solve((cross.detach().cpu().double() + shift)[rising], factor)
            correction = torch.empty_like(solved)
            correction[rising] = solved
        device = hessian.device
        return cls(
            damped.float().to(device),
            None if correction is None else correction.float().to(device),
            rising.flip(0).to(device),
            (upper / upper.diagonal()).float().to(device),
        )

    def target(self, matrix: torch.Tensor) -> torch.Tensor:
        """Return U^T [K, N] for W^T [K, N]."""
        return matrix if self.correction is None else self.correction @ matrix

    def errors(self, values: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Return each row's objective, [N], for V^T and U^T [K, N]."""
        error = values - target
        return (error * (self.hessian @ error)).sum(0)
