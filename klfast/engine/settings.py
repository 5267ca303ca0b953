"""``plain_settings`` and ``hold``: notice that a setting of a module or a configuration was changed."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from types import BuiltinFunctionType, FunctionType
from typing import Any

import torch

_PLAIN = (bool, int, float, str, type(None), torch.dtype, FunctionType, BuiltinFunctionType)


def plain_settings(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """Return the attributes that are numbers, texts, dtypes, functions or None, and copies of containers of such."""
    return {
        name: copy.deepcopy(value) if isinstance(value, (tuple, list, dict)) else value
        for name, value in attributes.items()
        if _is_plain(value)
    }


def module_settings(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """Return the plain attributes of a module, and its configuration: not nn.Module's own attributes, nor a forward."""
    public = {
        name: value
        for name, value in attributes.items()
        if not name.startswith("_") and name not in ("training", "forward")
    }
    found = plain_settings(public)
    if "config" in public:
        found["config"] = public["config"]
    return found


def _is_plain(value: object) -> bool:
    if type(value) in (tuple, list):
        return all(map(_is_plain, value))  # type: ignore[call-overload]
    if type(value) is dict:
        return all(map(_is_plain, value.values()))
    return isinstance(value, _PLAIN)


def hold(settings: Mapping[str, Any], attributes: Mapping[str, Any]) -> bool:
    """Return whether attributes still have these settings; others may have come."""
    try:
        return settings.items() <= attributes.items()
    except (RuntimeError, ValueError):  # what a tensor or an array says that replaces a number
        return False
