"""JSON files that carry a digest of what they hold, so that damage does not pass for data."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Mapping

from klfast.core.errors import CheckpointError
from klfast.core.io import parse_json, write_atomic

DIGEST = "sha256"  # the name of the digest among the other entries
_KINDS = {dict: "an object", list: "a list", str: "a string", bool: "true or false"}


def write(data: Mapping[str, object], path: str | os.PathLike[str] | None = None) -> str:
    """``data`` and its digest as JSON text, written to ``path`` if given (beside it first, then renamed over it).

    Raises:
        ValueError: ``data`` holds a NaN or an infinity, which JSON lacks.
    """
    content = {name: value for name, value in data.items() if name != DIGEST}
    text = json.dumps({**content, DIGEST: digest(content)}, indent=1, allow_nan=False) + "\n"
    if path is not None:
        write_atomic(path, text)
    return text


def read(source: str | os.PathLike[str], what: str, remedy: str, *, verified: bool = True) -> tuple[object, str]:
    """The data in a JSON file or text, and how to call the source in messages.

    A digest is checked where there is one: files of klfast 0.1.0, and those of others, have none.

    Args:
        source: a path, or the JSON text itself (recognized by its opening brace or bracket).
        what: what the file should hold, for messages ("sensitivities", "a plan").
        remedy: what to do about a damaged file, the end of a message.
        verified: False leaves the digest to a later ``verify``, for callers that can name a fault more closely first.

    Raises:
        CheckpointError: no such file, not UTF-8, truncated, no JSON, or not what its digest says.
    """
    if isinstance(source, str) and source.lstrip()[:1] in ("{", "["):
        text, origin = source, "the JSON text"
    else:
        origin = os.fspath(source)
        try:
            with open(origin, encoding="utf-8-sig") as file:
                text = file.read()
        except UnicodeDecodeError as error:
            raise CheckpointError(f"cannot read {what} from {origin}: it is not UTF-8 text") from error
        except (OSError, ValueError) as error:  # ValueError: a path that no system has
            raise CheckpointError(
                f"cannot read {what} from {origin}: {getattr(error, 'strerror', None) or error}"
            ) from error
    try:
        data = parse_json(text)
    except ValueError as error:
        raise CheckpointError(f"{origin} is truncated or no JSON ({error}); {remedy}") from error
    if verified:
        verify(data, origin, remedy)
    return data, origin


def verify(data: object, origin: str, remedy: str) -> None:
    """Raise CheckpointError, naming the remedy, if the data from ``origin`` have a digest and it is not theirs."""
    if not isinstance(data, dict) or DIGEST not in data:
        return
    try:
        intact = data[DIGEST] == digest(data)
    except RecursionError:
        intact = False
    if not intact:
        raise CheckpointError(
            f'{origin} is damaged (its content does not match its "{DIGEST}"); {remedy}, or remove that entry if you edited the file'
        )


def digest(data: Mapping[str, object]) -> str:
    """SHA-256 of all entries but the digest itself, whatever their order and the white space between them."""
    content = {name: value for name, value in data.items() if name != DIGEST}
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def is_a(kind: type, value: object, what: str) -> object:
    """``value``; ValueError, naming ``what`` it is, unless it is a dict, list, str or bool as asked."""
    if not isinstance(value, kind):
        raise ValueError(f"{what} is {_shown(value)}, not {_KINDS[kind]}")
    return value


def number(value: object, what: str, *, most: float = sys.float_info.max) -> float:
    """``value`` as a float; ValueError, naming ``what`` it is, unless it is a finite number of magnitude ``most`` at most."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not -most <= value <= most:
        raise ValueError(
            f"{what} is {_shown(value)}, not a finite number"
            + (f" of at most {most:.3g}" if most < sys.float_info.max else "")
        )
    return float(value)


def whole(value: object, what: str, least: int = 0) -> int:
    """``value``; ValueError, naming ``what`` it is, unless it is an int from ``least`` up to what 64 bits hold."""
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value < 2**63:
        raise ValueError(f"{what} is {_shown(value)}, not a whole number from {least} on")
    return value


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."
