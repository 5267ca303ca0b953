"""A plan as text for NNCF, for those who convert a model by themselves."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable

from torch import nn

from klfast.core.errors import InvalidInputError
from klfast.models.matrices import named_matrices, split_stacks
from klfast.nn.linear import QuantLinear

_Arguments = tuple[tuple[str, object], ...]


def scopes(model: nn.Module) -> str:
    """Return JSON: arguments of ``nncf.compress_weights``, which is called with each of them in turn.

    A call gives its precision to all layers that its patterns do not ignore; those of others and embeddings are
    ignored. The patterns match the names that optimum-intel gives to layers, and klfast's. NNCF rounds by itself, and
    has one scale a row in 8 bits.

    Raises:
        InvalidInputError: no layer is quantized, or the experts of a stack have different precisions.
    """
    held = named_matrices(model)
    if split := next(iter(split_stacks(model)), None):
        raise InvalidInputError(
            f"the experts of {split} have different precisions, which NNCF cannot be told; plan one for the whole "
            "stack (klfast plan --servable, or a sweep without --experts)"
        )
    names: dict[_Arguments, list[str]] = {}
    for name, matrix in held.items():
        if isinstance(matrix.holder, QuantLinear):
            names.setdefault(_call(matrix.holder), []).append(name)
    if not names:
        raise InvalidInputError("no layer of the model is quantized; export a folder of klfast quantize")
    embeddings = [name for name, module in model.named_modules() if isinstance(module, nn.Embedding)]
    calls = []
    for how, chosen in names.items():
        ignored = [*(name for name in held if name not in chosen), *embeddings]
        calls.append({**dict(how), "ignored_scope": {"patterns": _patterns(ignored), "validate": False}})
    return json.dumps(calls, indent=1) + "\n"


def _call(layer: QuantLinear) -> _Arguments:
    """Return the arguments of the call that gives a layer its precision; those of 8 bits take no groups."""
    spec = layer.spec
    symmetry = "sym" if spec.symmetric else "asym"
    if spec.bits > 4:
        return (("mode", f"int8_{symmetry}"),)
    return ("mode", f"int4_{symmetry}"), ("group_size", spec.group_size), ("ratio", 1.0), ("all_layers", True)


def _patterns(names: Iterable[str]) -> list[str]:
    return [rf"(.*\.)?{re.escape(name)}(/.*)?" for name in names]
