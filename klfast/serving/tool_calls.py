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
_FUNCTION = re.compile(r"<function=([^>\n]+)>(.*?)</function>", re.DOTALL)
_PARAMETER = re.compile(r"<parameter=([^>\n]+)>\n?(.*?)\n?</parameter>", re.DOTALL)
_JSON_NAMES = {"true": True, "false": False, "null": None}  # which models write in Python, too


class Call(NamedTuple):
    """A call of the function ``name`` with ``arguments``, an object in JSON."""

    name: str
    arguments: str


Parameters = Mapping[str, Mapping[str, Any]]  # of each function: JSON schemas by the parameters' names


class ToolCallReader:
    """Takes calls out of a text that arrives in pieces.

    What may be the beginning of a call is held back, and white space in front of it, which belongs to the call, as does
    white space alone behind one. What stands between marks but cannot be read is text.

    Args:
        marks: those in MARKS with which the model's calls begin.
        parameters: of the functions, which say what the texts in tags are.

    Attributes:
        count: the calls so far.
    """

    def __init__(self, marks: Iterable[str], parameters: Parameters) -> None:
        self._marks, self._parameters, self._held, self.count = tuple(marks), parameters, "", 0
        self._begin, self._longest = re.compile("|".join(map(re.escape, self._marks))), max(map(len, self._marks))

    def read(self, piece: str, *, is_last: bool) -> tuple[str, list[Call]]:
        """Return the text and the calls that this piece settles."""
        self._held += piece
        text, calls = "", list[Call]()
        while begin := self._begin.search(self._held):
            end_mark = MARKS[begin[0]]
            end = self._held.find(end_mark, begin.end())
            if end < 0:
                break
            found = _calls(self._held[begin.end() : end], self._parameters)
            end += len(end_mark)
            text += self._held[:end] if found is None else self._held[: begin.start()].rstrip()
            calls += found or []
            self._held = self._held[end:]
        self.count += len(calls)
        if is_last:
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

    def read(self, piece: str, *, is_last: bool) -> tuple[str, list[Call]]:
        """Return the text and the calls that this piece settles."""
        self._held += piece
        if not is_last:
            return "", []
        calls = _calls(self._held, {}) or []
        self.count = len(calls)
        return "" if calls else self._held, calls


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
        key: f"{place}{value[1:]}"
        if key == "$ref" and isinstance(value, str) and value[:1] == "#"
        else _moved(value, place)
        for key, value in schema.items()
    }


Reader = ToolCallReader | ForcedCallReader


def _calls(body: str, parameters: Parameters) -> list[Call] | None:
    """Return the calls between two marks; None if it is none that klfast can read."""
    read: tuple[Callable[[str], list[tuple[str, Any]]], ...] = (
        lambda text: _in_tags(text, parameters),
        _in_json,
        _in_python,
    )
    for one in read:
        try:
            return [_call(name, arguments) for name, arguments in one(body.strip())] or None
        except (ValueError, SyntaxError, TypeError, KeyError, RecursionError, MemoryError):
            continue
    return None


def _call(name: object, arguments: object) -> Call:
    if isinstance(arguments, str):
        arguments = json.loads(arguments)
    if not (isinstance(name, str) and name and isinstance(arguments, dict)):
        raise ValueError
    return Call(name, json.dumps(arguments, ensure_ascii=False, allow_nan=False))


def _in_json(text: str) -> list[tuple[str, Any]]:
    found = json.loads(text)
    return [(one["name"], one.get("arguments", {})) for one in (found if isinstance(found, list) else [found])]


def _in_tags(text: str, parameters: Parameters) -> list[tuple[str, Any]]:
    if not text.startswith("<function="):
        raise ValueError
    return [
        (name, {key: _value(value, parameters.get(name, {}).get(key, {})) for key, value in _PARAMETER.findall(inside)})
        for name, inside in _FUNCTION.findall(text)
    ]


def _value(text: str, schema: Mapping[str, Any]) -> Any:
    """Return what a text in tags stands for: itself if the schema wants a text or says nothing, else JSON."""
    if schema.get("type", "string") == "string" and not schema.keys() & {"anyOf", "oneOf", "allOf", "$ref"}:
        return text
    try:
        return json.loads(text)
    except ValueError:
        return text


def _in_python(text: str) -> list[tuple[str, Any]]:
    tree = ast.parse(text, mode="eval").body
    return [_python_call(one) for one in (tree.elts if isinstance(tree, ast.List) else [tree])]


def _python_call(node: ast.expr) -> tuple[str, dict[str, Any]]:
    if not isinstance(node, ast.Call) or node.args or any(one.arg is None for one in node.keywords):
        raise ValueError
    return ast.unparse(node.func), {str(one.arg): _literal(one.value) for one in node.keywords}


def _literal(node: ast.expr) -> Any:
    class Names(ast.NodeTransformer):
        def visit_Name(self, name: ast.Name) -> ast.expr:
            return ast.Constant(_JSON_NAMES[name.id])

    return ast.literal_eval(Names().visit(node))
