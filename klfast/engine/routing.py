"""How the tokens of a mixture meet its experts."""

from __future__ import annotations

from typing import NamedTuple

from klfast.core.errors import CannotLowerError
from klfast.engine.columns import Columns


class Routing(NamedTuple):
    """How a router chooses experts for a token, by their scores, and weighs them.

    Attributes:
        each: experts that a token meets.
        sigmoid: scores are sigmoids of the logits; else their softmax.
        normalise: the scores of the chosen are divided by ``epsilon`` and their sum.
        epsilon: see there.
        factor: multiplies the weights.
        rounds: scores and the result of each step after them are in the model's dtype; else in float32.
        wide: logits and weights are float32; else in the model's dtype.
        groups: the experts lie in so many groups.
        open_groups: number of groups whose experts a token may meet: those whose two best scores add up to most.
    """

    each: int
    sigmoid: bool = False
    normalise: bool = True
    epsilon: float = 0.0
    factor: float = 1.0
    rounds: bool = False
    wide: bool = False
    groups: int = 1
    open_groups: int = 1

    def require_experts(self, name: str, count: int) -> None:
        """Raise CannotLowerError if the router of that name cannot choose among so many experts."""
        if count % self.groups or self.open_groups > self.groups:
            raise CannotLowerError(f"{name}: {count} experts in {self.groups} groups, {self.open_groups} open")
        if self.each > (most := count // self.groups * self.open_groups):
            raise CannotLowerError(f"{name}: a token meets {self.each} of {most} experts")


class Routes(NamedTuple):
    """Which experts the tokens meet.

    Attributes:
        experts: of the mixture.
        chosen: columns of the experts' numbers, as float32, an expert each.
        weights: columns of their weights.
    """

    experts: int
    chosen: Columns
    weights: Columns
