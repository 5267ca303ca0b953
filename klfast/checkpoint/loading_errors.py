"""Conversion of the errors that transformers and the hub's client raise into one line with a remedy."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from klfast.core.errors import CheckpointError, InvalidInputError, KernelUnavailableError, shortened
from klfast.core.io import parse_json

_UNREACHABLE = "it is not in the local cache, and the hub cannot be reached; give a local folder instead"
# Reasons by class name of an error or of one that it was raised from. The first that matches counts.
_TYPES = {
    "GatedRepoError": "the hub grants access to it only after you accepted its terms and logged in",
    "RepositoryNotFoundError": "the hub has no such model; check the id, or log in if it is private",
    "RevisionNotFoundError": "the hub has no such version of it",
    "HFValidationError": "that is not a hub id, which reads owner/name",
    "LocalEntryNotFoundError": _UNREACHABLE,
    "OfflineModeIsEnabled": _UNREACHABLE,
    "EntryNotFoundError": "the hub's model has no such file",
}
NEEDS_CODE = (
    "it needs its own Python code; if you trust its source, allow that with trust_remote_code (--trust-remote-code)"
)
# Reasons by a part of the message, for errors without a class of their own.
_TEXTS = {"trust_remote_code": NEEDS_CODE}


@contextmanager
def one_line_errors(source: str, what: str, quantized_by: str | None = None) -> Iterator[None]:
    """Turn off transformers' progress bars and reports, and convert its multi-line errors to klfast's.

    Args:
        source: the folder or hub id that is loaded.
        what: "model" or "tokenizer".
        quantized_by: the method that the model's weights are quantized with, if not klfast's.
    """
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    except (CheckpointError, InvalidInputError, KernelUnavailableError):
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":  # tokenizers' Rust code
            raise
        reason = _reason(error, source, quantized_by)
        if not os.path.exists(source):  # perhaps what was meant, though it looks like a hub id
            reason = f"there is no such file or folder here; as a hub id: {reason}"
        raise CheckpointError(f"cannot load the {what} of {source}: {reason}") from error
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _reason(error: BaseException, source: str, quantized_by: str | None) -> str:
    kinds = {kind.__name__ for one in _chain(error) for kind in type(one).__mro__}
    text = str(error)
    first = first_sentence(text) or type(error).__name__
    if found := next((reason for kind, reason in _TYPES.items() if kind in kinds), None):
        return found
    if found := next((reason for piece, reason in _TEXTS.items() if piece in text), None):
        return found
    if quantized_by is not None:
        return f"its weights are quantized with {quantized_by} ({first}); load the full-precision model instead"
    if "ImportError" in kinds:
        return f"{first}; install the missing package"
    if damaged := _damaged_json(source):
        return f"{damaged} is not valid JSON; fetch or save it again"
    return f"{first}; fetch or save it again"


def first_sentence(text: str) -> str:
    """Return the first line of a message, and the second one if the first only introduces it."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return shortened(" ".join(lines[: 2 if lines and lines[0].endswith(":") else 1]), 300).rstrip(".:")


def _damaged_json(source: str) -> str | None:
    """Return the name of a JSON file of a local folder that cannot be parsed; None if there is none."""
    for path in sorted(Path(source).glob("*.json")) if os.path.isdir(source) else []:
        try:
            parse_json(path.read_bytes())
        except (OSError, ValueError):
            return path.name
    return None


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__
