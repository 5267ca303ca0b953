"""Calls of tools: read from what models write, and in the API, through OpenAI's client."""

import copy
import json
import time

import openai
import pytest
import served
import torch
from running_server import NAME

from klfast.core.errors import InvalidInputError
from klfast.serving.answer import Answer
from klfast.serving.tool_calls import ToolCallReader, schema_of_calls

WEATHER = {
    "type": "object",
    "properties": {
        "city": {"type": "string"},
        "days": {"type": "integer"},
        "when": {"anyOf": [{"type": "string"}, {"type": "null"}]},
        "code": {"type": ["string", "null"]},
        "parts": {"type": "array"},
        "is_sure": {"type": "boolean"},
        "unit": {"$ref": "#/$defs/unit"},
        "share": {"type": "number"},
    },
    "$defs": {"unit": {"enum": ["1", "2"]}},
}
SCHEMAS = {"weather": WEATHER, "get-tide": {}}
CALL = '{"name": "weather", "arguments": {"city": "Tromsø", "days": 2}}'
OSLO = ("weather", {"city": "Tromsø", "days": 2})
TAGS = (
    "<tool_call>\n<function=weather>\n<parameter=city>\nTromsø\n</parameter>\n<parameter=days>\n2\n</parameter>\n"
    "</function>\n</tool_call>"
)
PYTHON = "<|tool_call_start|>[weather(city='Tromsø', days=2), a.b(c=[1, {'d': true}], e=None)]<|tool_call_end|>"
READ = {
    "JSON": (f"<tool_call>\n{CALL}\n</tool_call>", "", [OSLO]),
    "text before and between": (
        f"I look.\n\n<tool_call>{CALL}</tool_call>\n<tool_call>{CALL}</tool_call>\n",
        "I look.",
        [OSLO] * 2,
    ),
    "text behind": (f"<tool_call>{CALL}</tool_call> Done.", " Done.", [OSLO]),
    "a list": (f"<TOOLCALL>[{CALL}, {CALL}]</TOOLCALL>", "", [OSLO] * 2),
    "Jamba's": (f"<tool_calls>[\n  {CALL}\n]</tool_calls>", "", [OSLO]),
    "arguments as a text": (
        '<tool_call>{"name": "weather", "arguments": "{\\"days\\": 1}"}</tool_call>',
        "",
        [("weather", {"days": 1})],
    ),
    "no arguments": ('<tool_call>{"name": "now"}</tool_call>', "", [("now", {})]),
    "tags": (TAGS, "", [OSLO]),
    "tags by their schemas": (
        (
            "<tool_call><function=weather><parameter=city>\n12\n</parameter><parameter=days>many</parameter>"
            '<parameter=when>null</parameter><parameter=parts>\n["a",\n 1]\n</parameter><parameter=other>1</parameter>'
            "</function></tool_call>"
        ),
        "",
        [("weather", {"city": "12", "days": "many", "when": None, "parts": ["a", 1], "other": "1"})],
    ),
    "texts that look like something else": (
        (
            "<tool_call><function=weather><parameter=when>0123</parameter><parameter=code>true</parameter>"
            "<parameter=unit>1</parameter></function></tool_call>"
        ),
        "",
        [("weather", {"when": "0123", "code": "true", "unit": "1"})],
    ),
    "Python's spelling, and what no JSON is": (
        (
            "<tool_call><function=weather><parameter=is_sure>False</parameter><parameter=parts>('a', None)</parameter>"
            "<parameter=share>NaN</parameter><parameter=days>{1}</parameter></function></tool_call>"
        ),
        "",
        [("weather", {"is_sure": False, "parts": ["a", None], "share": "NaN", "days": "{1}"})],
    ),
    "tags without ends, and an end in a text": (
        "<tool_call><function=weather>\n<parameter=days>1\n<parameter=city>a </parameter> b</parameter></tool_call>",
        "",
        [("weather", {"days": 1, "city": "a </parameter> b"})],
    ),
    "marks and tags in texts": (
        "<tool_call><function=f><parameter=x></tool_call> <parameter=c><function=d></parameter></function></tool_call>",
        "",
        [("f", {"x": "</tool_call> <parameter=c><function=d>"})],
    ),
    "a mark in JSON": (
        '<tool_call>{"name": "f", "arguments": {"x": "</tool_call>"}}</tool_call>',
        "",
        [("f", {"x": "</tool_call>"})],
    ),
    "line breaks in JSON": (
        '<tool_call>{"name": "f", "arguments": {"x": "a\nb"}}</tool_call>',
        "",
        [("f", {"x": "a\nb"})],
    ),
    "tags that are cut": (
        "<tool_call>\n<function=f>\n<parameter=a>\n1",
        "<tool_call>\n<function=f>\n<parameter=a>\n1",
        [],
    ),
    "tags that lack a mark": ("<tool_call>\n<function=f>\n<parameter=a>\n1</function>\n", "", [("f", {"a": "1"})]),
    "white space behind text": (f"<tool_call>{CALL}</tool_call> hi \n", " hi \n", [OSLO]),
    "five ends": ("<tool_call>" + "x</tool_call>" * 5, "<tool_call>" + "x</tool_call>" * 5, []),
    "several functions in tags": (
        "<tool_call><function=a><parameter=x>1</parameter></function>\n<function=b></function></tool_call>",
        "",
        [("a", {"x": "1"}), ("b", {})],
    ),
    "a text of several lines in tags": (
        "<tool_call><function=weather><parameter=city>\n\n a\nb \n</parameter></function></tool_call>",
        "",
        [("weather", {"city": "\n a\nb "})],
    ),
    "Python": (PYTHON, "", [OSLO, ("a.b", {"c": [1, {"d": True}], "e": None})]),
    "Python's lines, and names that Python lacks": (
        "<|tool_call_start|>get-tide(at='get-tide(x)')\nnow()<|tool_call_end|>",
        "",
        [("get-tide", {"at": "get-tide(x)"}), ("now", {})],
    ),
    "Python's own words, and a text like a stand-in": (
        "<|tool_call_start|>[get-tide(from='name_0_', class='from=1'), f(to='get-tide(from=2)')]<|tool_call_end|>",
        "",
        [("get-tide", {"from": "name_0_", "class": "from=1"}), ("f", {"to": "get-tide(from=2)"})],
    ),
    "objects on lines": (f"<tool_call>{CALL}\n{CALL}\n</tool_call>", "", [OSLO] * 2),
    "parameters": ('<tool_call>{"name": "f", "parameters": {"a": 1}}</tool_call>', "", [("f", {"a": 1})]),
    "nothing for arguments": (
        '<tool_call>[{"name": "f", "arguments": null}, {"name": "f", "arguments": ""}]</tool_call>',
        "",
        [("f", {})] * 2,
    ),
    "a mark in the text": (f"I use <tool_call> tags. <tool_call>{CALL}</tool_call>", "I use <tool_call> tags.", [OSLO]),
    "two marks": (f"<tool_call>\n<tool_call>\n{CALL}\n</tool_call>", "<tool_call>", [OSLO]),
    "no call": ("a < b, <tool", "a < b, <tool", []),
    "white space alone": (" \n", " \n", []),
    "one without end": (f"so <tool_call>{CALL}", "so", [OSLO]),
    "a part of one": (f"so <tool_call>{CALL[:-1]}", f"so <tool_call>{CALL[:-1]}", []),
}
UNREADABLE = [
    "",
    "{",
    "[]",
    "1",
    '{"arguments": {}}',
    '{"name": 1, "arguments": {}}',
    '{"name": "f", "arguments": [1]}',
    '{"name": "f", "arguments": {"x": NaN}}',
    "[" * 100_000,
    "(" * 5_000,
    "weather('Oslo')",
    "weather(**{'a': 1})",
    "weather(a=open('x'))",
    "weather(a=1j)",
    "weather(a=x)",
    "__import__('os')",
    "(lambda: 1)(a=1)",
    "f(x)(a=1)",
    "x = f()",
    "<function=>",
    '{"name": "f", "arguments": {"x": "\\ud800"}}',
    '{"name": "\\ud800"}',
    "f(a='\\ud800')",
]


