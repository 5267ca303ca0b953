"""Plans and their JSON format."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field

from klfast.core import signed_json
from klfast.core.arguments import check_activation
from klfast.core.errors import CheckpointError, InvalidInputError
from klfast.core.signed_json import is_a, number
from klfast.models.fingerprint import Fingerprint
from klfast.quant.spec import SCALES, QuantSpec

SCHEMA = "klfast-plan/1"
_REMEDY = "create the plan again"
_ENTRIES = ("schema", "method", "fingerprint", "specs", "predicted", "notes")
_ADDED = ("scale", signed_json.DIGEST)  # plans of klfast 0.1.0 have neither, later ones have both
_OPTIONAL = ("activations",)


@dataclass(frozen=True)
class Plan:
    """A precision for each linear layer.

    Attributes:
        specs: layer name -> spec (a QuantSpec, or its text). Layers not named keep full precision. A stack of experts
            is named as a whole, "...experts.gate_up_proj", or its experts one by one, "...experts.gate_up_proj.17".
        method: "optimal", "greedy" or "uniform".
        fingerprint: the model that the plan was made for; None if made from published files.
        predicted: the plan's expected cost, as far as known: "bytes" of all tensors of the saved model (its files add
            headers: names, shapes and offsets), "mean_bits" per quantizable weight (scales and zero points included),
            "kl" in nats per token (the sum over layers), "perplexity" on the calibration text, estimated as if the
            layers' contributions to the cross-entropy were additive, "seconds" a token in the layers' products.
        notes: anything that the planner changed or found, one sentence each.
        scale: the choice of scales in the sweep and when the plan is applied, "absmax" or "mse"; None if unknown.
        activations: quantized layer -> "exact" or "int8" (see ``klfast.dequant_matmul``); empty if the plan is silent.
    """

    specs: Mapping[str, QuantSpec]
    method: str
    fingerprint: Fingerprint | None = None
    predicted: Mapping[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    scale: str | None = None
    activations: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.specs, Mapping):
            raise InvalidInputError(
                f"the specs of a plan must be a mapping from layer names to specs, got {type(self.specs).__name__}"
            )
        object.__setattr__(self, "specs", {name: QuantSpec.of(spec) for name, spec in self.specs.items()})
        if self.scale not in (None, *SCALES):
            raise InvalidInputError(
                f"the scale of a plan must be {' or '.join(SCALES)}, or None if not known, got {self.scale!r}"
            )
        for name, activation in self.activations.items():
            if name not in self.specs:
                raise InvalidInputError(f"the plan has an activation for {name}, but no spec; give it one")
            check_activation(f"{name}: ", activation)

    def to_json(self, path: str | os.PathLike[str] | None = None) -> str:
        """Return the plan as JSON text; write it atomically to ``path`` if given."""
        return write(self, path)

    @classmethod
    def from_json(cls, source: str | os.PathLike[str]) -> Plan:
        """Read a plan that ``to_json`` wrote. Layer names and the model are checked when the plan is applied.

        Args:
            source: a path, or the JSON text itself (recognized by its opening brace).

        Raises:
            CheckpointError: no such file, or it is truncated, altered or not a plan.
        """
        return read(source)


def write(plan: Plan, path: str | os.PathLike[str] | None) -> str:
    """Return the plan as JSON text with its digest; write it to ``path`` if given.

    Raises:
        InvalidInputError: the plan holds something that JSON lacks, such as a NaN.
    """
    made_for = plan.fingerprint
    data = {
        "schema": SCHEMA,
        "method": plan.method,
        "fingerprint": made_for and made_for.to_data(),
        "specs": {name: str(spec) for name, spec in plan.specs.items()},
        "predicted": dict(plan.predicted),
        "notes": list(plan.notes),
        "scale": plan.scale,
        **({"activations": dict(plan.activations)} if plan.activations else {}),
    }
    try:
        return signed_json.write(data, path)
    except (TypeError, ValueError) as error:
        raise InvalidInputError(
            f"the plan cannot be written as JSON ({error}); its numbers must be finite, its notes text"
        ) from error


def read(source: str | os.PathLike[str]) -> Plan:
    """Return the plan in a file that ``write`` wrote, or in its JSON text (recognized by the opening brace).

    Raises:
        CheckpointError: no such file, or it is truncated, altered or not a plan.
    """
    found, origin = signed_json.read(source, "a plan", _REMEDY, verified=False)
    data = found if isinstance(found, dict) else {}
    if data.get("schema") != SCHEMA:
        if str(data.get("schema")).startswith("klfast-sensitivities/"):
            raise CheckpointError(f"{origin} holds sensitivities; make a plan from them first (klfast plan)")
        raise CheckpointError(
            f"{origin} is not a klfast plan (its schema is not {SCHEMA!r}); give a file that klfast plan wrote"
        )
    with signed_json.parsed(origin, _REMEDY):
        _check_entries(data)
        plan = _plan(data)
    try:
        signed_json.verify(data, origin, _REMEDY)
    except CheckpointError as error:
        remedy = f"{_REMEDY}, or if you edited it remove {' and '.join(_ADDED)}"
        raise CheckpointError(
            f"{origin} is damaged (its content does not match its {signed_json.DIGEST}); {remedy}"
        ) from error
    return plan


def _check_entries(data: dict[str, object]) -> None:
    """Raise unless the entries are those of a plan: a digest under a damaged name would not be verified."""
    if unknown := [name for name in data if name not in (*_ENTRIES, *_ADDED, *_OPTIONAL)]:
        raise ValueError(f"it has an unknown entry {unknown[0]!r}")
    missing = [name for name in _ADDED if name not in data]
    if 0 < len(missing) < len(_ADDED):
        raise KeyError(missing[0])


def _plan(data: dict[str, object]) -> Plan:
    texts = {name: is_a(str, text, f"the spec of {name}") for name, text in is_a(dict, data["specs"], "specs").items()}
    specs = {name: QuantSpec.of(text) for name, text in texts.items()}
    predicted = {name: _finite(value, name) for name, value in is_a(dict, data["predicted"], "predicted").items()}
    notes = tuple(is_a(str, note, "a note") for note in is_a(list, data["notes"], "notes"))
    scale, made_for = data.get("scale"), data["fingerprint"]
    return Plan(
        specs,
        is_a(str, data["method"], "method"),
        None if made_for is None else Fingerprint.from_data(made_for),
        predicted,
        notes,
        None if scale is None else is_a(str, scale, "scale"),
        is_a(dict, data.get("activations", {}), "activations"),
    )


def _finite(value: object, what: str) -> float:
    checked = number(value, what)
    return value if isinstance(value, int) else checked  # bytes stay an int
