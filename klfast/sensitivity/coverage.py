"""Coverage of a sweep: which layers it has not measured, and whether it has ended."""

from __future__ import annotations

from collections.abc import Mapping

from klfast.core.errors import InvalidInputError
from klfast.sensitivity.results import Measurement, Sensitivities


def require_measurements(sensitivities: Sensitivities) -> None:
    """Raise InvalidInputError if nothing was measured."""
    if not sensitivities.layers or not sensitivities.measurements:
        raise InvalidInputError(
            f"the sensitivities hold no measurements; {unfinished_note(sensitivities) or 'run klfast.sweep first'}"
        )


def unmeasured(sensitivities: Sensitivities) -> list[str]:
    """Return the linear layers without any measurement, in module order."""
    measured = {name for name, _ in sensitivities.measurements}
    return [name for name in sensitivities.layers if name not in measured]


def unfinished_note(sensitivities: Sensitivities) -> str | None:
    """Return a sentence on what a stopped sweep has not measured yet; None if the sweep has ended."""
    done, total = _progress(sensitivities)
    if done >= total:
        return None
    missing = len(unmeasured(sensitivities))
    if missing:
        found = f"{missing} of {len(sensitivities.layers)} layers have not been measured yet"
    else:
        found = f"it has measured {done} of {total} parts of the calibration text"
    return f"the sweep is unfinished: {found}; run it again to go on"


def share_measured(sensitivities: Sensitivities) -> float:
    """Return the share of the calibration text that a sweep has measured, 1 if that is not known."""
    done, total = _progress(sensitivities)
    return done / total if total > 0 else 1.0


def windows_of(sensitivities: Sensitivities, measurement: Measurement) -> int:
    """Return how many windows a measurement is a mean over, 0 if that is not known.

    Older files say only how many the whole text has.
    """
    whole = sensitivities.provenance.get("windows")
    known = round(whole * share_measured(sensitivities)) if isinstance(whole, int) else 0
    return measurement.windows or known


def tokens_text(sensitivities: Sensitivities) -> str:
    """Return on how many tokens the measurements are: "1,024 tokens", or "31 to 248 tokens" where they differ."""
    least, most = tokens_of(sensitivities)
    return f"{most:,} tokens" if least == most else f"{least:,} to {most:,} tokens"


def tokens_of(sensitivities: Sensitivities) -> tuple[int, int]:
    """Return the fewest and the most tokens that a measurement is on, 0 without measurements."""
    tokens = [one.tokens for one in sensitivities.measurements.values()]
    return min(tokens, default=0), max(tokens, default=0)


def measured_note(sensitivities: Sensitivities) -> str | None:
    """Return a sentence on what a sweep did not measure in full; None if it did."""
    found, vocabulary = sensitivities.measurements, sensitivities.provenance.get("vocabulary", "full")
    derived = sum(one.is_derived for one in found.values())
    least, most = tokens_of(sensitivities)
    parts = []
    if least < most:
        parts.append(f"each on {tokens_text(sensitivities)}")
    if vocabulary != "full":
        entries = "in part" if vocabulary == "mixed" else f"{vocabulary} entries a token"
        parts.append(f"KL from a sample of the vocabulary ({entries})")
    if derived:
        parts.append(f"{derived} of {len(found)} measurements follow from another spec of the layer")
    if broken := not_finite_note(sensitivities):
        parts.append(broken)
    return "; ".join(parts) or None


def not_finite_note(sensitivities: Sensitivities) -> str | None:
    """Return a sentence on the candidates that made a NaN or an infinity; None if none did."""
    return left_out_note(sensitivities.provenance)


def broken_candidates(provenance: Mapping[str, object]) -> list[object]:
    """Return the candidates that made a NaN or an infinity, as a sweep names them."""
    found = provenance.get("not_finite")
    return found if isinstance(found, list) else []


def left_out_note(provenance: Mapping[str, object]) -> str | None:
    """Return ``not_finite_note`` by the provenance alone, which studies have, too."""
    broken = broken_candidates(provenance)
    if not broken:
        return None
    more = f" and {len(broken) - 1} more" if broken[1:] else ""
    return f"{broken[0]}{more} left out: the model's outputs become NaN or infinite"


def _progress(sensitivities: Sensitivities) -> tuple[int, int]:
    """Return the number of measured parts of the calibration text and of all its parts; (0, 0) if unknown."""
    parts = sensitivities.provenance.get("micro_batches")
    if isinstance(parts, (list, tuple)) and len(parts) == 2 and all(type(part) is int for part in parts):
        return parts[0], parts[1]
    return 0, 0
