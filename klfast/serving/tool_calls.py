"""Calls of tools in what a model writes.

A call stands between two marks, in the form that the model's chat template asks for. Sources: the chat templates of
Qwen3, Granite 4.0 and Falcon-H1 (JSON), Qwen3.5 and Nemotron 3 (functions with parameters in tags), Nemotron Nano 2 and
Jamba (lists in JSON), LFM2 (a list of calls in Python).
"""

from __future__ import annotations

import ast
import json
import keyword
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from klfast.core.errors import InvalidInputError

MARKS = {
    "<tool_call>": "</tool_call>",
    "<tool_calls>": "</tool_calls>",
    "<TOOLCALL>": "</TOOLCALL>",
    "<|tool_call_start|>": "<|tool_call_end|>",
}
NAME = r"^[\w.-]+$"  # of tools
_MOST_ENDS = 4  # of which one may end a call, since texts in it may hold marks
_FUNCTION = re.compile(r"(?:^|(?<=</function>))\s*<function=")
_PARAMETER = re.compile(r"(?:(?<=\n)|(?<=</parameter>))\s*<parameter=")
_NOT_NAMES = re.compile(rf"(?<![\w.-])(?:[\w.-]+(?=\()|(?:{'|'.join(keyword.kwlist)})(?=\s*=[^=]))")
_TOLD_BY = {"properties": "object", "items": "array", "nullable": "null"}
_VALUES = ("const", "enum", "default", "examples")  # of a schema, no schemas themselves

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
        self._tried, self._is_behind_call = 0, False  # ends of what is held; whether there is only white space since

    def read(self, piece: str, finish: str | None) -> tuple[str, list[Call]]:
        """Return the text and the calls that this piece settles, after which the text may end: see ``Piece``."""
        self._held += piece
        texts, calls = [""], list[Call]()
        while begin := self._begin.search(self._held):
            mark = MARKS[begin[0]]
            ends = min(self._held.count(mark, begin.end()), _MOST_ENDS)
            if finish is None and ends == self._tried:
                break
            found, first, end = self._first_call(begin, ends, finish)
            if found is None and finish is None and ends < _MOST_ENDS:
                self._tried = ends
                break
            if found is None and not ends:
                break
            texts.append(self._held[:end] if found is None else self._held[:first].rstrip())
            calls += found or []
            self._held, self._tried, self._is_behind_call = self._held[end:], 0, found is not None
        self.count += len(calls)
        if finish is None:
            rest = self._held[: self._open() if begin is None else begin.start()].rstrip()
        else:
            rest = "" if self._is_behind_call and self._held.isspace() else self._held
        self._is_behind_call &= not rest
        self._held = self._held[len(rest) :]
        return "".join([*texts, rest]), calls

    def _first_call(self, begin: re.Match[str], ends: int, finish: str | None) -> tuple[list[Call] | None, int, int]:
        """Return the calls behind a mark, where they begin and end; None, and the first end, if none can be read."""
        mark, at, places = MARKS[begin[0]], begin.end(), []
        for _ in range(ends):
            places.append(self._held.index(mark, at))
            at = places[-1] + len(mark)
        if finish == "stop" and not places:
            places.append(len(self._held))  # an end token or a stop string may stand for the mark
        for end in places:
            [*_, last] = self._begin.finditer(self._held, begin.start(), end)  # a model may name marks before it calls
            for one in (begin, last):
                if (found := _calls(self._held[one.end() : end], self._schemas)) is not None:
                    return found, one.start(), end + len(mark)
        if finish is not None and ends and (found := _open_tags(self._held[begin.end() : places[0]], self._schemas)):
            return found, begin.start(), places[0] + len(mark)
        return None, begin.start(), places[0] + len(mark) if places else 0

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
    """Return the JSON schema of lists of one to ``most`` calls of these tools, in the form of OpenAI's API.

    Raises:
        InvalidInputError: a schema is too deep.
    """
    try:
        calls = [_schema(tool["function"], f"#/items/anyOf/{i}/properties/arguments") for i, tool in enumerate(tools)]
    except RecursionError:
        raise InvalidInputError("the tools' parameters are nested too deeply") from None
    return {"type": "array", "items": {"anyOf": calls}, "minItems": 1} | ({} if most is None else {"maxItems": most})


def _schema(function: Mapping[str, Any], place: str) -> dict[str, Any]:
    """Return the schema of calls of a function whose parameters' schema will lie at a place, a JSON pointer."""
    arguments = {key: one for key, one in function.get("parameters", {}).items() if key != "$id"}
    return {
        "type": "object",
        "properties": {
            "name": {"const": function["name"]},
            "arguments": {**_moved(arguments, place), "type": "object"},
        },
        "required": ["name", "arguments"],
        "additionalProperties": False,
    }


def _moved(schema: Any, place: str) -> Any:
    """Return a schema whose references to its own parts find them at a place."""
    if isinstance(schema, list):
        return [_moved(one, place) for one in schema]
    if not isinstance(schema, dict):
        return schema
    found = {key: one if key in _VALUES else _moved(one, place) for key, one in schema.items()}
    target = found.get("$ref")
    if isinstance(target, str) and (target == "#" or target.startswith("#/")):
        found["$ref"] = place + target[1:]
    return found


def _calls(body: str, schemas: Schemas) -> list[Call] | None:
    """Return the calls between two marks; None if it is none that klfast can read."""
    return next((found for read in (_in_tags, _in_json, _in_python) if (found := _read(read, body, schemas))), None)


