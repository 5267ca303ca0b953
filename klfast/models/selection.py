"""Selection of layers by name or pattern."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from fnmatch import fnmatchcase

from klfast.core.errors import InvalidInputError, UnknownLayerError
from klfast.models.expert_names import stack_in

Patterns = str | Iterable[str]


def matching(pattern: str, names: Iterable[str]) -> list[str]:
    r"""Return the names that a pattern selects, in their own order.

    Args:
        pattern: a layer's name ("lm_head", "backbone.layers.0.mixer.in_proj"), its last parts ("in_proj"), either with
            shell wildcards, where ``*`` crosses dots ("layers.0.*", "*_proj"), or "re:" and a regular expression that
            matches from the start of the name, as in compressed-tensors ("re:.*layers\.[0-3]\."). What selects a stack
            of experts selects each of its experts: "experts.down_proj" also "...experts.down_proj.17".
        names: module names.

    Raises:
        InvalidInputError: the pattern is not a string, or not a regular expression after "re:".
        UnknownLayerError: it selects nothing; the message names the closest layer.
    """
    if not isinstance(pattern, str):
        raise InvalidInputError(f"a pattern for layers must be a string, got {type(pattern).__name__}")
    names = list(names)
    if pattern.startswith("re:"):
        try:
            regex = re.compile(pattern[3:])
        except re.error as error:
            raise InvalidInputError(f"{pattern!r} is not a regular expression: {error}") from None
        found = [name for name in names if regex.match(name) or regex.match(stack_in(name))]
    else:
        either = (pattern, f"*.{pattern}")
        found = [
            name
            for name in names
            if any(fnmatchcase(each, glob) for each in dict.fromkeys((name, stack_in(name))) for glob in either)
        ]
    if not found:
        endings = {name.rpartition(".")[2] for name in names}
        close = difflib.get_close_matches(pattern, [*names, *sorted(endings)], 1)
        raise UnknownLayerError(
            f"no linear layer matches {pattern!r}" + (f"; did you mean {close[0]!r}?" if close else "")
        )
    return found


def select(names: Iterable[str], layers: Patterns | None = None, exclude: Patterns | None = None) -> list[str]:
    """Return the names that ``layers`` selects (all if None) and ``exclude`` does not, in their own order.

    Raises:
        InvalidInputError: a pattern is malformed, or nothing is left.
        UnknownLayerError: a pattern selects no name.
    """
    names = list(names)
    wanted = (
        set(names) if layers is None else {name for pattern in _listed(layers) for name in matching(pattern, names)}
    )
    unwanted = set() if exclude is None else {name for pattern in _listed(exclude) for name in matching(pattern, names)}
    chosen = [name for name in names if name in wanted and name not in unwanted]
    if not chosen:
        raise InvalidInputError("the patterns leave no linear layer; name more in layers, or fewer in exclude")
    return chosen


def _listed(patterns: Patterns) -> list[str]:
    if isinstance(patterns, str):
        return [patterns]
    if not isinstance(patterns, Iterable):
        raise InvalidInputError(f"patterns for layers must be text or a list of texts, got {type(patterns).__name__}")
    return list(patterns)
