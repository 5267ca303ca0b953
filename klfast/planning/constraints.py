"""Precisions that the user's patterns fix before any budget."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from klfast.core.errors import InvalidInputError
from klfast.models.selection import Patterns, matching, select
from klfast.quant.spec import QuantSpec

FULL = "full"  # in ``keep``, the same as None

Keep = Mapping[str, "QuantSpec | str | None"]


def settled(
    names: Iterable[str], layers: Patterns | None = None, exclude: Patterns | None = None, keep: Keep | None = None
) -> dict[str, QuantSpec | None]:
    """Return the fixed precision of each layer that has one, by name; other layers may have any.

    Args:
        names: all linear layers.
        layers: patterns (see klfast.models.selection) of the only layers that may be quantized.
        exclude: patterns of layers that stay in full precision.
        keep: pattern -> spec, or None or "full" for full precision.

    Raises:
        InvalidInputError: a malformed pattern or spec, or two arguments that contradict each other about a layer.
        UnknownLayerError: a pattern selects no layer.
    """
    names = list(names)
    free = set(names) if layers is None and exclude is None else set(select(names, layers, exclude))
    found: dict[str, QuantSpec | None] = {name: None for name in names if name not in free}
    chosen_by: dict[str, str] = {}
    for pattern, spec in _parsed(keep).items():
        for name in matching(pattern, names):
            if name not in free and spec is not None:
                raise InvalidInputError(
                    f"keep asks for {spec} on {name}, which layers or exclude leave in full precision; "
                    "change one of them"
                )
            if found.get(name, spec) != spec:
                raise InvalidInputError(
                    f"keep asks for two precisions of {name}, by {chosen_by[name]!r} and by {pattern!r}; "
                    "narrow one of them"
                )
            found[name], chosen_by[name] = spec, pattern
    return {name: found[name] for name in names if name in found}


def _parsed(keep: Keep | None) -> dict[str, QuantSpec | None]:
    if keep is None:
        return {}
    if not isinstance(keep, Mapping):
        raise InvalidInputError(
            f"keep must map patterns to specs, such as {{'lm_head': 'int8-g64-sym'}}, got {type(keep).__name__}"
        )
    return {pattern: None if spec is None or spec == FULL else QuantSpec.of(spec) for pattern, spec in keep.items()}
