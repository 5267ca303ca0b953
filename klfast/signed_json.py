"""JSON files that carry a digest of what they hold, so that damage does not pass for data."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping

from klfast.errors import CheckpointError
from klfast.files import parse_json, write_atomic

DIGEST = "sha256"  # the name of the digest among the other entries


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


def read(source: str | os.PathLike[str], what: str, remedy: str) -> tuple[object, str]:
    """The data in a JSON file or text, and how to call the source in messages.

    A digest is checked where there is one: files of klfast 0.1.0, and those of others, have none.

    Args:
        source: a path, or the JSON text itself (recognized by its opening brace or bracket).
        what: what the file should hold, for messages ("sensitivities", "a plan").
        remedy: what to do about a damaged file, the end of a message.

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
            raise CheckpointError(f"cannot read {what} from {origin}: {getattr(error, 'strerror', None) or error}") from error
    try:
        data = parse_json(text)
    except ValueError as error:
        raise CheckpointError(f"{origin} is truncated or no JSON ({error}); {remedy}") from error
    if isinstance(data, dict) and DIGEST in data:
        try:
            intact = data[DIGEST] == digest(data)
        except RecursionError:
            intact = False
        if not intact:
            raise CheckpointError(f'{origin} is damaged (its content does not match its "{DIGEST}"); {remedy}, or remove that entry if you edited the file')
    return data, origin


def digest(data: Mapping[str, object]) -> str:
    """SHA-256 of all entries but the digest itself, whatever their order and the white space between them."""
    content = {name: value for name, value in data.items() if name != DIGEST}
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