def read(text, size, marks=("<tool_call>", "<tool_calls>", "<TOOLCALL>", "<|tool_call_start|>")):
    """Return the text and the calls of a text that comes in pieces of this size."""
    reader, texts, calls = ToolCallReader(marks, SCHEMAS), [], []
    for at in range(0, len(text), size):
        found, more = reader.read(text[at : at + size], "stop" if at + size >= len(text) else None)
        texts.append(found)
        calls += more
    assert reader.count == len(calls)
    return "".join(texts), [(call.name, json.loads(call.arguments)) for call in calls]


@pytest.mark.parametrize("name", READ)
def test_calls_are_read_however_the_text_is_cut(name):
    text, rest, calls = READ[name]
    for size in {*range(1, 30), len(text)}:
        assert read(text, size) == (rest, calls), size


@pytest.mark.parametrize("body", UNREADABLE, ids=lambda body: body[:30])
def test_what_cannot_be_read_is_text(body):
    text = f"so: <tool_call>{body}</tool_call>"
    assert read(text + TAGS, len(text)) == (text, [OSLO])


def test_text_is_held_back_only_where_a_call_may_begin():
    reader = ToolCallReader(["<tool_call>"], {})
    assert [reader.read(piece, None)[0] for piece in ("a", " b\n", "<to", "p>", " <tool_call>x")] == [
        "a",
        " b",
        "",
        "\n<top>",
        "",
    ]


