"""The KL card of two models, and its JSON format. Figures bear the names of llama.cpp's ``llama-perplexity``."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from klfast.core import signed_json
from klfast.core.errors import CheckpointError
from klfast.core.signed_json import is_a, number, whole
from klfast.evaluation.windowed import Estimate

SCHEMA = "klfast-comparison/1"
KLD, SAME_TOP, LOG_PPL_RATIO = "Mean KLD", "Same top p", "Mean ln(PPL(Q)/PPL(base))"
_REMEDY = "compare the models again"


@dataclass(frozen=True)
class Part:
    """The figures of some of the tokens.

    Attributes:
        first, last: what the tokens have in common lies between them; ``last`` is None if there is no upper end.
        tokens: how many there are.
        figures: "Mean KLD", "Same top p" and "Mean ln(PPL(Q)/PPL(base))", as in ``Comparison``.
    """

    first: int
    last: int | None
    tokens: int
    figures: Mapping[str, Estimate]

    def __str__(self) -> str:
        if self.last is None:
            return f"{self.first} or more"
        return f"{self.first}" if self.first == self.last else f"{self.first} to {self.last}"


@dataclass(frozen=True)
class Comparison:
    """How a model's next-token predictions (Q) differ from a teacher's (base), on a text.

    Attributes:
        tokens: predicted tokens, T - 1 of each window of T.
        windows: the windows, which the confidence intervals rest on.
        figures: by name, each with its 95 % confidence interval. In nats a token: "Mean KLD" of KL(base || Q), "Median
            KLD", "90.0% KLD", "99.0% KLD", "99.9% KLD", "Maximum KLD"; klfast's own "Mean reverse KLD" of KL(Q || base)
            and "Mean JSD" (Jensen-Shannon); "Mean ln(PPL(Q)/PPL(base))". "Mean PPL(Q)" and "Mean PPL(base)" are
            perplexities. As shares, 0 to 1: "Same top p", how often both have the same most likely token; "Mean Δp" and
            "RMS Δp", the change of the right token's probability.
        by_position: the parts of the text by the number of tokens before the predicted one: up to 64, 128, 256 ...
        by_frequency: by how often the predicted token occurs among all predicted ones: 1, up to 4, 16, 64 ...
        provenance: free-form facts (the models, the text, versions).
    """

    tokens: int
    windows: int
    figures: Mapping[str, Estimate]
    by_position: tuple[Part, ...] = ()
    by_frequency: tuple[Part, ...] = ()
    provenance: Mapping[str, object] = field(default_factory=dict)

    def to_data(self) -> dict[str, object]:
        """Return the comparison as values that JSON can hold; infinities become the text "inf"."""
        return {
            "schema": SCHEMA,
            "tokens": self.tokens,
            "windows": self.windows,
            "figures": _figures_data(self.figures),
            **{
                name: [
                    {"first": p.first, "last": p.last, "tokens": p.tokens, "figures": _figures_data(p.figures)}
                    for p in parts
                ]
                for name, parts in (("by_position", self.by_position), ("by_frequency", self.by_frequency))
            },
            "provenance": dict(self.provenance),
        }

    def to_json(self, path: str | os.PathLike[str] | None = None) -> str:
        """Return the comparison as JSON text; write it atomically to ``path`` if given."""
        return signed_json.write(self.to_data(), path)

    @classmethod
    def from_json(cls, source: str | os.PathLike[str]) -> Comparison:
        """Read a file or text that ``to_json`` wrote.

        Raises:
            CheckpointError: no such file, or it is truncated, altered or not a comparison.
        """
        found, origin = signed_json.read(source, "a comparison", _REMEDY)
        data: dict[str, Any] = found if isinstance(found, dict) else {}
        if data.get("schema") != SCHEMA:
            raise CheckpointError(
                f"{origin} is not a comparison (its schema is not {SCHEMA!r}); give a file that klfast compare wrote"
            )
        with signed_json.parsed(origin, _REMEDY):
            return cls(
                whole(data["tokens"], "tokens", 1),
                whole(data["windows"], "windows", 1),
                _figures(data["figures"]),
                _parts(data["by_position"]),
                _parts(data["by_frequency"]),
                dict(is_a(dict, data["provenance"], "provenance")),
            )


def _figures_data(figures: Mapping[str, Estimate]) -> dict[str, dict[str, float | str | None]]:
    def plain(value: float | None) -> float | str | None:
        return value if value is None or math.isfinite(value) else str(value)

    return {
        name: {"value": plain(one.value), "low": plain(one.low), "high": plain(one.high)}
        for name, one in figures.items()
    }


def _figures(data: Mapping[str, Mapping[str, Any]]) -> dict[str, Estimate]:
    def read(value: Any, name: str) -> float:
        return math.inf if value == "inf" else number(value, name)

    def bound(value: Any, name: str) -> float | None:
        return None if value is None else read(value, name)

    return {
        name: Estimate(read(one["value"], name), bound(one["low"], name), bound(one["high"], name))
        for name, one in data.items()
    }


def _parts(data: list[Mapping[str, Any]]) -> tuple[Part, ...]:
    return tuple(
        Part(
            whole(one["first"], "first"),
            None if one["last"] is None else whole(one["last"], "last"),
            whole(one["tokens"], "tokens", 1),
            _figures(one["figures"]),
        )
        for one in data
    )
