"""Plausibility checks of config.json: without them, transformers may compute for hours before it fails."""

from __future__ import annotations

import math
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from klfast.core.errors import CheckpointError, shortened

_LAYER_COUNT = re.compile(r"(^|_)layers?$")  # num_hidden_layers, n_layer, decoder_layers ...


def check_config(config: Mapping[str, Any], path: Path, stored: int) -> None:
    """Refuse numbers that no saved model has.

    Args:
        config: content of config.json, including nested configurations.
        path: path of config.json.
        stored: the number of tensors that the weights are stored in.

    Raises:
        CheckpointError: there are far more layers than tensors, or the time step's limits are not two numbers.
    """
    for key, value in config.items():
        if key == "time_step_limit":
            if value is not None and not _is_range(value):
                reason = f"time_step_limit must be two numbers, the smaller first, got {shortened(repr(value), 80)}"
                raise CheckpointError(f"{path}: {reason}; fetch or save it again")
        elif isinstance(value, Mapping):
            check_config(value, path, stored)
        elif isinstance(value, int) and _LAYER_COUNT.search(key) and value > _most(stored):
            raise _too_large(path, stored)


def register_own(config: object) -> None:
    """Register the model of a config.json with transformers' Auto classes if it is one of klfast's own."""
    if isinstance(config, Mapping) and config.get("model_type") == "hymba":
        import klfast.models.hymba  # noqa: F401  (registers it)


@contextmanager
def bounded(path: Path, stored: int) -> Iterator[None]:
    """Stop the construction of a model with far more parameters than the ``stored`` tensors could fill."""
    thread, left = threading.get_ident(), _most(stored)

    def count(*_: object) -> None:
        nonlocal left
        if threading.get_ident() == thread:
            left -= 1
            if left < 0:
                raise _too_large(path, stored)

    hook = nn.modules.module.register_module_parameter_registration_hook(count)
    try:
        yield
    finally:
        hook.remove()


def _most(stored: int) -> int:
    """Return the most parameters that loading creates: shared ones are stored once, and may be created repeatedly."""
    return 16 * stored + 10_000


def _too_large(path: Path, stored: int) -> CheckpointError:
    return CheckpointError(
        f"{path} describes a far larger model than the {stored} tensors stored; fetch or save it again"
    )


def _is_range(value: object) -> bool:
    numbers = [_number(part) for part in value] if isinstance(value, (list, tuple)) else []
    return len(numbers) == 2 and numbers[0] <= numbers[1]


def _number(part: object) -> float:
    """Return a number as a float, and NaN for anything else. transformers writes {"__float__": "Infinity"}."""
    if isinstance(part, Mapping):
        part = {"Infinity": math.inf, "-Infinity": -math.inf}.get(str(part.get("__float__")))
    try:
        return float(part) if isinstance(part, (int, float)) else math.nan
    except OverflowError:
        return math.nan
