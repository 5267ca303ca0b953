"""Keys, sizes, the queue, and many clients at once."""

import asyncio
import random
import sys
import time
from contextlib import ExitStack

import httpx2
import openai
import pytest
import served
from running_server import NAME

ASK = dict(model=NAME, temperature=0)
LONG = 10**5  # tokens, which nobody waits for


def test_api_keys(serve):
    server = serve(of_app={"key": "right"})
    with server.client("right") as client:
        assert client.completions.create(prompt="x", max_tokens=2, **ASK).usage.completion_tokens == 2
    for key in ("wrong", "righ", "right1"):
        with server.client(key) as client, pytest.raises(openai.AuthenticationError, match="wrong or missing API key"):
            client.completions.create(prompt="x", **ASK)
    for path, status in (("/v1/models", 401), ("/metrics", 401), ("/health", 200)):
        assert httpx2.get(server.root + path).status_code == status
    found = httpx2.get(f"{server.url}/models", headers={"Authorization": b"Bearer \xff"})
    assert found.status_code == 401 and found.json()["error"]["code"] == "invalid_api_key"


def test_too_large_requests(serve):
    server = serve(of_app={"most_bytes": 1000})
    body = b'{"model": "tiny", "prompt": "' + b"a" * 2000 + b'"}'
    headers = {"Content-Type": "application/json"}
    for content in (body, iter([body[:900], body[900:]])):  # with a length, and in chunks
        found = httpx2.post(f"{server.url}/completions", content=content, headers=headers)
        assert found.status_code == 413 and "more than 1000 bytes" in found.json()["error"]["message"]


def test_a_full_queue(serve):
    server = serve(waiting=3, context=2 * LONG)
    with server.client() as client:
        ask = dict(prompt="x", max_tokens=LONG, stream=True, **ASK)
        with pytest.raises(openai.BadRequestError, match="are more than the 19 that this server takes"):
            client.completions.create(n=10, **(ask | {"prompt": ["x", "y"]}))
        with client.completions.create(n=16, **ask):  # there are places, though it is more than may wait
            _until(server, "klfast_running_answers 16.0")
        _idle(server)
        streams = []
        for i in range(19):  # 16 are written, 3 wait
            streams.append(client.completions.create(**ask))
            _until(server, f"klfast_running_answers {min(i + 1, 16)}.0")
        with pytest.raises(openai.RateLimitError, match="room for 0 now, try again later") as caught:
            client.completions.create(**ask)
        assert caught.value.response.headers["Retry-After"] == "1"
        for stream in streams:
            stream.close()
        _idle(server)
        assert client.completions.create(prompt="x", max_tokens=2, **ASK).usage.completion_tokens == 2


def test_one_request_does_not_hold_up_the_others(serve):
    server = serve(context=2 * LONG)
    many = dict(prompt="x", n=16, max_tokens=LONG, stream=True, **ASK)
    with server.client() as client, client.completions.create(**many):  # which nobody reads
        _until(server, "klfast_running_answers 16.0")
        assert client.completions.create(prompt="y", max_tokens=9, **ASK).usage.completion_tokens == 9


@pytest.mark.skipif(sys.platform != "linux", reason="needs a second address of this machine")
def test_one_client_does_not_hold_up_the_others(serve):
    server = serve(context=2 * LONG)
    with ExitStack() as stack:
        client = stack.enter_context(server.client())
        for _ in range(17):
            stack.enter_context(client.completions.create(prompt="x", max_tokens=LONG, stream=True, **ASK))
        _until(server, "klfast_running_answers 16.0", "klfast_waiting_answers 1.0")
        other = stack.enter_context(httpx2.Client(transport=httpx2.HTTPTransport(local_address="127.0.0.2")))
        done = other.post(f"{server.url}/completions", json=dict(prompt="y", max_tokens=9, **ASK), timeout=20)
        assert done.json()["usage"]["completion_tokens"] == 9


def test_64_clients_some_of_whom_leave(serve):
    server = serve(context=2 * LONG)
    chance = random.Random(1)
    longest = [1500 if i % 16 == 3 else 120 for i in range(64)]
    texts = ["".join(chance.choice("abcdef gh") for _ in range(chance.randint(1, most))) for most in longest]
    lengths = [chance.randint(3, 40) for _ in texts]

    async def ask(client, i):
        options = dict(prompt=texts[i], max_tokens=lengths[i], **ASK)
        if i % 4 == 0:  # leaves in the middle of a stream
            async with await client.completions.create(stream=True, **options | {"max_tokens": LONG}) as stream:
                async for _ in stream:
                    return None
        if i % 4 == 1:  # leaves while it waits
            with pytest.raises(openai.APITimeoutError):
                await client.with_options(timeout=0.2).completions.create(**options | {"max_tokens": LONG})
            return None
        if i % 4 == 2:
            return "".join([e.choices[0].text async for e in await client.completions.create(stream=True, **options)])
        return (await client.completions.create(**options)).choices[0].text

    async def all_of_them():
        async with openai.AsyncOpenAI(base_url=server.url, api_key="none", max_retries=0, timeout=100) as client:
            return await asyncio.gather(*(ask(client, i) for i in range(64)))

    for i, found in enumerate(asyncio.run(all_of_them())):
        if i % 4 > 1:
            prompt = served.ids(texts[i])
            assert found == served.text_after(prompt, served.alone(prompt, lengths[i])), texts[i]
    _idle(server)


def _idle(server):
    """Fail unless the server soon has nothing to do: those who left are not written for."""
    _until(server, "klfast_running_answers 0.0", "klfast_waiting_answers 0.0")


def _until(server, *metrics):
    end, lines = time.monotonic() + 20, []
    while not set(metrics) <= set(lines):
        assert time.monotonic() < end, metrics
        lines = httpx2.get(f"{server.root}/metrics").text.splitlines()
