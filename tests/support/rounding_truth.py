"""The truth for second-order rounding: GPTQ as published, and the objective from inputs instead of moments."""

import numpy as np
import torch

DAMPING = 0.01


def inputs(tokens, k, seed=0, rank=None):
    """Return correlated inputs of different sizes, float64 [tokens, K], as a model's are."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(rank or k, k, generator=generator, dtype=torch.float64)
    sizes = torch.logspace(-1, 1, k, dtype=torch.float64)[torch.randperm(k, generator=generator)]
    return torch.randn(tokens, rank or k, generator=generator, dtype=torch.float64) @ (mix / k**0.5) * sizes


def objectives(weight, rounded, y, x=None):
    """Return |y V^T - x W^T|^2 / T + d |V - W|^2 of each row of rounded weights V, float64 [N]."""
    tokens, weight, rounded = len(y), weight.double(), rounded.double()
    damping = DAMPING * y.square().sum(0).mean() / tokens
    output = (y @ rounded.T - (y if x is None else x) @ weight.T).square().sum(0) / tokens
    return output + damping * (rounded - weight).square().sum(1)


def gptq_by_elimination(target, hessian, step, low, high):
    """Round the columns of target [N, K] in the order of falling diagonal; each one leaves the inverse Hessian.

    Algorithm 1 of Frantar et al. without its blocks and its Cholesky factor: after each column the rest makes up for
    its error, and the inverse loses its row and column by one step of Gaussian elimination (their equations 2 and 3).
    step, low and high are [N, K], a scale and the range of codes for each weight.
    """
    w, step, low, high = (np.asarray(each, dtype=np.float64).copy() for each in (target, step, low, high))
    damped = np.asarray(hessian, dtype=np.float64) + DAMPING * np.mean(np.diag(hessian)) * np.eye(len(hessian))
    inverse, codes = np.linalg.inv(damped), np.zeros_like(w)
    for k in np.argsort(-np.diag(damped), kind="stable"):
        codes[:, k] = np.clip(np.round(w[:, k] / step[:, k]), low[:, k], high[:, k])
        error = (w[:, k] - codes[:, k] * step[:, k]) / inverse[k, k]
        w -= np.outer(error, inverse[k])
        inverse = inverse - np.outer(inverse[:, k], inverse[k]) / inverse[k, k]
    return torch.from_numpy(codes)
