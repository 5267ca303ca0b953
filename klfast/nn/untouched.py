"""Detection of modules whose call does something else than their class: hooks, replaced forwards."""

from __future__ import annotations

from torch import nn


def why_touched(module: nn.Module) -> str:
    """Return a clause that says what else calling a module does: hooks, or a forward of others; empty if nothing."""
    forward = module.__dict__.get("forward")
    # klfast's own carry a mark, which functools.wraps copies.
    if forward is not None and (not hasattr(forward, "klfast_original") or hasattr(forward, "__wrapped__")):
        return "has a replaced forward"
    return "has hooks" if module._forward_hooks or module._forward_pre_hooks else ""
