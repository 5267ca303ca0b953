"""What the server says about values that may have several forms: places and reasons in the API's own names."""

import json

import httpx2
import pytest

SAID = {"role": "user", "content": "x"}
HALF = "has half of a surrogate pair; send whole characters"
PROMPT = "Input should be a text, token ids, or a list of either"
CONTENT = "Input should be a text or a list of text parts"
FEW = "List should have at least 1 item after validation, not 0"
COMPLETIONS = [
    (dict(stop=""), "stop", "String should have at least 1 character"),
    (dict(stop=["a", ""]), "stop.1", "String should have at least 1 character"),
    (dict(stop="\ud800"), "stop", HALF),
    (dict(stop=5), "stop", "Input should be a text or a list of texts"),
    (dict(stop=["a", 5]), "stop.1", "Input should be a valid string"),
    (dict(prompt=None), "prompt", PROMPT),
    (dict(prompt={}), "prompt", PROMPT),
    (dict(prompt=[]), "prompt", FEW),
    (dict(prompt="\ud800"), "prompt", HALF),
    (dict(prompt=["a", "\ud800"]), "prompt.1", HALF),
    (dict(prompt=["a", 1]), "prompt.1", "Input should be a valid string"),
    (dict(prompt=[1, "a"]), "prompt.1", "Input should be a valid integer"),
    (dict(prompt=[[1], []]), "prompt.1", FEW),
    (dict(prompt=[[1], ["a"]]), "prompt.1.0", "Input should be a valid integer"),
    ({"a text": 1}, "a text", "Extra inputs are not permitted"),
    (dict(stream_options={"texts": 1}), "stream_options.texts", "Extra inputs are not permitted"),
    (dict(stream_options=5), "stream_options", "Input should be an object"),
]
NO_CONTENT = "Field required, unless there are tool_calls"
CHATS = [
    ([], "messages", FEW),
    ([SAID, 5], "messages.1", "Input should be an object"),
    ([SAID, {"role": "assistant", "content": None}], "messages.1.content", NO_CONTENT),
    ([SAID, {"role": "assistant"}], "messages.1.content", NO_CONTENT),
    ([{"role": "user"}], "messages.0.content", "Field required"),
    ([{"role": "user", "content": {}}], "messages.0.content", CONTENT),
    ([{"role": "user", "content": "\ud800"}], "messages.0.content", HALF),
    ([{"role": "user", "content": ["x"]}], "messages.0.content.0", "Input should be an object"),
    (
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}],
        "messages.0.content.0.type",
        "Input should be 'text'",
    ),
]


def error(server, path, body):
    """Send a body as ASCII, which may escape halves of surrogate pairs."""
    content, headers = json.dumps({"model": "tiny", **body}), {"Content-Type": "application/json"}
    found = httpx2.post(f"{server.url}/{path}", content=content, headers=headers)
    assert found.status_code == 400
    return found.json()["error"]


def refused(server, path, body, place, reason):
    found = error(server, path, body)
    assert (found["param"], found["message"]) == (place, f"{place}: {reason}")


@pytest.mark.parametrize(("body", "place", "reason"), COMPLETIONS)
def test_completions(server, body, place, reason):
    refused(server, "completions", {"prompt": "x", **body}, place, reason)


@pytest.mark.parametrize(("messages", "place", "reason"), CHATS)
def test_chats(server, messages, place, reason):
    refused(server, "chat/completions", {"messages": messages}, place, reason)


def test_a_body_that_is_no_object(server):
    found = httpx2.post(f"{server.url}/completions", json=[])
    assert found.json()["error"]["message"] == "the body: Input should be an object"


def test_half_of_a_surrogate_pair_for_the_chat_template(server):
    body = {"messages": [SAID], "chat_template_kwargs": {"mood": "\ud800"}}
    assert "chat template of tiny refuses these messages: " in error(server, "chat/completions", body)["message"]
