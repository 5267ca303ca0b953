"""Outputs and groups of the state-space ops, for every backend."""

from __future__ import annotations

import torch


def empty_channel_last(x: torch.Tensor) -> torch.Tensor:
    """Return an uninitialised [B, D, L], [B, L, D] in memory: a linear layer takes it next, transposed."""
    batch, channels, length = x.shape
    if length == 1:  # the same memory; a step need not pay for the transposition
        return x.new_empty(batch, channels, 1)
    return x.new_empty(batch, length, channels).transpose(1, 2)


def groups_of(B: torch.Tensor, C: torch.Tensor) -> int:
    """Return the groups of a selective scan's B and C, each [B, G, N, L] or [D, N]; 1 if both are constant."""
    return next((t.shape[1] for t in (B, C) if t.dim() == 4), 1)
