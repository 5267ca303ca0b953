"""Calls of tools in what a model writes.

A call stands between two marks, in the form that the model's chat template asks for. Sources: the chat templates of
Qwen3, Granite 4.0 and Falcon-H1 (JSON), Qwen3.5 and Nemotron 3 (functions with parameters in tags), Nemotron Nano 2 and
Jamba (lists in JSON), LFM2 (a list of calls in Python).
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

MARKS = {
    "<tool_call>": "</tool_call>",
    "<tool_calls>": "</tool_calls>",
    "<TOOLCALL>": "</TOOLCALL>",
    "<|tool_call_start|>": "<|tool_call_end|>",
}
_NAME = re.compile(r"[\w.-]+")
_DEEPEST = 8  # references of a parameter's schema

Schemas = Mapping[str, Mapping[str, Any]]  # of functions' parameters, by the functions' names


class Call(NamedTuple):
    """A call of the function ``name`` with ``arguments``, an object in JSON."""

    name: str
    arguments: str


class ToolCallReader:
    """Takes calls out of a text that arrives in pieces.

    What may be the beginning of a call is held back, and white space in front of it, which belongs to the call, as does
    white space alone behind one. What stands between marks but cannot be read is text.

    Args:
        marks: those in MARKS with which the model's calls begin.
        schemas: of the functions that it may call.

    Attributes:
        count: the calls so far.
    """

    def __init__(self, marks: Iterable[str], schemas: Schemas) -> None:
        self._marks, self._schemas, self._held, self.count = tuple(marks), schemas, "", 0
        self._begin, self._longest = re.compile("|".join(map(re.escape, self._marks))), max(map(len, self._marks))

    def read(self, piece: str, finish: str | None) -> tuple[str, list[Call]]:
        """Return the text and the calls that this piece settles, after which the text may end: see ``Piece``."""
        self._held += piece
        text, calls = "", list[Call]()
        while begin := self._begin.search(self._held):
            end_mark = MARKS[begin[0]]
            end = self._held.find(end_mark, begin.end())
            if end < 0 and finish != "stop":
                break
            if end < 0:  # a stop string or an end token may stand for it
                end = len(self._held)
            [*_, last] = self._begin.finditer(self._held, begin.start(), end)  # the model may have named marks before
            found = _calls(self._held[begin.end() : end], self._schemas)
            if found is None and last.start() > begin.start():
                begin, found = last, _calls(self._held[last.end() : end], self._schemas)
            end += len(end_mark)
            text += self._held[:end] if found is None else self._held[: begin.start()].rstrip()
            calls += found or []
            self._held = self._held[end:]
        self.count += len(calls)
        if finish is not None:
            return text + ("" if self.count and self._held.isspace() else self._held), calls
        settled = self._held[: self._open() if begin is None else begin.start()].rstrip()
        self._held = self._held[len(settled) :]
        return text + settled, calls

    def _open(self) -> int:
        """Return where what is held ends in the beginning of a mark; its length if it does not."""
        held = self._held
        places = range(max(0, len(held) - self._longest + 1), len(held))
        return next((at for at in places if any(mark.startswith(held[at:]) for mark in self._marks)), len(held))


class ForcedCallReader:
    """Takes calls out of a text that is nothing but a list of them in JSON, if it is complete.

    Attributes:
        count: the calls so far.
    """

    def __init__(self) -> None:
        self._held, self.count = "", 0

    def read(self, piece: str, finish: str | None) -> tuple[str, list[Call]]:
        """Return the text and the calls that this piece settles, after which the text may end: see ``Piece``."""
        self._held += piece
        if finish is None:
            return "", []
        calls = _calls(self._held, {}) or []
        self.count = len(calls)
        return "" if calls else self._held, calls


Reader = ToolCallReader | ForcedCallReader


def schema_of_calls(tools: Sequence[Mapping[str, Any]], most: int | None) -> dict[str, Any]:
    """Return the JSON schema of lists of one to ``most`` calls of these tools, in the form of OpenAI's API."""
    calls = [_schema(tool["function"], f"#/items/anyOf/{i}/properties/arguments") for i, tool in enumerate(tools)]
    return {"type": "array", "items": {"anyOf": calls}, "minItems": 1} | ({} if most is None else {"maxItems": most})


def _schema(function: Mapping[str, Any], place: str) -> dict[str, Any]:
    """Return the schema of calls of a function whose parameters' schema will lie at a place, a JSON pointer."""
    arguments = {"type": "object", **_moved(function.get("parameters", {}), place)}
    return {
        "type": "object",
        "properties": {"name": {"const": function["name"]}, "arguments": arguments},
        "required": ["name", "arguments"],
        "additionalProperties": False,
    }


def _moved(schema: Any, place: str) -> Any:
    """Return a schema whose references to its own parts find them at a place."""
    if isinstance(schema, list):
        return [_moved(one, place) for one in schema]
    if not isinstance(schema, dict):
        return schema
    return {
        key: f"{place}{one[1:]}" if key == "$ref" and isinstance(one, str) and one[:1] == "#" else _moved(one, place)
        for key, one in schema.items()
    }


