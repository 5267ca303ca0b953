"""JSON files with a digest of their content, so that damage is detected."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TypeVar

from klfast.core.errors import CheckpointError, KlfastError
from klfast.core.io import parse_json, write_atomic

DIGEST = "sha256"  # the entry that holds the digest of the others
_KINDS: dict[type, str] = {dict: "an object", list: "a list", str: "a string", bool: "true or false"}
_T = TypeVar("_T")


def write(data: Mapping[str, object], path: str | os.PathLike[str] | None = None) -> str:
    """Return ``data`` and its digest as JSON text; write it atomically to ``path`` if given.

    Raises:
        ValueError: ``data`` holds a NaN or an infinity, which JSON lacks.
    """
    content = {name: value for name, value in data.items() if name != DIGEST}
    text = json.dumps({**content, DIGEST: digest(content)}, indent=1, allow_nan=False) + "\n"
    if path is not None:
        write_atomic(path, text)
    return text


def read(source: str | os.PathLike[str], what: str, remedy: str, *, verified: bool = True) -> tuple[object, str]:
    """Return the data of a JSON file or text, and the source's name for messages.

    A digest is verified if there is one: files of klfast 0.1.0 or from elsewhere have none.

    Args:
        source: a path, or the JSON text itself (recognized by its opening brace or bracket).
        what: the expected content, for messages ("sensitivities", "a plan").
        remedy: what to do about a damaged file, the end of a message.
        verified: False leaves the digest to a later ``verify``, for callers that can first report a more precise error.

    Raises:
        CheckpointError: no such file, not UTF-8, truncated, not JSON, or different from its digest.
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
        except (OSError, ValueError) as error:  # ValueError: an impossible path
            reason = getattr(error, "strerror", None) or error
            raise CheckpointError(f"cannot read {what} from {origin}: {reason}") from error
    try:
        data = parse_json(text)
    except ValueError as error:
        raise CheckpointError(f"{origin} is truncated or not valid JSON ({error}); {remedy}") from error
    if verified:
        verify(data, origin, remedy)
    return data, origin


def verify(data: object, origin: str, remedy: str) -> None:
    """Raise CheckpointError, with the remedy, if the data from ``origin`` have a digest that does not match."""
    if not isinstance(data, dict) or DIGEST not in data:
        return
    try:
        intact = data[DIGEST] == digest(data)
    except RecursionError:
        intact = False
    if not intact:
        raise CheckpointError(
            f'{origin} is damaged (its content does not match its "{DIGEST}"); {remedy}, '
            "or remove that entry if you edited the file"
        )


def digest(data: Mapping[str, object]) -> str:
    """Return the SHA-256 of all entries except the digest itself, independent of their order and of white space."""
    content = {name: value for name, value in data.items() if name != DIGEST}
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


@contextmanager
def parsed(origin: str, remedy: str) -> Iterator[None]:
    """Raise CheckpointError, with the remedy, for what reading entries from ``origin`` raises: they are damaged."""
    try:
        yield
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, OverflowError, KlfastError) as error:
        what = f"it lacks {error}" if isinstance(error, KeyError) else str(error)
        raise CheckpointError(f"{origin} is damaged ({what}); {remedy}") from error


def is_a(kind: type[_T], value: object, what: str) -> _T:
    """Return ``value``; raise ValueError, naming ``what``, unless it is of the ``kind`` dict, list, str or bool."""
    if not isinstance(value, kind):
        raise ValueError(f"{what} is {_shown(value)}, not {_KINDS[kind]}")
    return value


def number(value: object, what: str, *, most: float = sys.float_info.max) -> float:
    """Return ``value`` as a float; raise ValueError, naming ``what``, unless it is a number up to +-``most``."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not -most <= value <= most:
        bound = f" of at most {most:.3g}" if most < sys.float_info.max else ""
        raise ValueError(f"{what} is {_shown(value)}, not a finite number{bound}")
    return float(value)


def whole(value: object, what: str, least: int = 0) -> int:
    """Return ``value``; raise ValueError, naming ``what``, unless it is a 64-bit int, at least ``least``."""
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value < 2**63:
        raise ValueError(f"{what} is {_shown(value)}, not an integer of at least {least}")
    return value


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."