@pytest.mark.parametrize(
    "body",
    [
        "<function=f>" + "<parameter=a>" * 20_000,
        "<function=a>" * 20_000,
        f"f({', '.join(f'a{i}=null' for i in range(5000))})",
        f"f(a=[{'null,' * 20_000}])",
        "{" * 100_000,
        '{"name": "f"}\n' * 10_000,
    ],
    ids=lambda body: body[:20],
)
def test_long_bodies_are_read_at_once(body):
    start = time.thread_time()
    read(f"<tool_call>{body}</tool_call>", 10**6)
    assert time.thread_time() - start < 3


def test_references_are_followed_once():
    """However many ways lead to them."""
    properties = {"x": {"$ref": "#/$defs/a"}, "y": {"$ref": "#/$defs/b"}}
    parts = {"a": {"anyOf": [{"$ref": "#/$defs/a"}] * 300}, "b": {"anyOf": [{"$ref": "#/no"}, {"enum": [1, None]}]}}
    reader = ToolCallReader(["<tool_call>"], {"f": {"properties": properties, "$defs": parts}})
    text = "<tool_call><function=f><parameter=x>1</parameter><parameter=y>null</parameter></function></tool_call>"
    assert json.loads(reader.read(text, "stop")[1][0].arguments) == {"x": "1", "y": None}


def test_the_schema_of_calls():
    own = {"$id": "x", "type": "string", "properties": {"a": {"$ref": "#/$defs/b"}, "c": {"const": {"$ref": "#/d"}}}}
    schema = schema_of_calls([{"function": {"name": "f"}}, {"function": {"name": "g", "parameters": own}}], 1)
    place = "#/items/anyOf/1/properties/arguments/$defs/b"
    found = schema["items"]["anyOf"][1]["properties"]["arguments"]
    assert found == {"type": "object", "properties": {"a": {"$ref": place}, "c": {"const": {"$ref": "#/d"}}}}
    assert schema["maxItems"] == 1 and "maxItems" not in schema_of_calls([], None)
    deep = {}
    for _ in range(2000):
        deep = {"properties": {"a": deep}}
    with pytest.raises(InvalidInputError, match="the tools' parameters are nested too deeply"):
        schema_of_calls([{"function": {"name": "f", "parameters": deep}}], None)


def test_arguments_keep_their_letters():
    assert '"Tromsø"' in ToolCallReader(["<tool_call>"], {}).read(READ["JSON"][0], "stop")[1][0].arguments


TEMPLATE = (
    "{% if tools %}<s>{{ tools | tojson }} <tool_call>{% endif %}"
    "{% for m in messages %}<s>{{ m.role }}: {{ m.content }}"
    "{% for c in m.tool_calls or [] %}{{ c.function.name }}{{ c.function.arguments.city }}{% endfor %}"
    "{{ m.tool_call_id }}\n{% endfor %}<s>assistant: "
)
CHAT = [{"role": "user", "content": "Will it rain?"}]
TOOLS = [
    {"type": "function", "function": {"name": "weather", "description": "tells the weather", "parameters": WEATHER}}
]
SAID = f"I look.\n<tool_call>\n{CALL}\n</tool_call>\n{TAGS}"
ASK = dict(model=NAME, messages=CHAT, temperature=0)


@pytest.fixture
def told(serve, monkeypatch):
    """Return what starts a server whose model is told what to write, and returns a client."""

    def start(text, template=TEMPLATE):
        words = copy.deepcopy(served.words())
        words.chat_template = template
        script = [*words(text, add_special_tokens=False)["input_ids"], words.eos_token_id]
        choose = Answer.take

        def take(answer, logits):
            token = script[min(answer.made, len(script) - 1)]
            choose(answer, torch.eye(logits.shape[1])[token : token + 1] * 99)

        served.model()
        monkeypatch.setattr(served, "words", lambda: words)
        monkeypatch.setattr(Answer, "take", take)
        return serve(context=2000).client()

    return start


