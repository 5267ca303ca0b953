"""Which KL cards are of the model that a plan makes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from klfast.evaluation.comparison import Comparison
from klfast.models.fingerprint import Fingerprint
from klfast.models.precisions import by_stack, digest
from klfast.planning.plan_file import Plan


def cards_of(plan: Plan, comparisons: Sequence[Comparison], layers: Iterable[str]) -> list[Comparison]:
    """Return the comparisons of the plan's own model, with each layer in the plan's precision, with the plan's base.

    Args:
        plan: to look for.
        comparisons: those whose provenance does not have the precisions (``klfast.compare`` alone, or klfast 0.1.0) are
            of no plan.
        layers: the names of all layers, experts one by one if the plan has them so.
    """
    expected = digest(by_stack(plan.specs, layers))
    return [
        one
        for one in comparisons
        if one.provenance.get("precisions_sha256") == expected and _is_base(plan, one.provenance.get("fingerprint"))
    ]


def _is_base(plan: Plan, recorded: object) -> bool:
    """Return True if a card's base is the model that the plan was made for, as far as the plan knows it."""
    try:
        return plan.fingerprint is None or plan.fingerprint.matches(Fingerprint.from_data(recorded))
    except (KeyError, ValueError):  # an edited file
        return False