def _calls(body: str, schemas: Schemas) -> list[Call] | None:
    """Return the calls between two marks; None if it is none that klfast can read."""
    forms: tuple[Callable[[str, Schemas], list[tuple[Any, Any]]], ...] = (_in_tags, _in_json, _in_python)
    for read in forms:
        try:
            return [_call(name, arguments) for name, arguments in read(body.strip(), schemas)] or None
        except (ValueError, SyntaxError, TypeError, KeyError, RecursionError, MemoryError):
            continue
    return None


def _call(name: Any, arguments: Any) -> Call:
    if isinstance(arguments, str) and arguments.strip():
        arguments = json.loads(arguments)
    if not (isinstance(name, str) and _NAME.fullmatch(name) and isinstance(arguments or {}, dict)):
        raise ValueError
    text = json.dumps(arguments or {}, ensure_ascii=False, allow_nan=False)
    text.encode()  # no halves of surrogate pairs
    return Call(name, text)


def _in_json(text: str, _: Schemas) -> list[tuple[Any, Any]]:
    """Read objects one after the other, or lists of them."""
    found, at, read = [], 0, json.JSONDecoder().raw_decode
    while at < len(text):
        one, at = read(text, at)
        found += one if isinstance(one, list) else [one]
        at += len(text[at:]) - len(text[at:].lstrip())
    return [(one["name"], one["arguments"] if "arguments" in one else one.get("parameters")) for one in found]


def _in_tags(text: str, schemas: Schemas) -> list[tuple[Any, Any]]:
    if not text.startswith("<function="):
        raise ValueError
    found = []
    for function in text.split("<function=")[1:]:
        name, _, inside = function.partition(">")
        schema, arguments = schemas.get(name, {}), {}
        for parameter in inside.rsplit("</function>", 1)[0].split("<parameter=")[1:]:
            key, _, value = parameter.partition(">")
            value = value.rsplit("</parameter>", 1)[0].removeprefix("\n").removesuffix("\n")
            arguments[key] = _value(value, _kinds(_properties(schema).get(key, {}), schema))
        found.append((name, arguments))
    return found


def _value(text: str, kinds: set[str]) -> Any:
    """Return what a text in tags stands for: itself where texts are allowed, else JSON, or Python's spelling of it."""
    word = text.strip()
    if "null" in kinds and word in ("null", "None"):
        return None
    if not kinds or "string" in kinds:
        return text
    for read in (json.loads, ast.literal_eval):
        try:
            value = read(word)
            json.dumps(value, allow_nan=False)
        except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
            continue
        return value
    return text


def _properties(schema: Mapping[str, Any]) -> Mapping[str, Any]:
    found = schema.get("properties")
    return found if isinstance(found, dict) else {}


def _kinds(schema: Any, root: Any, depth: int = 0) -> set[str]:
    """Return the types that a JSON schema, which is part of ``root``, allows; none if it does not say."""
    if not isinstance(schema, dict) or depth > _DEEPEST:
        return set()
    kinds = schema.get("type", [])
    found = {kinds} if isinstance(kinds, str) else {kind for kind in kinds if isinstance(kind, str)}
    values = [*_list(schema, "enum"), *([schema["const"]] if "const" in schema else [])]
    if not found and values:
        found = {"string"} if any(isinstance(value, str) for value in values) else {"number"}
    parts = [part for key in ("anyOf", "oneOf", "allOf") for part in _list(schema, key)]
    if isinstance(place := schema.get("$ref"), str) and place.startswith("#"):
        target = root
        for key in place.split("/")[1:]:
            target = target.get(key) if isinstance(target, dict) else None
        parts.append(target)
    return found.union(*(_kinds(part, root, depth + 1) for part in parts))


def _list(schema: Mapping[str, Any], key: str) -> list[Any]:
    found = schema.get(key)
    return found if isinstance(found, list) else []


def _in_python(text: str, schemas: Schemas) -> list[tuple[Any, Any]]:
    """Read a list of calls, or calls one after the other; tools may have names that Python's functions cannot have."""
    own = {f"tool_{i}_": name for i, name in enumerate(schemas) if not name.isidentifier()}
    for stand_in, name in own.items():
        text = re.sub(rf"(?<![\w.-]){re.escape(name)}(?=\()", stand_in, text)
    found, values = [], _Values(own)
    for line in ast.parse(text).body:
        if not isinstance(line, ast.Expr):
            raise ValueError
        for node in line.value.elts if isinstance(line.value, ast.List) else [line.value]:
            if not isinstance(node, ast.Call) or node.args or any(one.arg is None for one in node.keywords):
                raise ValueError
            called = ast.unparse(node.func)
            arguments = {one.arg: ast.literal_eval(values.visit(one.value)) for one in node.keywords}
            found.append((own.get(called, called), arguments))
    return found


class _Values(ast.NodeTransformer):
    """Takes JSON's names of constants for Python's, which models mix, and puts tools' names back into texts."""

    def __init__(self, own: Mapping[str, str]) -> None:
        self._own = own

    def visit_Name(self, name: ast.Name) -> ast.expr:
        return ast.Constant({"true": True, "false": False, "null": None}[name.id])

    def visit_Constant(self, constant: ast.Constant) -> ast.expr:
        if isinstance(constant.value, str):
            for stand_in, name in self._own.items():
                constant.value = constant.value.replace(stand_in, name)
        return constant
