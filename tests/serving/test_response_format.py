"""Answers that fit a JSON schema, by a real model, which without it writes no JSON at all."""

import asyncio
import copy
import json
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import openai
import pytest
import served
from running_server import NAME

from klfast.core.errors import InvalidInputError
from klfast.serving import constraint
from klfast.serving.constraint import Constraints

CHAT = [{"role": "user", "content": "The sea"}]
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "colour": {"enum": ["red", "gr\u00fcn"]},
        "size": {"type": "integer", "minimum": 3, "maximum": 70},
        "parts": {"type": "array", "items": {"type": "boolean"}, "minItems": 1, "maxItems": 2},
    },
    "required": ["name", "colour", "size", "parts"],
    "additionalProperties": False,
}


def of(schema, **more):
    return {"type": "json_schema", "json_schema": {"name": "thing", "schema": schema, **more}}


def check(text):
    found = json.loads(text)
    assert list(found) == SCHEMA["required"]
    assert len(found["name"]) <= 8 and found["colour"] in ("red", "gr\u00fcn") and found["size"] in range(3, 71)
    assert len(found["parts"]) in (1, 2) and {*found["parts"]} <= {True, False}


@pytest.mark.parametrize("temperature", [0, 1])
def test_answers_fit_a_schema(client, temperature):
    ask = dict(model=NAME, messages=CHAT, temperature=temperature, seed=1, n=3, max_tokens=250)
    made = client.chat.completions.create(response_format=of(SCHEMA, strict=True), **ask)
    events = list(client.chat.completions.create(response_format=of(SCHEMA), stream=True, **ask))
    for choice in made.choices:
        assert choice.finish_reason == "stop"
        check(choice.message.content)
        parts = [one for event in events for one in event.choices if one.index == choice.index]
        assert "".join(one.delta.content or "" for one in parts) == choice.message.content
        assert parts[-1].finish_reason == "stop"


def test_an_answer_ends_with_its_last_letter(client):
    """No token is spent on the end."""
    ask = dict(model=NAME, messages=CHAT, temperature=0, max_tokens=50)
    made = client.chat.completions.create(response_format=of({"const": "sea"}), **ask)
    assert made.choices[0].message.content == '"sea"' and made.choices[0].finish_reason == "stop"
    assert made.usage.completion_tokens == len(served.words()('"sea"', add_special_tokens=False)["input_ids"])
    made = client.chat.completions.create(response_format=of({"const": "sea"}), **ask | {"max_tokens": 1})
    assert made.choices[0].finish_reason == "length"


def test_an_object_of_any_form(client):
    ask = dict(model=NAME, messages=CHAT, temperature=0, max_tokens=60, response_format={"type": "json_object"})
    made = client.chat.completions.create(logprobs=True, **ask).choices[0]
    assert made.message.content.lstrip().startswith("{") and made.logprobs.content
    again = client.chat.completions.create(model=NAME, messages=CHAT, temperature=0, max_tokens=60)
    assert not again.choices[0].message.content.lstrip().startswith("{")
    text = client.chat.completions.create(**ask | {"response_format": {"type": "text"}})
    assert text.choices[0].message.content == again.choices[0].message.content


