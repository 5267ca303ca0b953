"""Seconds that a token spends in products with matrices, by shape and format, and their JSON format."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from klfast.core import signed_json
from klfast.core.arguments import check_activation
from klfast.core.errors import CheckpointError, InvalidInputError, ModelMismatchError
from klfast.core.signed_json import is_a, number, whole
from klfast.quant.spec import QuantSpec
from klfast.sensitivity.results import Sensitivities

SCHEMA = "klfast-timings/1"
FULL = "full"  # full precision, in files
_REMEDY = "delete it to measure again, or name another file"
_CONDITIONS = ("machine", "tier", "threads", "dtype")


class Product(NamedTuple):
    """A product of one row with an [N, K] matrix: its shape, its spec (None: full precision), the activation."""

    shape: tuple[int, int]
    spec: QuantSpec | None
    activation: str = "exact"


@dataclass(frozen=True)
class Timings:
    """Measured seconds of products.

    Attributes:
        conditions: "machine", "tier" and "threads" that they were measured with, "dtype" of activations and of matrices
            in full precision.
        versions: of klfast and torch.
        structure: of the model, see ``klfast.models.fingerprint``; None if it is not known.
        seconds: the median of each product's seconds.
    """

    conditions: Mapping[str, object]
    versions: Mapping[str, str]
    structure: str | None
    seconds: Mapping[Product, float]

    def of(self, product: Product) -> float:
        """Return the seconds of a product.

        Raises:
            InvalidInputError: it was not measured.
        """
        if product not in self.seconds:
            n, k = product.shape
            raise InvalidInputError(
                f"the timings have no {n} x {k} matrix in {product.spec or 'full precision'} with {product.activation} "
                "activations; measure them again for these sensitivities"
            )
        return self.seconds[product]

    def require_model(self, sensitivities: Sensitivities) -> None:
        """Raise ModelMismatchError if the timings are of a model with other layers."""
        known = None if sensitivities.fingerprint is None else sensitivities.fingerprint.structure
        if None not in (known, self.structure) and known != self.structure:
            raise ModelMismatchError("the timings are of a model with other layers; measure them again for this one")

    def require_conditions(self, wanted: Mapping[str, object], origin: str) -> None:
        """Raise InvalidInputError if the timings of the file ``origin`` were measured under other conditions."""
        for name in _CONDITIONS:
            if self.conditions[name] != wanted[name]:
                known = f"{origin} has timings with {name} {self.conditions[name]}"
                raise InvalidInputError(f"{known}, but here it is {wanted[name]}; {_REMEDY}")

    def to_json(self, path: str | os.PathLike[str] | None = None) -> str:
        """Return the timings as JSON text; write it atomically to ``path`` if given."""
        products = [
            {"shape": list(shape), "format": str(spec or FULL), "activation": activation, "seconds": seconds}
            for (shape, spec, activation), seconds in self.seconds.items()
        ]
        data = {
            "schema": SCHEMA,
            **self.conditions,
            "versions": dict(self.versions),
            "structure": self.structure,
            "products": products,
        }
        return signed_json.write(data, path)

    @classmethod
    def from_json(cls, source: str | os.PathLike[str]) -> Timings:
        """Read timings that ``to_json`` wrote.

        Args:
            source: a path, or the JSON text itself (recognized by its opening brace).

        Raises:
            CheckpointError: no such file, or it is truncated, altered or holds no timings.
        """
        found, origin = signed_json.read(source, "timings", _REMEDY)
        data = found if isinstance(found, dict) else {}
        if data.get("schema") != SCHEMA:
            raise CheckpointError(f"{origin} does not hold timings (its schema is not {SCHEMA!r}); name another file")
        with signed_json.parsed(origin, _REMEDY):
            versions, structure = is_a(dict, data["versions"], "versions"), data["structure"]
            return cls(
                {name: data[name] for name in _CONDITIONS},
                {name: is_a(str, version, name) for name, version in versions.items()},
                None if structure is None else is_a(str, structure, "structure"),
                dict(map(_product, is_a(list, data["products"], "products"))),
            )


def _product(data: object) -> tuple[Product, float]:
    entry = is_a(dict, data, "a product")
    rows, columns = (whole(size, "a shape", 1) for size in is_a(list, entry["shape"], "a shape"))
    text, activation = is_a(str, entry["format"], "a format"), is_a(str, entry["activation"], "an activation")
    check_activation("", activation)
    seconds = number(entry["seconds"], "seconds")
    if seconds <= 0:
        raise ValueError(f"a product takes {seconds} seconds")
    return Product((rows, columns), None if text == FULL else QuantSpec.parse(text), activation), seconds
