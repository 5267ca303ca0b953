"""Measured plans of many sizes, and their JSON format."""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass, field

from klfast.core import signed_json
from klfast.core.errors import CheckpointError
from klfast.core.signed_json import is_a, number
from klfast.planning.plan_file import Plan

SCHEMA = "klfast-front/1"
_REMEDY = "run klfast pareto again"
_FIGURES = ("kl", "perplexity", "tokens_per_second")


@dataclass(frozen=True)
class FrontPoint:
    """A plan and what was measured of the model that it makes.

    Attributes:
        kind: "planned", "uniform" or "full".
        plan: with its predictions.
        spec: of a uniform plan, as asked for; else None.
        kl: KL(full precision || plan), nats per token.
        kl_stderr: its standard error, NaN with a single window.
        perplexity: on the same text.
        tokens_per_second: of decoding one text.
    """

    kind: str
    plan: Plan
    spec: str | None
    kl: float
    kl_stderr: float
    perplexity: float
    tokens_per_second: float

    @property
    def nbytes(self) -> float:
        """Bytes of the whole model."""
        return self.plan.predicted["bytes"]

    @property
    def label(self) -> str:
        """What the point is, such as "planned, 4.50 bits a weight"."""
        if self.kind == "planned":
            return f"planned, {self.plan.predicted['mean_bits']:.2f} bits a weight"
        return "full precision" if self.kind == "full" else f"uniform {self.spec}"


@dataclass(frozen=True)
class Front:
    """Measured plans.

    Attributes:
        points: by their bytes.
        provenance: what they were measured on: model, text, rounding, machine, versions ...
    """

    points: tuple[FrontPoint, ...]
    provenance: dict[str, object] = field(default_factory=dict)

    def is_best(self, point: FrontPoint) -> bool:
        """Return True if no other point is as small and has less KL, or is smaller and has no more."""
        return not any(
            (one.nbytes <= point.nbytes and one.kl < point.kl) or (one.nbytes < point.nbytes and one.kl <= point.kl)
            for one in self.points
        )

    def to_json(self, path: str | os.PathLike[str] | None = None) -> str:
        """Return the front as JSON text; write it atomically to ``path`` if given."""
        points = [
            {
                "kind": one.kind,
                "plan": json.loads(one.plan.to_json()),
                "spec": one.spec,
                "kl_stderr": None if math.isnan(one.kl_stderr) else one.kl_stderr,
                **{name: getattr(one, name) for name in _FIGURES},
            }
            for one in self.points
        ]
        return signed_json.write({"schema": SCHEMA, "points": points, "provenance": dict(self.provenance)}, path)

    @classmethod
    def from_json(cls, source: str | os.PathLike[str]) -> Front:
        """Read a file or text that ``to_json`` wrote.

        Raises:
            CheckpointError: no such file, or it is truncated, altered or not a front.
        """
        found, origin = signed_json.read(source, "a front", _REMEDY)
        data = found if isinstance(found, dict) else {}
        if data.get("schema") != SCHEMA:
            raise CheckpointError(
                f"{origin} is not a front (its schema is not {SCHEMA!r}); give a file that klfast pareto wrote"
            )
        with signed_json.parsed(origin, _REMEDY):
            points = tuple(map(_point, is_a(list, data["points"], "points")))
            return cls(points, dict(is_a(dict, data["provenance"], "provenance")))


def _point(data: object) -> FrontPoint:
    entry = is_a(dict, data, "a point")
    stderr, spec = entry["kl_stderr"], entry["spec"]
    return FrontPoint(
        is_a(str, entry["kind"], "a kind"),
        Plan.from_json(json.dumps(is_a(dict, entry["plan"], "a plan"))),
        None if spec is None else is_a(str, spec, "a spec"),
        number(entry["kl"], "kl"),
        math.nan if stderr is None else number(stderr, "kl_stderr"),
        *(number(entry[name], name) for name in _FIGURES[1:]),
    )