@pytest.mark.parametrize(
    ("form", "message"),
    [
        ({"type": "xml"}, "response_format.type: "),
        ({"type": "json_schema"}, "response_format.json_schema: Field required"),
        ({"type": "json_object", "json_schema": {"schema": {}}}, "response_format.json_schema: needs type"),
        ({"type": "json_schema", "json_schema": {"name": "x"}}, "response_format.json_schema.schema: Field required"),
        (
            {"type": "json_schema", "json_schema": {"schema": {}, "content": {}}},
            "response_format.json_schema.content: Extra inputs are not permitted",
        ),
        (of({"type": "nope"}), "the JSON schema cannot be followed: Invalid type: nope"),
        (of({"not": {}}), r'the JSON schema cannot be followed: Unimplemented keys: \["not"\]'),
        (of({"type": "string", "pattern": "("}), "the JSON schema cannot be followed: regex parse error"),
        (
            of({"type": "integer", "multipleOf": 999983}),
            "the JSON schema cannot be followed: preparing it takes more than 2 s",
        ),
        (
            of({"type": "object", "properties": {f"k{i}": {} for i in range(800)}, "additionalProperties": False}),
            "the JSON schema cannot be followed: ",
        ),
        (of({"$ref": "http://127.0.0.1:9/x"}), "the JSON schema cannot be followed: "),
    ],
)
def test_bad_formats(client, monkeypatch, form, message):
    monkeypatch.setattr(constraint, "_LONGEST_TRY", 2.0)
    with pytest.raises(openai.BadRequestError, match=message) as caught:
        client.chat.completions.create(model=NAME, messages=CHAT, response_format=form)
    assert "\n" not in caught.value.body["message"]


def test_without_llguidance(serve, monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance.hf", None)
    message = r"following a JSON schema needs the package llguidance: pip install 'klfast\[serve"
    with pytest.raises(openai.BadRequestError, match=message):
        serve().client().chat.completions.create(model=NAME, messages=CHAT, response_format={"type": "json_object"})


def test_a_tokenizer_of_python_code():
    class Words:
        eos_token_id = 1

    with pytest.raises(InvalidInputError, match="the JSON schema cannot be followed: Only fast tokenizers"):
        asyncio.run(Constraints(Words(), 9, [1]).json(SCHEMA))


def test_copies_are_independent():
    words = copy.deepcopy(served.words())
    one = asyncio.run(Constraints(words, len(words), [words.eos_token_id]).json({"const": 1}))
    other = one.copy()
    [token] = words("1", add_special_tokens=False)["input_ids"]
    one.take(token)
    assert one.is_complete and not other.is_complete
    with pytest.raises(InvalidInputError, match="cannot be followed"):
        other.take(words.eos_token_id)


def test_a_schema_that_takes_long_holds_nobody_up(client, server):
    ask = dict(model=NAME, messages=CHAT, temperature=0)
    with ThreadPoolExecutor() as pool:
        bad = pool.submit(
            client.chat.completions.create, response_format=of({"type": "integer", "multipleOf": 999979}), **ask
        )
        time.sleep(0.5)
        assert client.chat.completions.create(max_tokens=3, **ask).choices and not bad.done()
        assert isinstance(bad.exception(), openai.BadRequestError)


def test_a_schema_is_prepared_once_refused_or_not(client, monkeypatch):
    tried = []
    monkeypatch.setattr(constraint, "_try", lambda grammar, real=constraint._try: [tried.append(1), real(grammar)])
    for schema in ({"const": "a new one"}, {"type": "another"}):
        for _ in range(2):
            with suppress(openai.BadRequestError):
                client.chat.completions.create(model=NAME, messages=CHAT, max_tokens=1, response_format=of(schema))
    assert len(tried) == 2


def test_too_many_new_schemas(client, monkeypatch):
    monkeypatch.setattr(constraint, "_WAITING", 0)
    with pytest.raises(openai.RateLimitError, match="0 JSON schemas are being prepared; try again later"):
        client.chat.completions.create(model=NAME, messages=CHAT, response_format=of({"const": "one more"}))


@pytest.mark.parametrize(
    ("executable", "message"),
    [(None, "klfast needs Python's own program"), ("/no/python", "no process to try it: FileNotFoundError"),
     ("/bin/false", "preparing it failed: exit status 1")],
)  # fmt: skip
def test_without_a_process(client, monkeypatch, executable, message):
    monkeypatch.setattr(sys, "executable", executable)
    with pytest.raises(openai.BadRequestError, match=f"the JSON schema cannot be followed: {message}"):
        client.chat.completions.create(model=NAME, messages=CHAT, response_format=of({"const": str(executable)}))
