"""What a plan says of each matrix of a model: its spec and its activation."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from klfast.core.errors import InvalidInputError
from klfast.models.expert_names import expert_in, expert_name
from klfast.models.matrices import Matrix, matrix, named_matrices, sharers
from klfast.planning.plan_file import Plan
from klfast.quant.spec import QuantSpec

Choice = tuple[QuantSpec, str]  # spec, activation


def choices(model: nn.Module, plan: Plan, activations: Mapping[str, str]) -> dict[str, Choice]:
    """Return the spec and activation of each matrix that a plan names, under the first of its names.

    A stack of experts of which the plan names each with the same choice is named as a whole; any other, expert by
    expert (``klfast.models.expert_names``).

    Raises:
        InvalidInputError: the plan has two choices for matrices that are one, or for a stack and one of its experts, or
            names an expert of a stack that is quantized already.
        UnknownLayerError: the model has no matrix of a name.
    """
    known = named_matrices(model)
    first = {name: names[0] for names in sharers(model) for name in names}
    chosen: dict[str, Choice] = {}
    for name, spec in plan.specs.items():
        choice, own = (spec, activations[name]), _first_name(model, name, known, first)
        for one, other in zip(chosen.setdefault(own, choice), choice, strict=True):
            if one != other:
                both = f"{other} for one and {one} for the other"
                raise InvalidInputError(f"{name} shares its weight with {own}, but the plan has {both}")
    return _by_stack(chosen, known)


def _first_name(model: nn.Module, name: str, known: Mapping[str, Matrix], first: Mapping[str, str]) -> str:
    if name in first:
        return first[name]
    if (of := expert_in(name)) and of[0] in known and known[of[0]].is_quantized:
        raise InvalidInputError(f"{of[0]} is quantized already; load the full-precision model again")
    matrix(model, name)  # raises, naming the closest
    assert of is not None
    return expert_name(first[of[0]], of[1])


def _by_stack(chosen: Mapping[str, Choice], known: Mapping[str, Matrix]) -> dict[str, Choice]:
    """Return the choices with whole stacks in the place of experts that all have one."""
    experts: dict[str, dict[str, Choice]] = {}
    for name, choice in chosen.items():
        if name not in known and (of := expert_in(name)):
            experts.setdefault(of[0], {})[name] = choice
    whole: dict[str, Choice] = {}
    for stack, each in experts.items():
        if stack in chosen:
            whole[stack] = chosen[stack]
            for name, choice in each.items():
                if choice != chosen[stack]:
                    spec, other = _text(chosen[stack]), _text(choice)
                    raise InvalidInputError(
                        f"the plan has {spec} for all of {stack}, but {other} for {name}; name the stack or its experts"
                    )
        elif len(each) == len(known[stack].held) and len(set(each.values())) == 1:
            whole[stack] = next(iter(each.values()))
    found: dict[str, Choice] = {}
    for name, choice in chosen.items():
        of = None if name in known else expert_in(name)
        found[of[0] if of and of[0] in whole else name] = choice
    return found


def _text(choice: Choice) -> str:
    spec, activation = choice
    return str(spec) if activation == "exact" else f"{spec} with {activation} activations"
