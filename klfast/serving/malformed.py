"""What is wrong with a body that does not fit ``klfast.serving.requests``, in the names of the API."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from klfast.serving.requests import FORMS, HALF

_OBJECT = "Input should be an object"  # pydantic names its classes
_SAID = {"model_type": _OBJECT, "model_attributes_type": _OBJECT, "dict_type": _OBJECT, "string_unicode": HALF}


def complaint(error: Mapping[str, Any]) -> tuple[str, str | None]:
    """Return the message about one of FastAPI's validation errors, and the parameter that it is about, if any."""
    place = error["loc"][1:]
    if error["type"] == "json_invalid":
        return f"the body is not JSON: {error['ctx']['error']}", None
    if not place and isinstance(error["input"], bytes):  # FastAPI has not parsed it
        return "the body is not declared to be JSON; send Content-Type: application/json", None
    if error["type"] != "extra_forbidden":  # there the last part is the client's own word
        place = [part for part in place if part not in FORMS]
    param = ".".join(str(part) for part in place)
    reason = _SAID.get(error["type"], error["msg"].removeprefix("Value error, "))
    return f"{param or 'the body'}: {reason}", param or None