def test_a_whole_answer(told):
    [choice] = told(SAID).chat.completions.create(tools=TOOLS, **ASK).choices
    assert (choice.message.content, choice.finish_reason) == ("I look.", "tool_calls")
    calls = choice.message.tool_calls
    assert [(call.function.name, json.loads(call.function.arguments)) for call in calls] == [OSLO] * 2
    assert len({call.id for call in calls}) == 2 and {call.type for call in calls} == {"function"}


def test_a_stream(told):
    events = list(told(SAID).chat.completions.create(tools=TOOLS, stream=True, n=2, **ASK))
    for index in (0, 1):
        choices = [choice for event in events for choice in event.choices if choice.index == index]
        assert "".join(choice.delta.content or "" for choice in choices) == "I look."
        calls = [call for choice in choices for call in choice.delta.tool_calls or ()]
        assert [call.index for call in calls] == [0, 1] and len({call.id for call in calls}) == 2
        assert [(call.function.name, json.loads(call.function.arguments)) for call in calls] == [OSLO] * 2
        assert [choice.finish_reason for choice in choices if choice.finish_reason] == ["tool_calls"]
        assert all(choice.delta.content or choice.delta.tool_calls or choice.finish_reason for choice in choices[1:])


def test_one_call_at_most(told):
    client = told(SAID)
    ask = dict(tools=TOOLS, parallel_tool_calls=False, **ASK)
    assert len(client.chat.completions.create(**ask).choices[0].message.tool_calls) == 1
    events = client.chat.completions.create(stream=True, **ask)
    assert sum(len(choice.delta.tool_calls or ()) for event in events for choice in event.choices) == 1


def test_an_answer_without_a_call(told):
    client = told("It rains.\n")
    for more in ({"tools": TOOLS}, {}):
        [choice] = client.chat.completions.create(**more, **ASK).choices
        found = choice.message.content, choice.message.tool_calls, choice.finish_reason
        assert found == ("It rains.\n", None, "stop")


def test_a_call_that_the_limit_cuts_is_text(told):
    [choice] = told(SAID).chat.completions.create(tools=TOOLS, max_tokens=20, **ASK).choices
    assert choice.finish_reason == "length" and choice.message.tool_calls is None
    assert SAID.startswith(choice.message.content) and len(choice.message.content) > 10


@pytest.mark.parametrize("more", [{}, {"tools": TOOLS, "tool_choice": "none"}])
def test_calls_that_nobody_asked_for_are_text(told, more):
    [choice] = told(SAID).chat.completions.create(**more, **ASK).choices
    assert (choice.message.content, choice.message.tool_calls, choice.finish_reason) == (SAID, None, "stop")


def test_calls_and_results_reach_the_template(told):
    client = told("It rains.")
    call = {"id": "a1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}
    chat = [*CHAT, {"role": "assistant", "tool_calls": [call]}, {"role": "tool", "tool_call_id": "a1", "content": "4"}]
    made = client.chat.completions.create(tools=TOOLS, **(ASK | {"messages": chat}))
    tools = json.dumps(TOOLS)
    text = f"<s>{tools} <tool_call><s>user: Will it rain?\n<s>assistant: weatherOslo\n<s>tool: 4a1\n<s>assistant: "
    assert made.usage.prompt_tokens == len(served.words()(text, add_special_tokens=False)["input_ids"])
    assert made.choices[0].message.content == "It rains."


def test_the_loop_of_the_client(told):
    """What the server says, and what the client makes of it, goes back as it is."""
    client, server = told(SAID), {"tools": TOOLS, **ASK}
    whole = client.chat.completions.create(**server).choices[0].message
    with client.chat.completions.stream(**server) as stream:
        streamed = stream.get_final_completion().choices[0].message
    deltas = [call.model_dump() for event in client.chat.completions.create(stream=True, **server)
              for choice in event.choices for call in choice.delta.tool_calls or ()]  # fmt: skip
    counts = set()
    for said in (
        whole,
        whole.model_dump(),
        streamed,
        streamed.model_dump(),
        whole.model_dump() | {"tool_calls": deltas},
    ):
        calls = said["tool_calls"] if isinstance(said, dict) else [call.model_dump() for call in said.tool_calls]
        results = [{"role": "tool", "tool_call_id": "a", "content": "4"} for _ in calls]
        chat = [*CHAT, said, *results]
        counts.add(client.chat.completions.create(**server | {"messages": chat, "max_tokens": 1}).usage.prompt_tokens)
    assert len(counts) == 1


@pytest.mark.parametrize(("arguments", "city"), [("", ""), ("no JSON", "")])
def test_arguments_that_are_no_object(told, arguments, city):
    call = {"id": "a1", "type": "function", "function": {"name": "weather", "arguments": arguments}}
    chat = [*CHAT, {"role": "assistant", "tool_calls": [call]}, {"role": "tool", "tool_call_id": "a1", "content": "4"}]
    assert told("It rains.").chat.completions.create(tools=TOOLS, **(ASK | {"messages": chat})).usage.prompt_tokens


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (served.TEMPLATE, "chat template of tiny does not tell the model of tools; leave them out"),
        (TEMPLATE.replace("<tool_call>", ""), "klfast does not know how tiny calls tools; leave them out"),
    ],
)
def test_models_that_call_no_tools(told, template, message):
    with pytest.raises(openai.BadRequestError, match=message):
        told("", template).chat.completions.create(tools=TOOLS, **ASK)


