"""Plans as JSON: what ``Plan.to_json`` and ``Plan.from_json`` do."""

from __future__ import annotations

import json
import os

from klfast.errors import CheckpointError, KlfastError
from klfast.files import write_atomic
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
    text = json.dumps(data, indent=1) + "\n"
    if path is not None:
        write_atomic(path, text)
    return text


def read(path: str | os.PathLike[str]) -> Plan:
    """The plan in a file that ``write`` made.

    Raises:
        CheckpointError: no such file, truncated, or no plan.
    """
    name = os.fspath(path)
    try:
        with open(name, encoding="utf-8") as file:
            data = json.load(file)
    except OSError as error:
        raise CheckpointError(f"cannot read a plan from {name}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{name} is truncated or no JSON ({error}); make the plan anew") from error
    if not isinstance(data, dict) or data.get("schema") != SCHEMA:
        raise CheckpointError(f"{name} is no plan (its schema is not {SCHEMA!r}); give what klfast plan wrote")
    try:
        fingerprint = data["fingerprint"]
        return Plan(
            {str(layer): QuantSpec.parse(spec) for layer, spec in data["specs"].items()},
            str(data["method"]),
            fingerprint and Fingerprint(str(fingerprint["structure"]), tuple(map(float, fingerprint["norms"]))),
            {str(key): float(value) for key, value in data["predicted"].items()},
            tuple(map(str, data["notes"])),
        )
    except (KeyError, TypeError, ValueError, AttributeError, KlfastError) as error:
        raise CheckpointError(f"{name} is damaged ({type(error).__name__}: {error}); make the plan anew") from error
