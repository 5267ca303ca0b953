"""Precisions of single layers, with their bytes and costs."""

from __future__ import annotations

import math
from dataclasses import dataclass

from klfast.quant.spec import SHAPE_BYTES, QuantSpec

# Sums and rates of costs within this range stay within floats. Above it is damage, like an infinity; below it is 0.
_TINY, TOO_LARGE = 1e-100, 1e100


@dataclass(frozen=True)
class Choice:
    """One precision of one layer.

    Attributes:
        spec: as it will be stored; None for full precision.
        nbytes: bytes of the layer in that precision, as saved.
        cost: the quantity being minimised, additive over layers.
        kl: measured KL in nats per token, None if it was not measured.
        delta_ce: measured growth of the cross-entropy, nats per token; None if it was not measured.
        measured: the spec that the cost was measured with.
        activation: "int8" if the layer rounds its input, whose costs are then in those above; else "exact".
        seconds: of its product with a token, if it was timed.
    """

    spec: QuantSpec | None
    nbytes: int
    cost: float
    kl: float | None
    delta_ce: float | None
    measured: QuantSpec | None = None
    activation: str = "exact"
    seconds: float | None = None

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weights with scales and zero points, from which bits per weight are computed."""
        return self.nbytes if self.spec is None else self.nbytes - SHAPE_BYTES


Picks = dict[str, Choice]  # a choice for each of some layers


def bytes_of(picks: Picks) -> int:
    """Return the bytes of some choices together, as saved."""
    return sum(choice.nbytes for choice in picks.values())


def cost_of(metric: str, mean: float) -> float:
    """Return the additive cost of one measurement."""
    if metric == "sqnr_db":  # noise power relative to the signal's
        return 10.0 ** (-mean / 10.0) if mean > -3000 else math.inf
    if metric == "top1_agree":
        return 1.0 - mean
    return mean


def counted(cost: float) -> float:
    """Return a cost, or 0 if it is negative or tiny."""
    return cost if cost > _TINY else 0.0


def unique(full: Choice, found: list[Choice]) -> list[Choice]:
    """Return one choice per stored spec that is smaller than full precision, by falling bytes, then bits.

    Of two measured specs that are stored as the same one, the one that needed no change counts.
    """
    by_spec: dict[QuantSpec, Choice] = {}
    for choice in found:
        spec = choice.spec
        if spec is not None and choice.nbytes < full.nbytes and (spec not in by_spec or spec == choice.measured):
            by_spec[spec] = choice
    ordered = sorted(by_spec, key=lambda spec: (-by_spec[spec].nbytes, -spec.bits, spec))
    return [full, *(by_spec[spec] for spec in ordered)]