PLACE = {
    "type": "object",
    "properties": {"at": {"$ref": "#/$defs/place"}, "n": {"enum": [1, 2]}},
    "required": ["at", "n"],
    "additionalProperties": False,
    "$defs": {
        "place": {
            "type": "object",
            "properties": {
                "town": {"enum": ["Oslo", "Bergen"]},
                "in": {"anyOf": [{"$ref": "#/$defs/place"}, {"const": 0}]},
            },
            "required": ["town", "in"],
            "additionalProperties": False,
        }
    },
}
FORCED = [*TOOLS, {"type": "function", "function": {"name": "go", "parameters": PLACE}}]


@pytest.fixture
def real(serve, monkeypatch):
    """Return a client of a server whose model says what it likes, which are no calls, and is told of tools."""
    words = copy.deepcopy(served.words())
    words.chat_template = TEMPLATE
    served.model()
    monkeypatch.setattr(served, "words", lambda: words)
    return serve(context=3000).client()


def check_place(place):
    assert list(place) == ["town", "in"] and place["town"] in ("Oslo", "Bergen")
    if place["in"] != 0:
        check_place(place["in"])


def test_a_call_that_must_be_made(real):
    choice = {"type": "function", "function": {"name": "go"}}
    ask = dict(tools=FORCED, tool_choice=choice, n=3, max_tokens=600, seed=2, **ASK | {"temperature": 1})
    made = real.chat.completions.create(**ask)
    events = list(real.chat.completions.create(stream=True, **ask))
    for one in made.choices:
        [call] = one.message.tool_calls
        assert (call.function.name, one.message.content, one.finish_reason) == ("go", None, "tool_calls")
        arguments = json.loads(call.function.arguments)
        assert list(arguments) == ["at", "n"] and arguments["n"] in (1, 2)
        check_place(arguments["at"])
        parts = [part for event in events for part in event.choices if part.index == one.index]
        [streamed] = [found for part in parts for found in part.delta.tool_calls or ()]
        assert (streamed.index, streamed.function.name) == (0, "go")
        assert streamed.function.arguments == call.function.arguments and parts[-1].finish_reason == "tool_calls"
        assert not any(part.delta.content for part in parts)


@pytest.mark.parametrize("parallel", [None, False])
def test_some_call_that_must_be_made(real, parallel):
    more = {} if parallel is None else {"parallel_tool_calls": parallel}
    ask = dict(tools=FORCED[1:], tool_choice="required", max_tokens=1500, **ASK)
    [choice] = real.chat.completions.create(**ask, **more).choices
    if choice.finish_reason == "length":  # the model's lists go on for long
        assert parallel is None and choice.message.content.startswith("[") and choice.message.tool_calls is None
    else:
        calls = choice.message.tool_calls
        assert {call.function.name for call in calls} == {"go"} and (parallel is None or len(calls) == 1)


def test_a_forced_call_that_the_limit_cuts_is_text(real):
    [choice] = real.chat.completions.create(tools=FORCED, tool_choice="required", max_tokens=5, **ASK).choices
    assert choice.finish_reason == "length" and choice.message.tool_calls is None and choice.message.content
