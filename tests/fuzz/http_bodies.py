"""Bodies of requests for the server's application, without sockets, and what is wrong with its replies."""

from __future__ import annotations

import asyncio
import json
import threading
from functools import cache
from pathlib import Path
from typing import Any

import served
from fastapi import FastAPI

from klfast.serving.api import make_app
from klfast.serving.service import Service

_LONGEST = 1000  # characters of an error, or of the name of what it is about


def write_bodies(folder: Path) -> None:
    """Write bodies that the server answers, with every option that it follows."""
    penalties = dict(repetition_penalty=1.1, presence_penalty=0.1, frequency_penalty=0.1)
    sampling = dict(temperature=0.5, top_k=9, top_p=0.9, min_p=0.01, seed=1, n=2)
    common = dict(model="tiny", max_tokens=3, stop=["xyz", "é"], user="u", logit_bias={}) | penalties | sampling
    common |= dict(stop_token_ids=[3], ignore_eos=True, service_tier="auto")
    events = dict(stream=True, stream_options=dict(include_usage=True))
    said = [dict(role="system", content="s"), dict(role="user", content=[dict(type="text", text="hello")])]
    call = dict(id="a", type="function", function=dict(name="f", arguments='{"x": 1}'))
    called = [dict(role="assistant", tool_calls=[call]), dict(role="tool", tool_call_id="a", content="4")]
    tool = dict(type="function", function=dict(name="f", parameters=dict(type="object")))
    bodies = {
        "completions": common | dict(prompt="hello", logprobs=2, echo=False, best_of=1),
        "completions_of_many": dict(model="tiny", prompt=[[1, 2], [3]], temperature=0, stop="e") | events,
        "chat": common | dict(messages=said, logprobs=True, top_logprobs=2, max_completion_tokens=2) | events,
        "chat_at_once": dict(model="tiny", messages=said, max_completion_tokens=2, store=False)
        | dict(tools=[tool], tool_choice="none", chat_template_kwargs=dict(mood="calm")),
        "chat_in_json": dict(model="tiny", messages=called, max_tokens=2)
        | dict(response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "integer"}}}),
    }
    for name, body in bodies.items():
        (folder / name).write_text(json.dumps(body))


def post(path: Path) -> None:
    """Send a damaged body, and judge the reply.

    Args:
        path: holds the body; the name says where it is sent.

    Raises:
        AssertionError: a client cannot use the reply.
    """
    status, text = ask(path)
    assert status < 500, f"status {status}: {text[:300]}"
    if status != 200:
        error = json.loads(text)["error"]
        for one in (error["message"], error["param"] or "the body"):
            assert one and one.isprintable() and len(one) <= _LONGEST, f"not a line: {one[:300]!r}"
    elif text.startswith("data: "):
        *events, end, after = text.split("\n\n")
        assert (end, after) == ("data: [DONE]", ""), f"no end: {text[-300:]}"
        for event in events:
            assert "error" not in _parsed(event.removeprefix("data: ")), event
    else:
        reply = _parsed(text)
        assert all(one["finish_reason"] in ("stop", "length") for one in reply["choices"]), text[:300]


def _parsed(text: str) -> Any:
    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    return json.loads(text, parse_constant=refuse)


@cache
def _server() -> FastAPI:
    """Return an application for all bodies; the thread that writes its answers ends with the process, as its maker."""
    made: list[FastAPI] = []

    def make() -> None:
        service = Service(served.model(), served.words(), "tiny", context=48, cache_bytes=2**20)
        made.append(make_app(service))

    maker = threading.Thread(target=make, daemon=True)
    maker.start()
    maker.join()
    return made[0]


def ask(path: Path) -> tuple[int, str]:
    """Return the status and the content of the reply to a body."""
    status, content = asyncio.run(_ask(path.read_bytes(), "chat/completions" if "chat" in path.name else "completions"))
    return status, content.decode()


async def _ask(body: bytes, route: str) -> tuple[int, bytes]:
    """Send a body in two parts, then wait as a client does; return the status and the content of the reply."""
    parts = [
        {"type": "http.request", "body": body[: len(body) // 2], "more_body": True},
        {"type": "http.request", "body": body[len(body) // 2 :], "more_body": False},
    ]
    sent: list[Any] = []

    async def receive() -> Any:
        return parts.pop(0) if parts else await asyncio.Event().wait()

    async def send(message: Any) -> None:
        sent.append(message)

    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    address = dict(path=f"/v1/{route}", query_string=b"", client=("127.0.0.1", 1), server=("127.0.0.1", 80))
    await _server()(dict(type="http", method="POST", headers=headers, **address), receive, send)
    return sent[0]["status"], b"".join(message["body"] for message in sent[1:])
