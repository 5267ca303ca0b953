"""The precision of each matrix of a model, and its digest, by which a plan's own model is recognised."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping

from torch import nn

from klfast.models.expert_names import expert_name, stack_in
from klfast.models.matrices import matrices
from klfast.nn import QuantLinear
from klfast.nn.split_stack import SplitStack
from klfast.quant.spec import QuantSpec


def precisions(model: nn.Module) -> dict[str, QuantSpec]:
    """Return the spec of each quantized matrix, and of each quantized expert where those of a stack differ."""
    found: dict[str, QuantSpec] = {}
    for name, one in matrices(model).items():
        if isinstance(one.holder, QuantLinear):
            found[name] = one.holder.spec
        elif isinstance(one.holder, SplitStack):
            found |= {expert_name(name, expert): layer.spec for expert, layer in one.holder.layers()}
    return found


def by_stack(specs: Mapping[str, QuantSpec], names: Iterable[str]) -> dict[str, QuantSpec]:
    """Return specs with a stack in the place of its experts if all of those among ``names`` have one spec."""
    of_stack: dict[str, set[QuantSpec | None]] = {}
    for name in names:
        of_stack.setdefault(stack_in(name), set()).add(specs.get(name))
    whole = {stack for stack, found in of_stack.items() if len(found) == 1 and None not in found}
    return {stack_in(name) if stack_in(name) in whole else name: spec for name, spec in specs.items()}


def digest(specs: Mapping[str, QuantSpec]) -> str:
    """Return the SHA-256 of the matrices' names and specs, whatever their order."""
    listed = sorted((name, str(spec)) for name, spec in specs.items())
    return hashlib.sha256(json.dumps(listed).encode()).hexdigest()
