"""Plans as JSON: what ``Plan.to_json`` and ``Plan.from_json`` do."""

from __future__ import annotations

import json
import math
import os

from klfast.errors import CheckpointError
from klfast.files import parse_json, write_atomic
from klfast.types import Fingerprint, Plan, QuantSpec

SCHEMA = "klfast-plan/1"


def write(plan: Plan, path: str | os.PathLike[str] | None) -> str:
    """The plan as JSON text, written to ``path`` if given."""
    fingerprint = plan.fingerprint and {"structure": plan.fingerprint.structure, "norms": list(plan.fingerprint.norms)}
    data = {
        "schema": SCHEMA,
        "method": plan.method,
        "fingerprint": fingerprint,
        "specs": {name: str(spec) for name, spec in plan.specs.items()},
        "predicted": dict(plan.predicted),
        "notes": list(plan.notes),
    }
    text = json.dumps(data, indent=1, allow_nan=False) + "\n"
    if path is not None:
        write_atomic(path, text)
    return text


def read(source: str | os.PathLike[str]) -> Plan:
    """The plan in a file that ``write`` made, or in its JSON text (recognized by the opening brace).

    Raises:
        CheckpointError: no such file, truncated, or no plan.
    """
    text, where = _text(source)
    try:
        data = parse_json(text)
    except ValueError as error:
        raise CheckpointError(f"{where} is truncated or no JSON ({error}); make the plan anew") from error
    if not isinstance(data, dict) or data.get("schema") != SCHEMA:
        raise CheckpointError(f"{where} is no plan (its schema is not {SCHEMA!r}); give what klfast plan wrote")
    try:
        return _plan(data)
    except (KeyError, TypeError, ValueError) as error:
        what = f"it lacks {error}" if isinstance(error, KeyError) else str(error)
        raise CheckpointError(f"{where} is damaged ({what}); make the plan anew") from error


def _text(source: str | os.PathLike[str]) -> tuple[str, str]:
    if isinstance(source, str) and source.lstrip()[:1] == "{":
        return source, "the JSON text"
    where = os.fspath(source)
    try:
        with open(where, encoding="utf-8") as file:
            return file.read(), where
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise CheckpointError(f"cannot read a plan from {where}: {reason}") from error


def _plan(data: dict[str, object]) -> Plan:
    specs = {name: QuantSpec.parse(_is(spec, str, f"the spec of {name}")) for name, spec in _is(data["specs"], dict, "specs").items()}
    predicted = {name: _number(value, name) for name, value in _is(data["predicted"], dict, "predicted").items()}
    notes = tuple(_is(note, str, "a note") for note in _is(data["notes"], list, "notes"))
    fingerprint = data["fingerprint"]
    if fingerprint is not None:
        fields = _is(fingerprint, dict, "fingerprint")
        norms = tuple(_number(norm, "a norm") for norm in _is(fields["norms"], list, "norms"))
        fingerprint = Fingerprint(_is(fields["structure"], str, "structure"), norms)
    return Plan(specs, _is(data["method"], str, "method"), fingerprint, predicted, notes)


def _is(value: object, kind: type, what: str) -> object:
    if not isinstance(value, kind):
        raise ValueError(f"{what} is {value!r}, not a {kind.__name__}")
    return value


def _number(value: object, what: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not -math.inf < value < math.inf:
        raise ValueError(f"{what} is {value!r}, not a finite number")
    return value