def _open_tags(body: str, schemas: Schemas) -> list[Call] | None:
    """Return the calls in tags between two marks even if the last end tag is missing."""
    return _read(_in_tags, f"{body}</function>", schemas)


def _read(read: Callable[[str, Schemas], list[tuple[Any, Any]]], body: str, schemas: Schemas) -> list[Call] | None:
    try:
        return [_call(name, arguments) for name, arguments in read(body.strip(), schemas)] or None
    except (ValueError, SyntaxError, TypeError, KeyError, RecursionError, MemoryError):
        return None


def _call(name: Any, arguments: Any) -> Call:
    if isinstance(arguments, str) and arguments.strip():
        arguments = json.loads(arguments)
    if not (isinstance(name, str) and re.match(NAME, name) and isinstance(arguments or {}, dict)):
        raise ValueError
    text = json.dumps(arguments or {}, ensure_ascii=False, allow_nan=False)
    text.encode()  # no halves of surrogate pairs
    return Call(name, text)


def _in_json(text: str, _: Schemas) -> list[tuple[Any, Any]]:
    """Read objects one after the other, or lists of them."""
    found, at, read = [], 0, json.JSONDecoder(strict=False).raw_decode
    while at < len(text):
        one, at = read(text, at)
        found += one if isinstance(one, list) else [one]
        at += len(text[at:]) - len(text[at:].lstrip())
    return [(one["name"], one["arguments"] if "arguments" in one else one.get("parameters")) for one in found]


def _in_tags(text: str, schemas: Schemas) -> list[tuple[Any, Any]]:
    if not (text.startswith("<function=") and text.endswith("</function>")):
        raise ValueError
    found = []
    for function in _FUNCTION.split(text)[1:]:
        name, _, inside = function.rstrip().removesuffix("</function>").partition(">")
        schema, arguments = schemas.get(name, {}), {}
        for parameter in _PARAMETER.split(f"\n{inside}")[1:]:
            key, _, value = parameter.partition(">")
            value = value.rsplit("</parameter>", 1)[0].removeprefix("\n").removesuffix("\n")
            arguments[key] = _value(value, _kinds(_properties(schema).get(key), schema, set()))
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


def _kinds(schema: Any, root: Any, seen: set[str]) -> set[str]:
    """Return the types that a JSON schema, which is part of ``root``, allows; none if it does not say."""
    if not isinstance(schema, dict):
        return set()
    kinds = schema.get("type", [])
    found = {kinds} if isinstance(kinds, str) else {kind for kind in _list(schema, "type") if isinstance(kind, str)}
    for value in (*_list(schema, "enum"), *([schema["const"]] if "const" in schema else [])):
        found.add("string" if isinstance(value, str) else "null" if value is None else "number")
    found |= {kind for key, kind in _TOLD_BY.items() if schema.get(key)}
    parts = [part for key in ("anyOf", "oneOf", "allOf") for part in _list(schema, key)]
    place = schema.get("$ref")
    if isinstance(place, str) and place.startswith("#") and place not in seen:
        seen.add(place)
        target = root
        for key in place.split("/")[1:]:
            target = target.get(key) if isinstance(target, dict) else None
        parts.append(target)
    return found.union(*(_kinds(part, root, seen) for part in parts))


def _list(schema: Mapping[str, Any], key: str) -> list[Any]:
    found = schema.get(key)
    return found if isinstance(found, list) else []


def _in_python(text: str, schemas: Schemas) -> list[tuple[Any, Any]]:
    """Read a list of calls, or calls one after the other; names that Python forbids are changed while it reads."""
    prefix = "name_"
    while prefix in text:
        prefix += "_"
    own: dict[str, str] = {}

    def stand_in(found: re.Match[str]) -> str:
        name = found[0]
        if not keyword.iskeyword(name) and (name.isidentifier() or name not in schemas):
            return name
        own.setdefault(name, f"{prefix}{len(own)}_")
        return own[name]

    tree = ast.parse(_NOT_NAMES.sub(stand_in, text))
    names = {new: old for old, new in own.items()}
    values = _Values(re.compile(rf"{prefix}\d+_"), names)
    found = []
    for line in tree.body:
        if not isinstance(line, ast.Expr):
            raise ValueError
        for node in line.value.elts if isinstance(line.value, ast.List) else [line.value]:
            if not isinstance(node, ast.Call) or node.args or any(one.arg is None for one in node.keywords):
                raise ValueError
            called = ast.unparse(node.func)
            arguments = {one.arg: ast.literal_eval(values.visit(one.value)) for one in node.keywords}
            found.append((names.get(called, called), {names.get(str(key), key): one for key, one in arguments.items()}))
    return found


class _Values(ast.NodeTransformer):
    """Takes JSON's names of constants for Python's, which models mix, and puts changed names back into texts."""

    def __init__(self, changed: re.Pattern[str], names: Mapping[str, str]) -> None:
        self._changed, self._names = changed, names

    def visit_Name(self, name: ast.Name) -> ast.expr:
        return ast.Constant({"true": True, "false": False, "null": None}[name.id])

    def visit_Constant(self, constant: ast.Constant) -> ast.expr:
        if self._names and isinstance(constant.value, str):
            constant.value = self._changed.sub(lambda found: self._names[found[0]], constant.value)
        return constant
