"""Whether a config.json can be meant: what no transformers class checks before it computes for hours, or fails later."""

from __future__ import annotations

import math
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from torch import nn

from klfast.core.errors import CheckpointError, shortened

_LAYER_COUNT = re.compile(r"(^|_)layers?$")  # num_hidden_layers, n_layer, decoder_layers ...


def check_config(config: Mapping, path: Path, stored: int) -> None:
    """Refuse numbers that no saved model has.

    Args:
        config: what config.json holds, with the configurations within it.
        path: of config.json.
        stored: how many tensors the weights are stored in.

    Raises:
        CheckpointError: it asks for far more layers than there are tensors, or limits time steps by other than two numbers.
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


@contextmanager
def bounded(path: Path, stored: int) -> Iterator[None]:
    """Stop the building of a model that has far more parameters than the ``stored`` tensors could fill."""
    thread, left = threading.get_ident(), _most(stored)

    def count(*_) -> None:
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
    """How many parameters may be made for so many stored tensors: shared ones are stored once, and loading makes each anew."""
    return 16 * stored + 10_000


def _too_large(path: Path, stored: int) -> CheckpointError:
    return CheckpointError(
        f"{path} describes a far larger model than the {stored} tensors stored; fetch or save it again"
    )


def _is_range(value: object) -> bool:
    numbers = [_number(part) for part in value] if isinstance(value, (list, tuple)) else []
    return len(numbers) == 2 and numbers[0] <= numbers[1]


def _number(part: object) -> float:
    """NaN, which no comparison holds for, unless it is a number. transformers writes infinity as {"__float__": "Infinity"}."""
    if isinstance(part, Mapping):
        part = {"Infinity": math.inf, "-Infinity": -math.inf}.get(str(part.get("__float__")))
    try:
        return float(part) if isinstance(part, (int, float)) else math.nan
    except OverflowError:
        return math.nan
