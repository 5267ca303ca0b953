"""Detection of modules whose call does something else than their class's author wrote: hooks, replaced forwards."""

from __future__ import annotations

from typing import Any

from torch import nn

_AUTHORS = ("torch", "transformers", "klfast")


def why_touched(module: nn.Module) -> str:
    """Return a clause that says what else calling a module does: hooks, or a forward of others; empty if nothing."""
    forward = module.__dict__.get("forward")
    # klfast's own carry a mark, which functools.wraps copies.
    if forward is not None and (not hasattr(forward, "klfast_original") or hasattr(forward, "__wrapped__")):
        return "has a replaced forward"
    return "has hooks" if module._forward_hooks or module._forward_pre_hooks else ""


def why_foreign(module_class: type[nn.Module]) -> str:
    """Return a clause that says why a class may do something else than its namesake; empty for those that klfast knows.

    It knows classes of torch, transformers and klfast with the forwards of their authors.
    """
    if not _is_authors(module_class.__module__):
        return f"is a {module_class.__name__} of {module_class.__module__}"
    if not has_its_own_forward(module_class):
        return f"is a {module_class.__name__}, whose forward has been replaced"
    return ""


def has_its_own_forward(module_class: type[nn.Module]) -> bool:
    """Return True if the class has its author's forward, False if another library has replaced or wrapped it."""
    home = next(one for one in module_class.__mro__ if "forward" in one.__dict__)
    forward: Any = module_class.forward
    while (inner := getattr(forward, "__wrapped__", None)) is not None:  # in decorators
        if not _is_authors(_module_of(forward)):
            return False
        forward = inner
    return _module_of(forward) == home.__module__


def is_known(function: object) -> bool:
    """Return True for a function of torch, transformers or klfast."""
    return _is_authors(_module_of(function))


def _module_of(function: Any) -> str:
    """Return the name of the module with a function's code, whatever its ``__module__`` says; empty if it has none."""
    name: str = getattr(function, "__globals__", {}).get("__name__", "")
    return name


def _is_authors(module_name: str) -> bool:
    return module_name.partition(".")[0] in _AUTHORS
