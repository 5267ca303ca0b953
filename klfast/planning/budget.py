"""Budgets of plans."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from klfast.core.errors import InfeasibleBudgetError, InvalidInputError
from klfast.planning.choices import Choice, Picks, bytes_of
from klfast.planning.notes import some
from klfast.planning.numbers_given import require_number
from klfast.planning.problem import KL_METRICS, Problem

_ANY_BITS = 1e6  # more bits per weight than any model has


def summed_cost(picks: Mapping[str, Choice]) -> float:
    """Return the cost of some choices together."""
    return math.fsum(choice.cost for choice in picks.values())


@dataclass(frozen=True)
class Budget:
    """A limit on the summed size of the quantizable layers (bytes, or seconds a token), or on the summed cost.

    Attributes:
        name: the argument of klfast.plan that it came from.
        value: as the user gave it.
        limit: the largest allowed sum of sizes (see ``size``) or of costs.
        in_seconds: sizes are seconds, not bytes.
    """

    name: str
    value: float
    limit: float
    in_seconds: bool = False

    @classmethod
    def of(cls, problem: Problem, objective: str, **budgets: float | None) -> Budget | None:
        """Return the one budget that is not None (max_bytes, mean_bits, max_seconds, max_kl); None if all are."""
        given = {name: value for name, value in budgets.items() if value is not None}
        in_seconds = objective == "latency"
        if in_seconds and not given.keys() & {"max_seconds", "max_kl"}:
            raise InvalidInputError(
                "objective='latency' goes with max_seconds, or with max_kl, within which it finds the fewest seconds"
            )
        if not given:
            return None
        if len(given) > 1:
            raise InvalidInputError(f"give one budget, not {' and '.join(given)}")
        [(name, value)] = given.items()
        number = require_number(name, value, 0.0)
        in_seconds |= name == "max_seconds"
        if in_seconds and problem.timings is None:
            raise InvalidInputError(f"a plan by {name} counts seconds, which needs timings (klfast.time_products)")
        if name == "max_seconds":
            return cls(name, value, number * (1 + 1e-12), in_seconds)  # so that a plan's own seconds suffice for it
        if name == "max_bytes":
            return cls(name, value, math.floor(value) - problem.other_bytes)
        if name == "mean_bits":
            # Rounded up by less than a byte, so that a plan's own predicted mean_bits suffices for it.
            return cls(name, value, math.floor(min(number, _ANY_BITS) * problem.n_weights / 8 * (1 + 1e-12)))
        if problem.metric not in KL_METRICS:
            raise InvalidInputError(
                f"max_kl limits a KL, but the metric is {problem.metric}; use {' or '.join(KL_METRICS)}, or max_bytes"
            )
        return cls(name, value, number, in_seconds)

    @property
    def limits_size(self) -> bool:
        """True if sizes are limited, False if costs are."""
        return self.name != "max_kl"

    def size(self, choice: Choice) -> float:
        """Return the bytes or seconds counted against the budget; under max_kl, those being minimised."""
        if self.in_seconds:
            assert choice.seconds is not None  # as the problem has timings
            return choice.seconds
        return choice.weight_bytes if self.name == "mean_bits" else choice.nbytes

    def sizes(self, picks: Mapping[str, Choice]) -> float:
        """Return the bytes or seconds of some choices that count against the budget."""
        return (math.fsum if self.in_seconds else sum)(map(self.size, picks.values()))

    def counted(self, choice: Choice) -> float:
        """Return what of a choice counts against the budget: its size or its cost."""
        return self.size(choice) if self.limits_size else choice.cost

    def used(self, picks: Picks) -> float:
        """Return the sum of sizes or of costs that counts against the budget."""
        return self.sizes(picks) if self.limits_size else summed_cost(picks)

    def met(self, picks: Picks) -> bool:
        """Return True if the choices are within the budget."""
        return self.used(picks) <= self.limit

    def require(self, problem: Problem, smallest: Picks, remedy: str, kind: str = "plan") -> None:
        """Raise InfeasibleBudgetError unless ``smallest``, the smallest plan of its kind, meets the budget."""
        if self.met(smallest):
            return
        used = self.used(smallest)
        total = bytes_of(smallest) + problem.other_bytes
        if self.name == "max_bytes":
            what, least = f"{math.floor(self.value):,} bytes", f"{total:,} bytes"
        elif self.name == "mean_bits":
            what, least = f"{self.value:g} bits per weight", f"{8 * used / problem.n_weights:.4f} ({total:,} bytes)"
        elif self.name == "max_seconds":
            what, least = f"{self.value:g} seconds a token", f"{used:.6g}"
        else:
            what, least = f"a KL of {self.value:g} nats per token", f"{used:.6g}"
        if problem.servable:
            least, remedy = f"{least} in a servable plan", f"{remedy}, or do without servable"
            if whole := [name for name in problem.settled if name not in problem.asked]:
                least += f", which leaves {some(whole)} in full precision"
        if problem.asked:
            least, remedy = f"{least} under these patterns", f"{remedy}, or leave the planner more layers"
        if problem.n_left_out:
            remedy += f" ({problem.n_left_out} measurements are left out: {problem.metric} is not finite)"
        raise InfeasibleBudgetError(f"no {kind} meets {what}: the smallest reachable is {least}; {remedy}")
